"""What is wrong with samples: named, counted, told a few times."""

import errno
import logging
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

TOLD = 20  # of a kind
EXAMPLES = 3  # of a kind in a dataset

# errors of the machine, not of a file: every sample would seem bad
_MACHINE = (
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ESTALE,
    errno.ETIMEDOUT,
)

Place = tuple[str, str, int]  # dataset, file, number of the line from 1


class BadSample(Exception):
    """A sample that cannot be used.

    Attributes:
        kind: one of a few words for the sort of fault, by which faults are counted.
        message: what was wanted and what was found.
        varies: whether another reading of the line may be good, as of a video.
    """

    varies = False

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)
        self.kind, self.message = kind, message

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def is_of_machine(error: BaseException | None) -> bool:
    """Whether an error says nothing about the sample that was read."""
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in _MACHINE
    )


@dataclass
class FaultLog:
    """Bad samples so far.

    Attributes:
        counts: dataset -> kind -> number.
        examples: dataset -> kind -> the first few, as "file:line: message".
        told: kind -> file and line of those that were logged.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    examples: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    told: dict[str, set[tuple[str, int]]] = field(default_factory=dict)

    def count(self, place: Place, kind: str, message: str) -> None:
        """Count a bad sample and log nothing; see `add`."""
        dataset, file, line = place
        self._count(dataset, kind, 1)
        examples = self.examples.setdefault(dataset, {}).setdefault(kind, [])
        text = f"{file}:{line}: {message}"
        if len(examples) < EXAMPLES and text not in examples:
            examples.append(text)

    def add(self, place: Place, kind: str, message: str) -> None:
        """Count a bad sample, and log it unless its line was logged or `TOLD` of its kind were.

        Args:
            place: dataset, file and line number of the sample.
            kind, message: see `BadSample`.
        """
        self.count(place, kind, message)
        _, file, line = place
        told = self.told.setdefault(kind, set())
        if (file, line) not in told and len(told) < TOLD:
            told.add((file, line))
            more = "; more of this kind are only counted" if len(told) == TOLD else ""
            logger.warning("%s:%d: skipped, %s: %s%s", file, line, kind, message, more)

    @property
    def total(self) -> int:
        """Bad samples of all datasets and kinds."""
        return sum(sum(kinds.values()) for kinds in self.counts.values())

    def describe(self, dataset: str) -> str:
        """Counts and a first example of each kind of a dataset, as one sentence."""
        kinds = self.counts.get(dataset, {})
        parts = []
        for kind, number in kinds.items():
            first = self.examples.get(dataset, {}).get(kind, [])
            parts.append(f"{number} x {kind}" + (f" ({first[0]})" if first else ""))
        return ", ".join(parts) or "none"

    def state_dict(self) -> dict[str, Any]:
        """Counts and examples, JSON-able."""
        return {
            "counts": {name: dict(kinds) for name, kinds in self.counts.items()},
            "examples": {
                name: {kind: list(texts) for kind, texts in kinds.items()}
                for name, kinds in self.examples.items()
            },
        }

    def merge(self, state: dict[str, Any]) -> None:
        """Add what `state_dict` of another log returned."""
        for name, kinds in state["counts"].items():
            for kind, number in kinds.items():
                self._count(name, kind, number)
        for name, texts_of in state["examples"].items():
            for kind, texts in texts_of.items():
                kept = self.examples.setdefault(name, {}).setdefault(kind, [])
                kept += [text for text in texts if text not in kept][: EXAMPLES - len(kept)]

    def _count(self, dataset: str, kind: str, number: int) -> None:
        kinds = self.counts.setdefault(dataset, {})
        kinds[kind] = kinds.get(kind, 0) + number
