"""Steps that are recorded once and replayed, and what the host learns of them without waiting."""

from collections.abc import Callable

import torch
from torch import Tensor

from comemo_kernels._op import check


def runs_ahead(device: torch.device | str) -> bool:
    """Whether work on `device` is queued: the host goes on before it is done."""
    return torch.device(device).type == "cuda"


def capture(
    function: Callable[[], object], device: torch.device | str, warmups: int = 2
) -> Callable[[], object]:
    """Record a function's work on a GPU as one CUDA graph, to be repeated at the cost of a launch.

    Args:
        function: reads and writes tensors that live as long as the graph, always the same ones. It
            runs `warmups` + 1 times here, of which the last is recorded and changes nothing.
        device: where its tensors are.
        warmups: calls ahead of the recording, in which kernels are compiled and libraries choose
            theirs; at least 1.

    Returns:
        A function that replays the recording on the current stream. Where there is no GPU, that is
        `function` itself, which was not called.

    Raises:
        ValueError: no warm-up, or a function that cannot be recorded.
    """
    check(warmups >= 1, f"capture: warmups must be at least 1, got {warmups}")
    device = torch.device(device)
    if not runs_ahead(device):
        return function
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(warmups):
                function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on meanwhile with what a recording would not allow.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                function()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                "capture: function must be recordable: it must not wait for the GPU, read a value"
                f" of it or copy from the host's memory, got {type(error).__name__}: {error}"
            ) from error

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


class HostFlag:
    """A small tensor of a device as the host sees it: asked for now, read when it is there.

    One at a time: what was posted must be read before the next is.

    Args:
        like: a tensor of the shape, dtype and device of those to come.
    """

    def __init__(self, like: Tensor) -> None:
        queued = runs_ahead(like.device)
        self._host = torch.empty(like.shape, dtype=like.dtype, pin_memory=queued)
        self._event = torch.cuda.Event() if queued else None

    def post(self, value: Tensor) -> None:
        """Ask for `value` as it is at this point of the device's queue; the host goes on."""
        self._host.copy_(value, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(value.device))

    def read(self) -> Tensor:
        """What was posted, on the host, which waits for it; it is overwritten by the next."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
