"""Steps that are recorded once and replayed, and what the host learns of them without waiting."""

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
        ValueError: no function, warm-up or device, a current stream that is being recorded already,
            or a function that cannot be recorded. What else the function raises comes as it is.
            Whatever is raised, stream, memory and random numbers are as behind the warm-ups.
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
            "capture: the current stream must not be recorded already, got one that is",
        )
        graph = _record(function, warmups)

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


def _record(function: Callable[[], object], warmups: int) -> torch.cuda.CUDAGraph:
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    recorder, graph = _Recorder(side.cuda_stream), torch.cuda.CUDAGraph()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        mark = torch.zeros(1, device="cuda")
        try:
            for _ in range(warmups):
                function()
        finally:
            current.wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # while recording nothing can be freed for what is allocated
        with _no_collection():
            try:
                # Other threads may go on meanwhile with what a recording would not allow.
                graph.capture_begin(capture_error_mode="thread_local")
                function()
                recorder.check_valid()
                graph.capture_end()
            except BaseException as error:
                _abandon(graph, recorder, mark)
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                if isinstance(error, RuntimeError):
                    raise ValueError(
                        "capture: function must be recordable: it must not wait for the GPU, read a"
                        " value of it or copy from the host's memory, got"
                        f" {type(error).__name__}: {error}"
                    ) from error
                raise
    return graph


def _abandon(graph: torch.cuda.CUDAGraph, recorder: "_Recorder", mark: Tensor) -> None:
    """Take back all that a recording has set up, whatever became of it.

    What `capture_end` does for a recording that failed differs from torch to torch: to 2.11
    allocations stay routed to the graph's pool, and a generator of random numbers that it believes
    to be recorded refuses every later draw and every replay of other graphs. So the failed
    recording is ended by the driver, and torch ends a valid one in its place.
    """
    recorder.end()
    recorder.begin()
    mark.zero_()  # torch warns of a graph of nothing
    with contextlib.suppress(RuntimeError):  # of a graph that it has ended, or never began
        graph.capture_end()
    graph.reset()


class _Recorder:
    """The recording of a stream by the driver's own calls, to which torch has no door."""

    ACTIVE, THREAD_LOCAL = 1, 1  # the driver's numbers for a valid recording, and its mode

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
        """End whatever is being recorded, valid or not, and drop it."""
        graph = ctypes.c_void_p()
        self._end(self._stream, ctypes.byref(graph))
        if graph:
            self._destroy(graph)

    def check_valid(self) -> None:
        """Raise RuntimeError unless all of the recording was allowed; an error may be swallowed."""
        state = ctypes.c_int()
        self._state(self._stream, ctypes.byref(state))
        if state.value != self.ACTIVE:
            raise RuntimeError("an operation that no graph can hold has ended the recording")


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No collection of garbage, which may free what must not be freed while recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class HostFlag:
    """A small tensor of a device as the host sees it: asked for now, read when it is there.

    One at a time: what was posted must be read before the next is.

    Args:
        like: a tensor of the shape, dtype and device of those to come.
    """

    @public
    def __init__(self, like: Tensor) -> None:
        queued = runs_ahead(like.device)
        self._host = torch.empty(like.shape, dtype=like.dtype, pin_memory=queued)
        self._event = torch.cuda.Event() if queued else None

    @public
    def post(self, value: Tensor) -> None:
        """Ask for `value` as it is at this point of the device's queue; the host goes on.

        Raises:
            ValueError: a value of a shape that does not fit.
        """
        try:
            self._host.copy_(value, non_blocking=True)
        except RuntimeError as error:
            shape = tuple(self._host.shape)
            if tuple(value.shape) == shape:
                raise
            raise ValueError(
                f"HostFlag.post: value must be {shape}, got {tuple(value.shape)}"
            ) from error
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(value.device))

    def read(self) -> Tensor:
        """What was posted, on the host, which waits for it; it is overwritten by the next."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
