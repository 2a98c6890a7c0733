"""Output layer and cross-entropy in one: the logits of some rows at a time are in memory.

A pack of 16,384 tokens and a vocabulary of 92,553 words has 6 GB of logits in float32. Here the
gradient of a chunk of rows is computed right after its logits, and the logits are dropped. That is
the method of Liger's fused linear cross-entropy (arXiv:2410.10989); this one has a weight for each
row and gives each row's loss. Where Liger is installed, its kernel computes the cross-entropy.

Letters: n rows, d width of the states, V words.
"""

import functools
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comemo_kernels import is_plain

CHUNK = 2**26  # logits in memory at once, 256 MB in float32


def linear_cross_entropy(
    states: Tensor, head: nn.Module, labels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """sum(scale * cross_entropy(head(states), labels)).

    A head with hooks, adapters or quantised weights is called, and called again in the backward
    pass.

    Args:
        states: [n, d].
        head: a linear layer d -> V.
        labels: integers [n], all from 0 to V - 1.
        scale: float32 [n].

    Returns:
        The sum, a scalar in float32, and cross_entropy of each row [n], float32, without a
        gradient.

    Raises:
        RuntimeError: a second backward pass through the same sum.
    """
    if is_plain(head, kinds=(nn.Linear,), biased=False):
        return _LinearCrossEntropy.apply(states, head.weight, labels, scale)
    rows = max(1, CHUNK // getattr(head, "out_features", CHUNK))
    losses = []
    for part, wanted in zip(states.split(rows), labels.split(rows), strict=True):
        losses.append(checkpoint(_called, head, part, wanted, use_reentrant=False))
    if not losses:
        losses.append(_called(head, states, labels))
    single = torch.cat(losses)
    return (single * scale).sum(), single.detach()


def _called(head: nn.Module, states: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(states).float(), labels, reduction="none")


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are ready after the forward pass; the backward pass multiplies them."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, labels: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        wants_states, wants_weight, *_ = ctx.needs_input_grad
        single = torch.empty_like(labels, dtype=torch.float32)
        d_states = torch.empty_like(states) if wants_states else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        rows = max(1, CHUNK // len(weight))
        with torch.autocast(kind, enabled=False):
            typed = weight.to(dtype)
            for start in range(0, len(states), rows):
                part = slice(start, start + rows)
                x = states[part].to(dtype)
                logits = x @ typed.T
                if d_states is None and d_weight is None:
                    single[part] = F.cross_entropy(logits.float(), labels[part], reduction="none")
                    continue
                single[part], grad = _loss_and_gradient(logits, labels[part], scale[part])
                grad = grad.to(dtype)
                if d_states is not None:
                    d_states[part] = (grad @ typed).to(states.dtype)
                if d_weight is not None:
                    d_weight += (grad.T @ x).to(weight.dtype)
        ctx.gradients = d_states, d_weight
        ctx.mark_non_differentiable(single)
        return (single * scale).sum(), single

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: its gradients are multiplied in place, so a second backward"
                " pass (retain_graph=True) needs a second forward pass"
            )
        d_states, d_weight = ctx.gradients
        ctx.gradients = None  # a copy of the weight's gradient would be 0.8 GB at 2B
        for gradient in (d_states, d_weight):
            if gradient is not None:
                gradient.mul_(d_loss)
        return d_states, d_weight, None, None


def _loss_and_gradient(logits: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [n], and the gradient [n, V] of sum(scale * cross-entropy)."""
    logits = logits.float()
    liger = _liger(logits.device.type)
    if liger is not None:
        with torch.enable_grad():
            losses = liger(logits.requires_grad_(), labels, reduction="none")
            (gradient,) = torch.autograd.grad(losses, logits, scale)
        return losses.detach(), gradient
    total = logits.logsumexp(1)
    losses = total - logits.gather(1, labels[:, None]).squeeze(1)
    gradient = logits.sub_(total[:, None]).exp_()
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    return losses, gradient.mul_(scale[:, None])


@functools.cache
def _liger(device: str) -> Any:
    """Liger's cross-entropy, where it is installed and its kernels run."""
    if device == "cpu" or not find_spec("liger_kernel"):
        return None
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy
