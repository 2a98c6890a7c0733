"""A failed capture leaves nothing behind: stream, memory and random numbers are as before.

Here torch and the driver are mocked. Run as a script, the file checks the same on a GPU, in a
process of its own, because anything left behind would fail other tests.
"""

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import comemo_kernels as ops

pytestmark = pytest.mark.no_virtual_gpu("it mocks a GPU itself")
ROOT = Path(__file__).parents[1]


class Machine:
    """The state of a capture that a GPU, its driver and torch keep."""

    def __init__(self, bookkeeping_first: bool) -> None:
        # In `capture_end`: torch from 2.12 on; before, an error came first.
        self.bookkeeping_first = bookkeeping_first
        self.streams = ["the caller's"]
        self.recording: str | None = None  # "valid", "invalid"
        self.routed: list[object] = []  # graphs to whose pools allocations go
        self.drawing: list[
            object
        ] = []  # graphs that the random number generator takes for captured
        self.pools: list[object] = []  # reserved for a graph
        self.fails_to_begin = False

    def invalidate(self) -> None:
        """The effect of an operation that a CUDA graph does not support."""
        if self.recording:
            self.recording = "invalid"
            raise RuntimeError("operation not permitted when stream is capturing")

    # --- the driver's calls ---

    def cuStreamBeginCapture_v2(self, stream, mode):
        assert (stream.value, mode) == (7, 1)
        assert self.recording is None
        self.recording = "valid"

    def cuStreamEndCapture(self, stream, graph):
        assert stream.value == 7
        graph._obj.value = 99 if self.recording == "valid" else None
        self.recording = None

    def cuGraphDestroy(self, graph):
        assert graph.value == 99

    def cuStreamIsCapturing(self, stream, state):
        state._obj.value = {None: 0, "valid": 1, "invalid": 2}[self.recording]


@pytest.fixture(params=[False, True], ids=["torch up to 2.11", "torch from 2.12"])
def machine(request, monkeypatch):
    held = Machine(request.param)

    class Graph:
        whole = False

        def capture_begin(self, capture_error_mode):
            assert capture_error_mode == "thread_local"
            for kept in (held.routed, held.drawing, held.pools):
                kept.append(self)
            if held.fails_to_begin:
                raise RuntimeError("another recording is under way")
            held.recording = "valid"

        def capture_end(self):
            state, held.recording = held.recording, None
            if state != "valid" and not held.bookkeeping_first:
                raise RuntimeError("the recording is invalid")
            held.routed.remove(self) if self in held.routed else self._refuse()
            if state != "valid":
                raise RuntimeError("the recording is invalid")
            held.drawing.remove(self)
            self.whole = True

        def _refuse(self):
            raise RuntimeError("allocations do not go to this graph")

        def reset(self):
            if self.whole:
                held.pools.remove(self)
            if held.bookkeeping_first and self in held.drawing:
                held.drawing.remove(self)

        def replay(self):
            assert self.whole

    class Stream:
        cuda_stream = 7

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def stream(entered):
        held.streams.append(entered)
        try:
            yield
        finally:
            held.streams.pop()

    zeros = torch.zeros
    monkeypatch.setattr(ctypes, "CDLL", lambda name: held)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    for name, replacement in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "stream": stream,
        "device": lambda _: contextlib.nullcontext(),
        "current_stream": lambda: Stream(),
        "is_current_stream_capturing": lambda: held.recording is not None,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return held


def assert_nothing_is_left(machine):
    assert machine.streams == ["the caller's"]
    assert machine.recording is None
    assert machine.routed == machine.drawing == machine.pools == []
    assert gc.isenabled()


def test_a_function_is_captured_after_its_warmups(machine):
    seen = []

    def function():
        seen.append((len(machine.streams), machine.recording, gc.isenabled()))

    replay = ops.capture(function, "cuda", warmups=3)
    assert seen == [(2, None, True)] * 3 + [(2, "valid", False)]
    assert machine.streams == ["the caller's"]
    assert (machine.routed, machine.drawing, len(machine.pools)) == ([], [], 1)
    replay()
    assert len(seen) == 4


def swallow(machine):
    with contextlib.suppress(RuntimeError):
        machine.invalidate()


def stop(machine, error):
    if machine.recording:
        raise error


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        (Machine.invalidate, ValueError, "must be capturable: .* RuntimeError: operation not perm"),
        (swallow, ValueError, "must be capturable: .* has ended the capture"),
        (lambda m: stop(m, KeyError("a")), KeyError, "a"),
        (lambda m: stop(m, KeyboardInterrupt("now")), KeyboardInterrupt, "now"),
        (lambda m: stop(m, torch.cuda.OutOfMemoryError("full")), RuntimeError, "full"),
    ],
    ids=["reads", "swallows", "raises", "is interrupted", "needs too much"],
)
def test_a_failed_capture_leaves_nothing_behind(machine, fail, error, message):
    with pytest.raises(error, match=message):
        ops.capture(lambda: fail(machine), "cuda")
    assert_nothing_is_left(machine)
    ops.capture(lambda: None, "cuda")()


def test_a_capture_that_cannot_start(machine):
    machine.fails_to_begin = True
    with pytest.raises(ValueError, match="another recording is under way"):
        ops.capture(lambda: None, "cuda")
    assert_nothing_is_left(machine)


def test_a_warmup_that_fails_starts_no_capture(machine):
    def fail():
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        ops.capture(fail, "cuda")
    assert_nothing_is_left(machine)


def test_a_capture_within_a_capture_raises(machine):
    machine.recording = "valid"
    with pytest.raises(ValueError, match="capture: the current stream must not be captured"):
        ops.capture(lambda: None, "cuda")
    assert machine.recording == "valid"


# --- on a GPU ---


@pytest.mark.gpu
def test_a_failed_capture_on_a_gpu():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-W", "error:The CUDA Graph is empty", __file__]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["reads", "draws", "swallows", "waits", "raises"]


def fail_and_look() -> None:
    """Fail in every way, and check everything that could be left behind."""
    x, y, drawn = (torch.zeros(8, device="cuda") for _ in range(3))

    def recording():
        return torch.cuda.is_current_stream_capturing()

    def large():
        return torch.ones(2**26, device="cuda")

    def read():
        large().sum().item()

    def draw():
        torch.rand(8, device="cuda")
        read()

    def swallow():
        with contextlib.suppress(RuntimeError):
            read()

    def wait():
        large()
        torch.cuda.synchronize()

    def stop():
        held = large()
        if recording():
            raise KeyError(held.shape)

    earlier = ops.capture(drawn.uniform_, "cuda")
    stream = torch.cuda.current_stream()
    kinds = {"reads": read, "draws": draw, "swallows": swallow, "waits": wait, "raises": stop}
    for name, function in kinds.items():
        gc.collect()
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved()
        torch.cuda.manual_seed(5)
        with pytest.raises(KeyError if name == "raises" else ValueError) as told:
            ops.capture(function, "cuda", warmups=1)
        del told  # and with it the function's frame, which keeps memory alive
        assert torch.cuda.current_stream() == stream
        assert not recording()

        found = torch.rand(8, device="cuda")
        torch.cuda.manual_seed(5)
        for _ in range(2 if name == "draws" else 1):  # the warm-up's
            wanted = torch.rand(8, device="cuda")
        assert torch.equal(found, wanted)
        torch.cuda.manual_seed(6)
        earlier()
        torch.cuda.manual_seed(6)
        assert torch.equal(drawn, x.uniform_())

        large()
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == reserved, (torch.cuda.memory_reserved(), reserved)
        later = ops.capture(lambda: y.add_(1), "cuda")
        y.zero_()
        later()
        later()
        assert y.tolist() == [2.0] * 8
        del later
        print(name)


if __name__ == "__main__":
    fail_and_look()
