"""Layers whose heads and columns are divided among ranks: tensor parallelism (arXiv:1909.08053).

Every rank of a group has the same hidden states x. A block computes with its own heads or columns
and gives x + f_r(norm(x)) on the first rank, f_r(norm(x)) on all others. Their sum is
x + f(norm(x)): one all-reduce for each block, and the fused operations stay as they are. In the
backward pass the gradients of x and of weights that every rank has (norms, gates) are summed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

# Newer torch has another name for it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Split:
    """The ranks that divide a layer, as one of them sees them.

    Attributes:
        group: the process group of these ranks.
        rank: of this process in the group.
        size: number of ranks.
        sharded: whether weights are `DTensor`s, as in training: FSDP, checkpoints and optimizers
            then know which part they are. Otherwise they are ordinary parameters.
    """

    group: Any
    rank: int
    size: int
    sharded: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Split":
        return self  # a process group cannot be copied


def enter(split: Split | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """x and the residual that a block adds to, both [B, N, d]; see above.

    Args:
        split: None for a block that is not divided, whose x is returned as it is.
        x: hidden states, the same on all ranks.
    """
    if split is None:
        return x, x
    x = shared(split, x)
    return x, x if split.rank == 0 else torch.zeros_like(x)


def shared(split: Split | None, x: Tensor) -> Tensor:
    """x, which all ranks have; its gradient is the sum over the ranks."""
    if split is None or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _SumOfGradients.apply(x, split.group)


def leave(split: Split | None, x: Tensor) -> Tensor:
    """The sum of x over the ranks. Every rank uses it in the same way, so gradients are equal."""
    if split is None:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return _Sum.apply(x, split.group)
    x = x.contiguous()
    dist.all_reduce(x, group=split.group)
    return x


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        dx = dx.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


class _Parts(torch.autograd.Function):
    """Concatenates what each rank has; see `gather_parts`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, split: Split, most: int, total: int) -> Tensor:
        ctx.split, ctx.most, ctx.length = split, most, len(part)
        return _gathered(part, split, most, total)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, None]:
        start = ctx.split.rank * ctx.most
        return dx[start : start + ctx.length] * ctx.split.size, None, None, None


def part_of(split: Split, total: int) -> slice:
    """The rows of this rank, of `total` rows that the ranks divide among them; may be empty."""
    most = -(-total // split.size)
    return slice(min(split.rank * most, total), min((split.rank + 1) * most, total))


def gather_parts(split: Split, part: Tensor, total: int) -> Tensor:
    """All rows [total, ...] of `part_of` every rank.

    The gradient of a part is multiplied by the number of ranks: whoever averages the gradients of
    weights over all ranks, as FSDP does, then gets the sum over the parts.

    Args:
        split: the ranks.
        part: the rows of this rank, as `part_of` says.
        total: number of all rows.
    """
    most = -(-total // split.size)
    if torch.is_grad_enabled() and part.requires_grad:
        return _Parts.apply(part, split, most, total)
    return _gathered(part, split, most, total)


def _gathered(part: Tensor, split: Split, most: int, total: int) -> Tensor:
    if len(part) < most:
        part = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
    whole = part.new_empty(split.size * most, *part.shape[1:])
    _all_gather(whole, part.contiguous(), group=split.group)
    return whole[:total]


def refuse_divided(verb: str, model: Any) -> None:
    """Raise if a model has only parts of its layers here, by `split` or `stages`.

    Args:
        verb: what cannot be done with parts.
        model: a model, or its base model.

    Raises:
        ValueError: it is divided.
    """
    base = getattr(model, "model", model)
    if base.split is not None or base.stages is not None:
        raise ValueError(
            f"{verb}: wanted a whole model, got one that ranks divide (tp_plan, tp_size, pp_size or"
            " parallel.tensor)"
        )


def agree(split: Split | None, known: list[bool]) -> list[bool]:
    """Which of some things all ranks know, of those that this one knows."""
    if split is None:
        return known
    gathered: list[Any] = [None] * split.size
    dist.all_gather_object(gathered, known, group=split.group)
    return [all(each) for each in zip(*gathered, strict=True)]


class SplitHead(nn.Linear):
    """An output layer with some rows of the vocabulary on each rank, for inference.

    Args:
        split: the ranks.
        weight: [ceil(V / ranks), d]; the last rank's may end with rows of zeros.
        words: V.
    """

    def __init__(self, split: Split, weight: Tensor, words: int) -> None:
        super().__init__(weight.shape[1], words, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.split = split

    def forward(self, input: Tensor) -> Tensor:
        """Logits [..., V] of states [..., d], on every rank."""
        part, ranks = super().forward(input), self.split.size
        whole = part.new_empty(ranks * part.shape[0], *part.shape[1:])
        _all_gather(whole, part.contiguous(), group=self.split.group)
        return whole.unflatten(0, (ranks, -1)).movedim(0, -2).flatten(-2)[..., : self.out_features]


@contextmanager
def own_weights(split: Split, module: nn.Module) -> Iterator[None]:
    """Within the `with` block the sharded weights of a divided layer are ordinary tensors.

    So layers are computed from their weights as on one device. Gradients of parts belong to this
    rank, those of whole weights are summed.

    Args:
        split: of the layer.
        module: the layer; its submodules are included.
    """
    held = []
    try:
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is None:
                    continue
                held.append((part, name, weight))
                divided = hasattr(weight, "to_local")
                local: Any = weight.to_local() if divided else shared(split, weight)
                if local is not weight:
                    local.is_a_part = True
                part._parameters[name] = local
        yield
    finally:
        for part, name, weight in held:
            part._parameters[name] = weight
