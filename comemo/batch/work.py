"""What every rank does: answer the lines that a plan deals to it, and write each answer at once."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from comemo.batch.answering import Answerer, Result, describe, group_of
from comemo.batch.earlier import full_digest
from comemo.batch.parts import PartWriter, Plan, RunFolder
from comemo.batch.ranks import Rank
from comemo.batch.requests import Request, RequestLines, parse_line, read_request
from comemo.batch.settings import BatchSettings

# Model, processor and store (or None); called where there is something to answer.
Load: TypeAlias = Callable[[], tuple[Any, Any, Any]]
Tell: TypeAlias = Callable[[str], None]


class Work:
    """The work of a rank.

    Args:
        folder: of the run.
        lines: the requests.
        settings: of the run.
        rank: that works.
        tell: takes a line for the user.
    """

    def __init__(
        self,
        folder: RunFolder,
        lines: RequestLines,
        settings: BatchSettings,
        rank: Rank,
        tell: Tell,
    ) -> None:
        self.folder, self.lines, self.settings, self.rank = folder, lines, settings, rank
        self.tell = tell
        self._digest, self._root = settings.digest(), settings.root or lines.path.parent
        self._ids: dict[int, Any] = {}  # of lines that are not finished

    def do(self, plan: Plan, load: Load, done: Callable[[Result], None]) -> None:
        """Answer the lines of this rank. The end mark of its part says why it failed, if it did.

        Args:
            plan: of the run.
            load: see `answer_file`; not called without lines.
            done: called with each result after it is written.

        Raises:
            Exception: what says nothing about a single request.
        """
        own = plan.lines[self.rank.index]
        part = PartWriter(self.folder.part(plan.token, self.rank.index))
        try:
            if own:
                model, processor, store = load()
                with (
                    self.lines.opened() as read,
                    Answerer(model, processor, self.settings, store) as answerer,
                ):
                    for result in self._results(own, answerer, read):
                        part.write(self._entry(result, read(result.line)))
                        done(result)
            part.end()
        except Exception as error:  # of any kind: the first rank reports it
            part.end(describe(error))
            raise
        finally:
            part.close()

    def _results(
        self, own: list[int], answerer: Answerer, read: Callable[[int], bytes]
    ) -> Iterator[Result]:
        """Results of all lines of this rank. Bad lines come where they are read."""
        bad: list[Result] = []

        def requests() -> Iterator[Request]:
            for number in own:
                try:
                    yield self._request(read(number), number)
                except ValueError as error:
                    bad.append(Result(number, error=describe(error)))

        groups = group_requests(requests(), self.settings.batch)
        group = next(groups, None)
        while group is not None:
            following = next(groups, None)
            yield from answerer.answer(group, following or ())
            yield from bad
            bad.clear()
            group = following
        yield from bad

    def _request(self, line: bytes, number: int) -> Request:
        item, own = parse_line(line), self.settings
        if "id" in item:
            self._ids[number] = item["id"]
        return read_request(item, number, self._root, own.options, own.system)

    def _entry(self, result: Result, line: bytes) -> dict[str, Any]:
        """The line of the output; an error is told too."""
        number = result.line
        entry = {"line": number, "digest": full_digest(line, self._digest)}
        if number in self._ids:
            entry["id"] = self._ids.pop(number)
        if result.error is None:
            return entry | {"answer": result.answer, "tokens": result.tokens}
        self.tell(f"{self.lines.path}:{number}: {result.error}")
        return entry | {"error": result.error}


def group_requests(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """Batches of requests that may share one; those that may not come alone.

    Args:
        requests: in any order.
        size: of a batch. At most four times as many wait for others of their kind.
    """
    waiting: dict[Any, list[Request]] = {}
    for request in requests:
        key = group_of(request)
        if key is None:
            yield [request]
            continue
        waiting.setdefault(key, []).append(request)
        if len(waiting[key]) == size:
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) >= 4 * size:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()
