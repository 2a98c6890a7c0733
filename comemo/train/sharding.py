"""ZeRO-1: each rank keeps and updates its own part of the optimizer's state."""

import inspect
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """torch's `ZeroRedundancyOptimizer` in a form that accelerate can wrap.

    Its `state_dict` has no state of parameters until `whole_state` collected it: accelerate asks
    for one at the beginning, when there is none.
    """

    def state_dict(self) -> dict[str, Any]:
        if self._all_state_dicts:
            return super().state_dict()
        return torch.optim.Optimizer.state_dict(self)


def shard(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer with its state divided among the ranks.

    Args:
        optimizer: without state yet.

    Returns:
        A `ShardedOptimizer`; `optimizer` itself if there is one rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return optimizer
    known = inspect.signature(type(optimizer)).parameters  # defaults has internal values, too
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    groups = [
        {name: value for name, value in group.items() if name in known or name == "params"}
        for group in optimizer.param_groups
    ]
    return ShardedOptimizer(groups, optimizer_class=type(optimizer), **options)


def whole_state(optimizer: Any) -> dict[str, Any] | None:
    """The state of all parameters, on the first rank; None on the others. All ranks must call.

    Args:
        optimizer: sharded or not, also as accelerate wraps it.

    Returns:
        The same form in both cases, so that a run goes on with another number of ranks.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not isinstance(optimizer, ShardedOptimizer):
        return optimizer.state_dict() if first else None
    optimizer.consolidate_state_dict(to=0)
    state = optimizer.state_dict() if first else None
    optimizer._all_state_dicts = []
    return state
