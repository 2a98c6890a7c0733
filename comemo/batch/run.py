"""A run of batch inference: the first rank plans, every rank answers its lines, the first merges.

Ranks are processes that know their number and how many there are; they meet in a folder beside the
output, see `comemo.batch.parts`. A rank that fails or is killed stops no other. What a run leaves
unanswered, the next one with the same arguments answers, on any number of ranks.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from comemo.batch.answering import Result, describe
from comemo.batch.earlier import Place, check_earlier, check_output, find_kept
from comemo.batch.parts import PartReader, Plan, RunFolder, copy_lines, write_whole
from comemo.batch.ranks import Rank
from comemo.batch.requests import RequestLines, parse_line, pictures_of
from comemo.batch.settings import BatchSettings
from comemo.batch.work import Load, Tell, Work

TOGETHER = 16  # lines about the same images that one rank answers, at most
POLL = 0.1  # seconds between two looks at the files of other ranks
OFTEN = 0.5  # seconds between two such looks while this rank answers itself
SLOW = 30.0  # seconds of waiting after which ranks that still work are named

Progress: TypeAlias = Callable[[int, int], None]  # answered lines, all lines


@dataclass
class Summary:
    """How a run ended.

    Attributes:
        lines: of the requests, blank ones not counted.
        answered: lines with an answer.
        failed: lines with an error in place of an answer.
        faults: rank -> why it ended early.
    """

    lines: int
    answered: int = 0
    failed: int = 0
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Lines that the same call would answer now."""
        return self.lines - self.answered - self.failed


def answer_file(
    requests: str | Path,
    output: str | Path,
    load: Load,
    settings: BatchSettings,
    rank: Rank | None = None,
    *,
    tell: Tell | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Answer a file of requests, alone or as one of several ranks that all call it.

    The output has a JSON object for each request, in their order: `line` (from 1), `digest`, `id`
    if the request has one, and `answer` with `tokens`, or `error`. It appears when every line has
    one of both. A later call keeps what has an answer and a digest that still fits; lines that are
    new, changed or failed are answered.

    Args:
        requests: file of JSON lines, see docs/use.md.
        output: file of the answers.
        load: returns model, processor and `MemoryStore` or None.
        settings: the same on all ranks.
        rank: of this process; None for a process alone.
        tell: takes a line for the user: bad requests, ranks that are waited for or failed.
        progress: called on the first rank with the number of finished lines of all ranks, and of
            all lines.

    Returns:
        On the first rank how the run ended, with faults of all ranks; on others their own part. If
        `missing` is 0 on the first rank, the output is written, and files of the run are removed.

    Raises:
        ValueError: an output that is not ours to replace; on the first rank also what `load`
            raises, after the other ranks have ended.
        OSError: files that cannot be read or written, another run with this output.
    """
    requests, output, rank = Path(requests), Path(output), rank or Rank()
    lines, digest = RequestLines(requests), settings.digest()
    check_output(output, requests)
    folder = RunFolder(output)
    if not settings.force:
        check_earlier(folder, lines, digest)
    with folder.join(rank.index):
        work = Work(folder, lines, settings, rank, tell or _quiet)
        if not rank.is_first:
            return _follow(work, load)
        try:
            return _Lead(work, progress or _quiet).run(load)
        finally:
            folder.drop_plan()


def deal(groups: Iterable[list[int]], count: int) -> list[list[int]]:
    """Deal groups of lines to ranks: each to the one that has the fewest lines, or the first such.

    Single lines are thus dealt by turns. The model is not asked how long an answer will be, and no
    rank takes lines of another: a request that kills its process kills one rank, not all of them.

    Args:
        groups: numbers of lines that should stay together.
        count: of ranks.

    Returns:
        The lines of each rank, in the order of the groups.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    for group in groups:
        min(dealt, key=len).extend(group)
    return dealt


class _Lead:
    """What the first rank does besides its own lines.

    Args:
        work: of the first rank.
        progress: see `answer_file`.
    """

    def __init__(self, work: Work, progress: Progress) -> None:
        self.work, self.progress = work, progress
        self.folder, self.lines, self.count = work.folder, work.lines, work.rank.count
        self.places: dict[int, Place] = {}  # of finished lines of all ranks
        self.failed: set[int] = set()
        self.readers: list[PartReader] = []  # of the part of each rank
        self._looked = 0.0

    def run(self, load: Load) -> Summary:
        """Plan, answer, wait for the others, merge."""
        own = self.work.settings
        self.folder.drop_plan()
        self.folder.check_alone(self.count)
        if own.force:
            self.folder.remove(everything=False)
        else:
            for place, item in find_kept(self.folder, self.lines, own.digest()):
                if "error" not in item:
                    self.places[item["line"]] = place
        missing = [number for number in self.lines if number not in self.places]
        dealt = deal(self._groups(missing), self.count)
        plan = self.folder.write_plan(self.lines.digest, own.digest(), dealt)
        parts = [self.folder.part(plan.token, index) for index in range(self.count)]
        self.readers = [PartReader(path) for path in parts]
        summary, error = Summary(len(self.lines)), None
        try:
            self.work.do(plan, load, self._watch)
        except Exception as raised:  # whatever it is, others go on: see `_wait`
            error, summary.faults[0] = raised, describe(raised)
        summary.faults |= self._wait(dealt)
        summary.failed = len(self.failed)
        summary.answered = len(self.places) - summary.failed
        for r in sorted(summary.faults.keys() - {0}):
            self.work.tell(f"rank {r}: {summary.faults[r]}")
        if all(path == self.folder.output for path, _ in self.places.values()):
            self.folder.remove(everything=True)  # there is nothing to resume
        if error is not None:
            raise error
        if not summary.missing:
            places = [self.places[number] for number in self.lines]
            write_whole(self.folder.output, copy_lines(places))
            self.folder.remove(everything=True)
        return summary

    def _groups(self, missing: list[int]) -> Iterator[list[int]]:
        """Lines that follow each other and are about the same images, a few at a time.

        One rank then encodes them once.
        """
        most = max(1, min(TOGETHER, -(-len(missing) // (4 * self.count))))
        group, shown = list[int](), None
        with self.lines.opened() as read:
            for number in missing:
                try:
                    pictures = pictures_of(parse_line(read(number)))
                except ValueError:  # told where it is answered
                    pictures = None
                if group and (pictures is None or pictures != shown or len(group) == most):
                    yield group
                    group = []
                group, shown = [*group, number], pictures
        if group:
            yield group

    def _wait(self, dealt: list[list[int]]) -> dict[int, str]:
        """Wait until no other rank works, and say why those did not finish that did not.

        Launchers end all processes when one fails, so the first rank must be the last to end.
        """
        began, named = time.monotonic(), False
        self._refresh()
        while working := [r for r in range(1, self.count) if self._works(r, began)]:
            if not named and time.monotonic() - began > SLOW:
                left = [f"{r} ({len(self._left(dealt[r])):,} lines left)" for r in working]
                self.work.tell(f"waiting for rank {', '.join(left)}")
                named = True
            time.sleep(POLL)
            self._refresh()
        faults = {}
        for r, reader in enumerate(self.readers[1:], 1):
            if reader.end is None and reader.path.exists():
                first = self._left(dealt[r])[:1]
                where = f", its first missing line is {first[0]}" if first else ""
                faults[r] = f"ended without a word (killed?){where}"
            elif reader.end is None:
                faults[r] = f"did not begin within {self.work.settings.patience:g} s"
            elif reader.end is not True:
                faults[r] = str(reader.end)
        return faults

    def _works(self, r: int, began: float) -> bool:
        """Whether a rank still works, or may still begin."""
        reader = self.readers[r]
        if reader.end is not None:
            return False
        if self.folder.lives(r):
            return True
        if reader.path.exists():
            self._refresh()  # it may have ended between both looks
            return False
        return time.monotonic() - began < self.work.settings.patience

    def _left(self, numbers: list[int]) -> list[int]:
        return [number for number in numbers if number not in self.places]

    def _watch(self, _: Result) -> None:
        """Look at all parts from time to time while this rank answers."""
        if time.monotonic() - self._looked > OFTEN:
            self._refresh()

    def _refresh(self) -> None:
        """Find what all ranks have finished since the last look."""
        for reader in self.readers:
            for offset, item in reader.read():
                self.places[item["line"]] = reader.path, offset
                if "error" in item:
                    self.failed.add(item["line"])
        self._looked = time.monotonic()
        self.progress(len(self.places), len(self.lines))


def _follow(work: Work, load: Load) -> Summary:
    """What another rank does: the lines that the plan deals to it.

    A failure is left in its part, for the first rank to report. It is not raised: torchrun would
    end all ranks.
    """
    plan, rank = _await_plan(work), work.rank.index
    summary = Summary(len(plan.lines[rank]))

    def count(result: Result) -> None:
        summary.failed += result.error is not None
        summary.answered += result.error is None

    try:
        work.do(plan, load, count)
    except Exception as error:  # of any kind, see above
        summary.faults[rank] = describe(error)
    return summary


def _await_plan(work: Work) -> Plan:
    began, rank, patience = time.monotonic(), work.rank, work.settings.patience
    while (plan := work.folder.read_plan()) is None:
        if time.monotonic() - began > patience:
            raise OSError(
                f"answer_file: rank {rank.index} found no first rank within {patience:g} s"
            )
        time.sleep(POLL)
    for name, theirs, ours in (
        ("number of ranks", len(plan.lines), rank.count),
        ("requests", plan.requests, work.lines.digest),
        ("model or options", plan.settings, work.settings.digest()),
    ):
        if theirs != ours:
            raise ValueError(
                f"answer_file: rank {rank.index} and the first rank differ in their {name}"
            )
    return plan


def _quiet(*_: Any) -> None:
    """What nobody asked to be told."""
