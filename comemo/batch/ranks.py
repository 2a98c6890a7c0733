"""This process among those of a run, by the variables of torchrun: rank, device, threads."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rank:
    """One of the processes of a run.

    Attributes:
        index: from 0; the first one plans and merges.
        count: of all processes.
        local: index among those of this machine.
        local_count: how many this machine has; None if nobody says.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    local_count: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether it plans, merges and speaks for all."""
        return self.index == 0


def read_rank() -> Rank:
    """This process's rank by RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

    Returns:
        The rank; that of a process alone if RANK and WORLD_SIZE are not set. LOCAL_RANK is RANK if
        it is not set.

    Raises:
        ValueError: one without the other, or values that are no ranks.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given.keys().isdisjoint(names[:2]):
        return Rank()
    try:
        numbers = {name: int(value) for name, value in given.items()}
        index, count = numbers["RANK"], numbers["WORLD_SIZE"]
        local, local_count = numbers.get("LOCAL_RANK", index), numbers.get("LOCAL_WORLD_SIZE")
        if not 0 <= index < count or local < 0 or (local_count is not None and local_count < 1):
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(
            f"read_rank: wanted RANK and WORLD_SIZE with 0 <= RANK < WORLD_SIZE, got {given}"
        ) from None
    return Rank(index, count, local, local_count)


def share_threads(rank: Rank) -> None:
    """Give each rank of a machine its part of the cores: torchrun gives each a single one."""
    if rank.local_count is not None and rank.local_count > 1:
        torch.set_num_threads(max(1, _cores() // rank.local_count))


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
