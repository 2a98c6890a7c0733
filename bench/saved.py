"""What a computation keeps for its backward, and the most that it allocates, measured."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def saved_tensors(forward: Callable[[], Any], given: Iterable[Tensor]) -> list[Tensor]:
    """One tensor for each storage that a forward saves for its backward.

    Args:
        forward: called once, with gradients.
        given: tensors that exist anyway, such as weights and inputs; their storages do not count.
    """
    known = {t.untyped_storage().data_ptr() for t in given}
    held: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        held.setdefault(t.untyped_storage().data_ptr(), t.detach())  # so that none is used again
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return [t for place, t in held.items() if place not in known and t.numel()]


def saved_bytes(forward: Callable[[], Any], given: Iterable[Tensor]) -> int:
    """Bytes of the storages of `saved_tensors`."""
    return sum(t.untyped_storage().nbytes() for t in saved_tensors(forward, given))


def allocated(call: Callable[[], Any]) -> int:
    """Peak bytes that a call allocates on the CPU for tensors, its results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    held, most = 0, 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    return most
