"""The training loss, with the conventions of transformers' Trainer."""

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
    """Cross-entropy of the next token: sum(w * l) / sum(w) over labels other than -100.

    Args:
        logits: [B, N, V].
        labels: integers [B, N], -100 to ignore; logits n - 1 predict label n.
        weights: [B, N], the weight of each label; None for 1.
        shift_labels: integers [B, N] instead of `labels`: logits n predict label n, as context
            parallelism needs it. `weights` are then shifted, too.
        num_items_in_batch: the divisor instead of sum(w). With gradient accumulation it is the
            number of labels in all micro-batches, so that the gradient does not depend on how a
            batch is split; with weights, pass the sum of all weights for the weighted mean.

    Returns:
        Scalar, float32; NaN if all labels are -100 and `num_items_in_batch` is None.

    Raises:
        ValueError: labels or weights of another shape than the logits.
    """
    B, N, _ = logits.shape
    wanted, name = (labels, "labels") if shift_labels is None else (shift_labels, "shift_labels")
    for argument, given in ((name, wanted), ("loss_weights", weights)):
        if given is not None and given.shape != (B, N):
            raise ValueError(
                f"CoMemo: {argument} must be {(B, N)}, as the logits (logits_to_keep=0), got"
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
