"""CUDA graph capture and replay, and copies to the host without a sync."""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._op import check, check_count


@public
def runs_ahead(device: torch.device | str) -> bool:
    """Whether work on `device` is asynchronous: the host continues before it is done."""
    return torch.device(device).type == "cuda"


def capture(
    function: Callable[[], object], device: torch.device | str, warmups: int = 2
) -> Callable[[], object]:
    """Capture a function's work on a GPU as one CUDA graph, which replays at the cost of a launch.

    Args:
        function: reads and writes static buffers, which live as long as the graph. It runs
            `warmups` + 1 times here; the last run is captured and changes nothing.
        device: of its tensors.
        warmups: calls before the capture, in which kernels are compiled and libraries choose
            theirs; at least 1.

    Returns:
        A function that replays the graph on the current stream. Without a GPU it is `function`
        itself, which was not called.

    Raises:
        ValueError: no function, warm-up or device, a current stream that is being captured already,
            or a function that cannot be captured. Other errors of the function are passed on. After
            any error, stream, memory and random number generators are as after the warm-ups.
    """
    check(callable(function), f"capture: function must be a function, got {function!r}")
    check_count("capture", "warmups", warmups, 1)
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"capture: device must be a device, got {device!r}") from error
    if not runs_ahead(device):
        return function
    with torch.cuda.device(device):
        check(
            not torch.cuda.is_current_stream_capturing(),
            "capture: the current stream must not be captured already, got one that is",
        )
        graph = _record(function, warmups)

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


def _record(function: Callable[[], object], warmups: int) -> torch.cuda.CUDAGraph:
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    stream_capture, graph = _StreamCapture(side.cuda_stream), torch.cuda.CUDAGraph()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        mark = torch.zeros(1, device="cuda")
        try:
            for _ in range(warmups):
                function()
        finally:
            current.wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # during capture no cached block can be freed for an allocation
        with _no_collection():
            try:
                # Other threads may continue with calls that a capture does not allow.
                graph.capture_begin(capture_error_mode="thread_local")
                function()
                stream_capture.check_valid()
                graph.capture_end()
            except BaseException as error:
                _abandon(graph, stream_capture, mark)
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                if isinstance(error, RuntimeError):
                    raise ValueError(
                        "capture: function must be capturable: it must not sync with the GPU, read"
                        " its values or copy from host memory, got"
                        f" {type(error).__name__}: {error}"
                    ) from error
                raise
    return graph


def _abandon(graph: torch.cuda.CUDAGraph, stream_capture: "_StreamCapture", mark: Tensor) -> None:
    """Undo everything that a failed capture has set up.

    What `capture_end` does after a failed capture depends on the version of torch: up to 2.11
    allocations stay routed to the graph's pool, and a random number generator that it takes for
    captured rejects every later draw and every replay of other graphs. So the driver ends the
    failed capture, and torch ends a valid one instead.
    """
    stream_capture.end()
    stream_capture.begin()
    mark.zero_()  # torch warns about an empty graph
    with contextlib.suppress(RuntimeError):  # the graph has ended, or never began
        graph.capture_end()
    graph.reset()


class _StreamCapture:
    """Capture of a stream by driver calls, which torch does not expose."""

    ACTIVE = 1  # the driver's constant for a valid capture
    THREAD_LOCAL = 1  # and for the mode of a capture

    def __init__(self, stream: int) -> None:
        hip = torch.version.hip is not None
        driver = ctypes.CDLL("libamdhip64.so" if hip else "libcuda.so.1")
        begin = "hipStreamBeginCapture" if hip else "cuStreamBeginCapture_v2"
        prefix = "hip" if hip else "cu"
        self._stream, self._begin = ctypes.c_void_p(stream), getattr(driver, begin)
        self._end, self._state, self._destroy = (
            getattr(driver, prefix + name)
            for name in ("StreamEndCapture", "StreamIsCapturing", "GraphDestroy")
        )

    def begin(self) -> None:
        self._begin(self._stream, self.THREAD_LOCAL)

    def end(self) -> None:
        """End the capture, valid or not, and discard its graph."""
        graph = ctypes.c_void_p()
        self._end(self._stream, ctypes.byref(graph))
        if graph:
            self._destroy(graph)

    def check_valid(self) -> None:
        """Raise RuntimeError if an operation was not allowed, even if its error was caught."""
        state = ctypes.c_int()
        self._state(self._stream, ctypes.byref(state))
        if state.value != self.ACTIVE:
            raise RuntimeError(
                "an operation that a CUDA graph does not support has ended the capture"
            )


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection, which may free what must not be freed during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class HostFlag:
    """Copies a small tensor from a device to the host: `post` starts a copy, `read` waits for it.

    One copy at a time: read each before the next is posted.

    Args:
        like: a tensor with the shape, dtype and device of those to copy.
    """

    @public
    def __init__(self, like: Tensor) -> None:
        self._device, queued = like.device, runs_ahead(like.device)
        self._host = torch.empty(like.shape, dtype=like.dtype, pin_memory=queued)
        self._event = torch.cuda.Event() if queued else None

    @public
    def post(self, value: Tensor) -> None:
        """Start the copy of `value`, in stream order; the host does not wait.

        Raises:
            ValueError: a value of another shape or on another device.
        """
        shape = tuple(self._host.shape)
        if tuple(value.shape) != shape or value.device != self._device:
            raise ValueError(
                f"HostFlag.post: value must be {shape} on {self._device}, got"
                f" {tuple(value.shape)} on {value.device}"
            )
        self._host.copy_(value, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(value.device))

    def read(self) -> Tensor:
        """Wait for the copy, and return it on the CPU; the next `post` overwrites it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
