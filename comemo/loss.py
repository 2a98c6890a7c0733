"""The training loss, by the conventions of transformers' Trainer."""

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_loss(
    logits: Tensor,
    labels: Tensor | None,
    weights: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of the next token: sum(w * l) / sum(w) over the labels that count.

    Args:
        logits: [B, N, V].
        labels: integers [B, N], -100 where nothing is to be learned; token n is predicted from
            logits n - 1.
        weights: [B, N], weight of each label; None for 1.
        shift_labels: integers [B, N] instead of `labels`, those that logits n predict, as context
            parallelism needs them; `weights` go with them place by place.
        num_items_in_batch: what to divide by instead of sum(w). Gradient accumulation hands the
            labels of all its micro-batches, so that the gradient does not depend on how they are
            split; with weights, hand the sum of all weights for their mean.

    Returns:
        A number, float32; NaN where no label counts and nothing else is to be divided by.

    Raises:
        ValueError: labels or weights that do not fit the logits.
    """
    B, N, _ = logits.shape
    wanted, name = (labels, "labels") if shift_labels is None else (shift_labels, "shift_labels")
    for told, given in ((name, wanted), ("loss_weights", weights)):
        if given is not None and given.shape != (B, N):
            raise ValueError(
                f"CoMemo: {told} must be {(B, N)}, as the logits (logits_to_keep=0), got"
                f" {tuple(given.shape)}"
            )
    assert wanted is not None
    if shift_labels is None:
        logits, wanted = logits[:, :-1], wanted[:, 1:]
        weights = None if weights is None else weights[:, 1:]
    wanted = wanted.to(logits.device).flatten()
    losses = F.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none")
    counts = wanted != -100
    if weights is not None:
        weights = weights.to(logits.device).flatten() * counts
        losses = losses * weights
    total = counts if weights is None else weights
    items = total.sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(items, Tensor):
        items = items.to(losses.device)
    return torch.as_tensor(losses.sum() / items)
