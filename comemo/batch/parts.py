"""Files of a run beside its output: a plan, and for each rank a lock and a part with its answers.

    answers.jsonl.parts/plan.json          of the run that works now: which rank answers which lines
    answers.jsonl.parts/rank-3.lock        held as long as rank 3 lives
    answers.jsonl.parts/TOKEN-3.jsonl      its answers, in the lines of the output, and an end mark

Ranks tell each other nothing else. A lock is released by the system when its process ends, however
it ends: so a rank that was killed is told from one that is slow. TOKEN is new in every run: parts
of earlier runs are only read.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

END = "end"  # the field of an end mark: true, or the reason why the rank gave up
MOST_OPEN = 200  # files at a time; a run of many ranks that was resumed often has more
GLIMPSE = 2.0  # seconds; another rank holds a lock for an instant to see whether it is free


@dataclass(frozen=True)
class Plan:
    """What the ranks of a run agree on.

    Attributes:
        token: of the run.
        requests: digest of the file of requests.
        settings: digest of everything else that determines answers.
        lines: numbers of the lines that each rank answers.
    """

    token: str
    requests: str
    settings: str
    lines: list[list[int]]


class RunFolder:
    """The folder of a run's files.

    Args:
        output: the file of all answers; the folder is beside it.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".parts")
        self._plan = self.path / "plan.json"

    @contextlib.contextmanager
    def join(self, rank: int) -> Iterator[None]:
        """Hold the lock of a rank inside the `with` block.

        Raises:
            OSError: another process holds it, or the folder cannot be written.
        """
        lock = FileLock(self._lock(rank), timeout=GLIMPSE)
        self.path.mkdir(exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise OSError(f"RunFolder: another run writes {str(self.output)!r} now") from None
        try:
            yield
        finally:
            lock.release()

    def lives(self, rank: int) -> bool:
        """Whether a process holds the lock of a rank."""
        if not self._lock(rank).exists():
            return False
        lock = FileLock(self._lock(rank), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return True
        lock.release()
        return False

    def check_alone(self, count: int) -> None:
        """Refuse to begin where a rank of an earlier run, of more ranks, still works.

        Args:
            count: of the ranks of this run; each of them holds its own lock.

        Raises:
            OSError: names the rank.
        """
        for path in self.path.glob("rank-*.lock"):
            number = path.stem.removeprefix("rank-")
            if number.isdecimal() and int(number) >= count and self.lives(int(number)):
                raise OSError(
                    f"RunFolder: rank {number} of another run writes {str(self.output)!r} now"
                )

    def part(self, token: str, rank: int) -> Path:
        """The part of a rank in a run."""
        return self.path / f"{token}-{rank}.jsonl"

    def parts(self) -> list[Path]:
        """Parts of all runs so far."""
        return sorted(self.path.glob("*.jsonl"))

    def write_plan(self, requests: str, settings: str, lines: list[list[int]]) -> Plan:
        """Begin a run. Only the first rank may call it, inside `join`."""
        plan = Plan(secrets.token_hex(4), requests, settings, lines)
        write_whole(self._plan, [json.dumps(asdict(plan)).encode()])
        return plan

    def read_plan(self) -> Plan | None:
        """The plan of the run whose first rank lives; None if there is none."""
        if not self.lives(0):
            return None
        try:
            return Plan(**json.loads(self._plan.read_bytes()))
        except FileNotFoundError:
            return None

    def drop_plan(self) -> None:
        """End a run, or clear away what a killed one left."""
        self._plan.unlink(missing_ok=True)

    def remove(self, everything: bool) -> None:
        """Remove parts, and, if `everything`, the folder."""
        for path in self.parts():
            path.unlink(missing_ok=True)
        if everything:
            for path in (self._plan, *self.path.glob("rank-*.lock")):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is there, or a new run
                self.path.rmdir()

    def _lock(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.lock"


class PartWriter:
    """Writes the part of a rank; every line is with the system before the call returns.

    Args:
        path: of a new file.

    Raises:
        FileExistsError: another process of this rank has worked in this run.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115

    def write(self, item: dict[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(item).encode() + b"\n")

    def end(self, reason: str | None = None) -> None:
        """Write the end mark, and why the rank gives up if it does."""
        self.write({END: True if reason is None else reason})

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class PartReader:
    """Reads a file of answers as it grows.

    Args:
        path: of a part or an output, which need not exist yet.

    Attributes:
        end: what the end mark says; None before it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.end, self._offset = path, None, 0

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Offset and content of the answers since the last call.

        A last line without its end is left for the next call: it is being written, or a kill cut
        it off. Lines that hold no answer are passed over.
        """
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                start, self._offset = self._offset, self._offset + len(line)
                item = _parse(line)
                if END in item:
                    self.end = item[END]
                elif isinstance(item.get("line"), int) and isinstance(item.get("digest"), str):
                    yield start, item


def _parse(line: bytes) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return item if isinstance(item, dict) else {}


def copy_lines(places: Iterable[tuple[Path, int]]) -> Iterator[bytes]:
    """Lines of several files, in the given order.

    Args:
        places: file and offset of each line.
    """
    with contextlib.ExitStack() as stack:
        files: dict[Path, Any] = {}
        for path, offset in places:
            if path not in files:
                if len(files) == MOST_OPEN:
                    stack.close()
                    files.clear()
                files[path] = stack.enter_context(open(path, "rb"))
            files[path].seek(offset)
            yield files[path].readline()


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file that nobody sees before it is whole, nor after a failure.

    Args:
        path: replaced if it exists.
        pieces: its content.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
