"""Norms of gradients of which each rank has a part."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def is_divided(tensor: Any) -> bool:
    """Whether a weight or gradient is a `DTensor`."""
    return hasattr(tensor, "to_local")


def squares_by_name(model: nn.Module) -> dict[str, Tensor]:
    """The square of the norm of each gradient: scalars in float32 at least, the same on all ranks.

    All ranks must call if weights are divided; the sums are exchanged once.
    """
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if not found:
        return {}
    gradients: list[Any] = list(found.values())
    local = [g.to_local() if is_divided(g) else g for g in gradients]
    exact = torch.float64 if local[0].dtype == torch.float64 else torch.float32
    norms = torch._foreach_norm(local, 2, dtype=exact)
    squares = torch.stack([norm.to(norms[0].device) for norm in norms]).square()
    if any(map(is_divided, gradients)):
        copies = [_copies(g) for g in gradients]
        squares = squares.nan_to_num(torch.inf) / torch.tensor(copies, device=squares.device)
        dist.all_reduce(squares)
    return dict(zip(found, squares.unbind(), strict=True))


def _copies(gradient: Any) -> int:
    """How many ranks have each number of a gradient."""
    parts = 1
    if is_divided(gradient):
        for place, size in zip(gradient.placements, gradient.device_mesh.shape, strict=True):
            parts *= 1 if place.is_replicate() else size
    return dist.get_world_size() // parts


def clip(model: nn.Module, norm: Tensor, most: float) -> None:
    """Scale all gradients so that their norm is at most `most`.

    Args:
        model: whose gradients are changed.
        norm: of all of them, now.
        most: above 0.
    """
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for local in _local_gradients(model.parameters()):
        local.mul_(factor.to(local.device))


def _local_gradients(parameters: Iterable[nn.Parameter]) -> Iterable[Tensor]:
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is not None:
            yield gradient.to_local() if is_divided(gradient) else gradient


def split_by_mesh(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of an optimizer in which all parameters are divided in the same way.

    Optimizers handle the parameters of a group together, which must then be on one mesh.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        by_mesh: dict[Any, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        split += [{**group, "params": own} for own in by_mesh.values()]
    return split
