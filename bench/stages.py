"""Commands that share a time limit, each in a process group that is ended as a whole."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import ROOT

GRACE = 5.0  # seconds from an interrupt to a kill, in which pytest prints its summary
STEP = 5.0  # seconds between two reports
CACHES = Path(tempfile.gettempdir()) / "comemo-caches"  # shared with later commands


@dataclass
class Stage:
    """A command, its share of the time in seconds, and its outcome."""

    name: str
    command: list[str]
    seconds: float
    waits: bool = False  # for a line on stdin before it starts measuring
    outcome: str = "not run: no time left"
    took: float = 0.0

    @property
    def failed(self) -> bool:
        return self.outcome.startswith("failed")

    @property
    def log(self) -> str:
        """Name of the file with its output."""
        return f"{self.name}.log".replace(" ", "-")


class Process:
    """A stage's command and its child processes."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        """Start the command; its output goes to a file in the folder."""
        # No session of its own, if possible, so that ending our session ends it, too.
        group: Any = {"process_group": 0}
        if sys.version_info < (3, 11):
            group = {"start_new_session": True}
        self.stage = stage
        with (folder / stage.log).open("wb") as log:
            self._process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.PIPE if stage.waits else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **group,
            )

    def begin(self) -> None:
        """Let a stage that `waits` start measuring."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # the process has ended already
                self._process.stdin.write(b"\n")
                self._process.stdin.close()

    def code(self) -> int | None:
        """Exit code; None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """End the command and its child processes."""
        if self.code() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):  # the group has ended already
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def environment() -> dict[str, str]:
    """Environment of stages: this source tree, and common caches of compiled kernels."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    ours = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(CACHES / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHES / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    return {name: word for name, word in os.environ.items() if name != "TRITON_INTERPRET"} | ours


def share(stages: Sequence[Stage], minutes: float) -> None:
    """Scale the stages' seconds so that they sum to `minutes`."""
    whole = sum(stage.seconds for stage in stages)
    for stage in stages:
        stage.seconds *= 60 * minutes / whole


def run_in_turn(stages: Sequence[Stage], folder: Path, report: Callable[[], None]) -> None:
    """Run stages one after the other; each has its share of time and what earlier ones left over.

    While a stage runs, the next one is started if it `waits`: it imports its packages meanwhile.

    Args:
        stages: in this order.
        folder: for their output.
        report: called every few seconds and after each stage, to write the results so far.
    """
    began, due = time.monotonic(), 0.0
    next_process: Process | None = None
    try:
        for stage, following in itertools.zip_longest(stages, stages[1:]):
            due += stage.seconds
            left = due - (time.monotonic() - began)
            process, next_process = next_process, None
            if left < 2 * GRACE:
                if process is not None:
                    process.end()
                continue
            process = process or Process(stage, folder)
            next_process = Process(following, folder) if following and following.waits else None
            run_together([process], left - GRACE, report)
    finally:
        if next_process is not None:
            next_process.end()


def run_together(processes: Sequence[Process], limit: float, report: Callable[[], None]) -> None:
    """Run processes in parallel for at most `limit` seconds, then end them."""
    began = reported = time.monotonic()
    running = list(processes)
    try:
        for process in running:
            process.begin()
        while running and time.monotonic() - began < limit:
            time.sleep(0.05)
            for process in [p for p in running if p.code() is not None]:
                running.remove(process)
                code, process.stage.took = process.code(), time.monotonic() - began
                process.stage.outcome = "passed" if code == 0 else f"failed, exit code {code}"
            if time.monotonic() - reported > STEP:
                reported = time.monotonic()
                report()
        for process in running:
            process.stage.outcome = f"out of time after {limit:.0f} s"
            process.stage.took = limit
    finally:
        for process in processes:
            process.end()
        report()


@contextlib.contextmanager
def stopped_in_order() -> Iterator[None]:
    """Inside the block SIGTERM exits by an exception, so that child processes are ended, too."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def describe(command: str, machine: dict[str, Any], stages: Sequence[Stage]) -> str:
    """A line for the machine, and one for each stage: seconds and outcome."""
    known = "  ".join(
        f"{key} {machine[key]}" for key in ("gpu", "torch", "triton", "commit", "date")
    )
    width = max(len(stage.name) for stage in stages)
    lines = [f"{stage.name:{width}}  {stage.took:5.1f} s  {stage.outcome}" for stage in stages]
    return "\n".join([f"{command}  {known}", *lines])


def reasons(stages: Sequence[Stage], folder: Path) -> list[tuple[str, list[str]]]:
    """For each failed stage a title and its errors, or its last lines if it names no error."""
    found = []
    for stage in stages:
        if stage.failed:
            lines = read_log(stage, folder)
            errors = Counter(line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line))
            shown = [f"{count}x {line}" for line, count in errors.most_common()] or lines[-8:]
            found.append((f"why {stage.name} failed:", [line[:200] for line in shown]))
    return found


def read_log(stage: Stage, folder: Path) -> list[str]:
    """The lines that a stage has printed so far."""
    log = folder / stage.log
    return log.read_text(errors="replace").splitlines() if log.is_file() else []


def write_whole(file: Path, text: str) -> None:
    """Write a text file atomically."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.replace(file)


def write_archive(file: Path, folder: Path) -> None:
    """Write all files of a folder to an archive, atomically."""
    part = file.with_name(f"{file.name}.part")
    with tarfile.open(part, "w:gz") as archive:
        for held in sorted(folder.rglob("*")):
            if held.is_file() and held.suffix != ".part":
                archive.add(held, held.relative_to(folder))
    part.replace(file)


def join_logs(file: Path, stages: Sequence[Stage], folder: Path) -> None:
    """Write the output of all stages to one file."""
    lines = []
    for stage in stages:
        lines += [f"--- {stage.name}: {' '.join(stage.command)}", *read_log(stage, folder)]
    write_whole(file, "\n".join(lines) + "\n")
