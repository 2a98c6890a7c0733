"""What a benchmark tells on stderr while it runs: case and way, how many are done, time left.

On a terminal one line is rewritten, at most twice a second. Elsewhere a line is written when a case
begins and none between. Nothing is written while a clock runs.
"""

import contextlib
import io
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TextIO, TypeVar

T = TypeVar("T")
PERIOD = 0.5  # seconds between two changes of the line on a terminal
CLEAR = "\r\x1b[2K"

_shown: ContextVar["Progress | None"] = ContextVar("progress", default=None)


class Progress:
    """The cases of one run.

    Args:
        name: of the benchmark.
        stream: stderr.
        now: seconds of a clock.
    """

    def __init__(
        self, name: str, stream: TextIO, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self.stream, self.now = name, stream, now
        self.live = stream.isatty()
        self.total, self.count, self.begun = 0.0, 0, 0
        self.done, self.weight, self.case = 0.0, 0.0, ""
        self._start, self._written = 0.0, -PERIOD

    def plan(self, weights: Iterable[float]) -> None:
        """What is to come, as the cost of each case relative to the others."""
        held = list(weights)
        self.total, self.count = sum(held), len(held)
        self.begun, self.done, self.weight = 0, 0.0, 0.0

    def begin(self, case: str, weight: float = 1.0) -> None:
        """The case before has ended and this one begins."""
        if self.begun == 0:
            self._start = self.now()
        self.done += self.weight
        self.begun, self.weight, self.case = self.begun + 1, weight, case
        if self.live:
            self._rewrite(self._line(""))
        else:
            self.stream.write(self._line("") + "\n")
            self.stream.flush()

    def tell(self, way: str) -> None:
        """What is measured next, on a terminal alone."""
        if self.live and self.now() - self._written >= PERIOD:
            self._rewrite(self._line(way))

    def clear(self) -> None:
        """Empty the line on a terminal, before something else is printed."""
        if self.live:
            self.stream.write(CLEAR)
            self.stream.flush()

    def left(self) -> float | None:
        """Seconds that the rest takes, by what the cases so far took; None before one has ended."""
        if not self.done or self.begun > self.count:
            return None
        passed = self.now() - self._start
        return max(self.total * passed / self.done - passed, 0.0)

    def _line(self, way: str) -> str:
        of = f"{self.begun} of {self.count}" if self.count else str(self.begun)
        parts = [f"{self.name}: {of}", self.case, way, _time(self.now() - self._start)]
        left = self.left()
        parts += [f"about {_time(left)} left"] if left is not None else []
        return ", ".join(part for part in parts if part)

    def _rewrite(self, line: str) -> None:
        wide = shutil.get_terminal_size().columns - 1
        self.stream.write(CLEAR + line[:wide])
        self.stream.flush()
        self._written = self.now()


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class _Clearing(io.TextIOBase):
    """stdout of a terminal: what is printed there takes the place of the line."""

    def __init__(self, progress: Progress, stream: TextIO) -> None:
        self.progress, self.stream = progress, stream

    def write(self, text: str) -> int:
        self.progress.clear()
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def shown(name: str, out: TextIO, stream: TextIO) -> Iterator[Progress]:
    """Inside the block a benchmark tells its progress.

    Args:
        name: of the benchmark.
        out: stdout.
        stream: stderr.
    """
    progress = Progress(name, stream)
    before = _shown.set(progress)
    try:
        with contextlib.ExitStack() as stack:
            if progress.live and out.isatty():
                stack.enter_context(contextlib.redirect_stdout(_Clearing(progress, out)))
            yield progress
    finally:
        progress.clear()
        _shown.reset(before)


def each(
    cases: Iterable[T],
    name: Callable[[T], str] = str,
    weight: Callable[[T], float] = lambda _: 1.0,
) -> Iterator[T]:
    """The cases in turn, and tell which one begins.

    Args:
        cases: all of the run.
        name: what a case is called.
        weight: its cost relative to the others.
    """
    held = list(cases)
    plan(map(weight, held))
    for case in held:
        begin(name(case), weight(case))
        yield case


def plan(weights: Iterable[float]) -> None:
    """See `Progress.plan`; nothing outside `shown`."""
    if (progress := _shown.get()) is not None:
        progress.plan(weights)


def begin(case: str, weight: float = 1.0) -> None:
    """See `Progress.begin`; nothing outside `shown`."""
    if (progress := _shown.get()) is not None:
        progress.begin(case, weight)


def tell(way: str) -> None:
    """See `Progress.tell`; nothing outside `shown`."""
    if (progress := _shown.get()) is not None:
        progress.tell(way)
