"""Ranks of a distributed run: who writes, and what they tell each other."""

from typing import Any

from torch import distributed as dist


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this rank writes files and prints."""
    return rank() == 0


def wait() -> None:
    """Return after all ranks got here."""
    if world_size() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on each of them.

    Args:
        value: can be pickled, and small.
    """
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def from_first(value: Any) -> Any:
    """The first rank's value, on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
