"""The training loss, with the conventions of transformers' Trainer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comemo.linear_loss import linear_cross_entropy

IGNORED = -100  # the label of a token without loss


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
    wanted, weights = _align(logits, labels, weights, shift_labels)
    if shift_labels is None:
        logits, wanted = logits[:, :-1], wanted[:, :-1]
        weights = None if weights is None else weights[:, :-1]
    wanted = wanted.flatten()
    losses = F.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none")
    counts = wanted != IGNORED
    weights = counts if weights is None else weights.flatten() * counts
    return torch.as_tensor((losses * weights).sum() / _divisor(weights, num_items_in_batch))


def loss_of_states(
    states: Tensor,
    head: nn.Module,
    labels: Tensor | None,
    weights: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """`next_token_loss` of hidden states, without the logits of a whole batch in memory.

    Only states with a label go through the head, some rows at a time.

    Args:
        states: [B, N, d].
        head: the output layer, a linear layer of V rows; it is called if it is not plain.
        labels, weights, shift_labels, num_items_in_batch: see `next_token_loss`.

    Returns:
        The loss, and the losses of single labels [B, N], float32, without a gradient: 0 where
        there is no label, else unweighted, at the label's own place.

    Raises:
        ValueError: as `next_token_loss`.
    """
    wanted, weights = _align(states, labels, weights, shift_labels)
    if shift_labels is None:
        wanted = wanted.clone()
        wanted[:, -1] = IGNORED
    wanted = wanted.flatten()
    rows = (wanted != IGNORED).nonzero().squeeze(1)
    chosen = wanted[rows]
    scale = torch.ones_like(chosen, dtype=torch.float32)
    if weights is not None:
        scale = weights.flatten()[rows].float()
    items = _divisor(scale, num_items_in_batch)
    loss, single = linear_cross_entropy(states.flatten(0, 1)[rows], head, chosen, scale / items)
    if num_items_in_batch is None:  # 0 / 0, and gradients of 0
        loss = torch.where(torch.as_tensor(items == 0), torch.nan, loss)
    places = rows if shift_labels is not None else rows + 1
    losses = torch.zeros_like(wanted, dtype=torch.float32).index_copy(0, places, single)
    return loss, losses.view(states.shape[:2])


def _align(
    outputs: Tensor, labels: Tensor | None, weights: Tensor | None, shift_labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The label and the weight of each output [B, N], on its device; the last may be unused."""
    B, N, _ = outputs.shape
    wanted, name = (labels, "labels") if shift_labels is None else (shift_labels, "shift_labels")
    for argument, given in ((name, wanted), ("loss_weights", weights)):
        if given is not None and given.shape != (B, N):
            raise ValueError(
                f"CoMemo: {argument} must be {(B, N)}, as the logits (logits_to_keep=0), got"
                f" {tuple(given.shape)}"
            )
    assert wanted is not None
    if shift_labels is None:  # output n predicts label n + 1
        wanted = wanted.roll(-1, 1)
        weights = None if weights is None else weights.roll(-1, 1)
    weights = None if weights is None else weights.to(outputs.device)
    return wanted.to(outputs.device), weights


def _divisor(weights: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | int:
    items = weights.sum() if num_items_in_batch is None else num_items_in_batch
    return items.to(weights.device) if isinstance(items, Tensor) else items
