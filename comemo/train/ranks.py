"""Ranks of a distributed run: who writes, and what they tell each other."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed as dist

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


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


def on_first(call: Callable[[], T]) -> T:
    """The result of a call on the first rank, on all ranks; its exception is raised on all, too.

    Args:
        call: its result can be pickled.
    """
    if world_size() == 1:
        return call()
    result = error = None
    if is_first():
        try:
            result = call()
        except Exception as raised:  # the others would wait for ever
            error = raised
    kinds = (ValueError, OSError)
    said = error and (next((k for k in kinds if isinstance(error, k)), RuntimeError), str(error))
    result, told = from_first((result, said))
    if error is not None:
        raise on_all(error)
    if told is not None:
        kind, text = told
        raise on_all(kind(text))
    return result


def on_all(error: E) -> E:
    """The same exception, marked as one that all ranks raise: the first one tells of it."""
    setattr(error, "on_all_ranks", True)  # noqa: B010  (exceptions have no such attribute)
    return error


def is_on_all(error: BaseException) -> bool:
    """Whether all ranks raise this exception, so that one of them tells of it."""
    return getattr(error, "on_all_ranks", False)
