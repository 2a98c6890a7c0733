"""Segments of a buffer: each request has its tokens in one piece, so that a span can read them."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Segment:
    """Places [start, end) of a buffer, of one owner.

    Attributes:
        start, end: changed by `Segments` alone, which may move a segment.
    """

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


class Segments:
    """Which places of a buffer are taken. Holes that meet are one hole again.

    Args:
        capacity: places of the buffer.

    Attributes:
        moves: how often segments were moved: who knows their places has to look again.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.moves = capacity, 0
        self._holes = [(0, capacity)] if capacity else []  # ascending, never adjacent

    @property
    def free(self) -> int:
        """Places that nobody has, in all holes."""
        return sum(end - start for start, end in self._holes)

    def take(self, size: int) -> Segment | None:
        """A segment in the smallest hole that is large enough; None if there is none.

        Args:
            size: places, at least 1.
        """
        fitting = [hole for hole in self._holes if hole[1] - hole[0] >= size]
        if not fitting:
            return None
        start, end = min(fitting, key=lambda hole: hole[1] - hole[0])
        self._replace((start, end), (start + size, end))
        return Segment(start, start + size)

    def resize(self, segment: Segment, size: int) -> bool:
        """Move the end of a segment, if the places after it are free.

        Args:
            segment: that was taken.
            size: places it is to have, at least 1.

        Returns:
            Whether it has that size now; else nothing was changed.
        """
        end = segment.start + size
        if end > segment.end:
            after = next((hole for hole in self._holes if hole[0] == segment.end), None)
            if after is None or after[1] < end:
                return False
            self._replace(after, (end, after[1]))
        elif end < segment.end:
            self._add(end, segment.end)
        segment.end = end
        return True

    def give_back(self, segment: Segment) -> None:
        """Free a segment, which must not be used any more. Again is allowed."""
        if len(segment):
            self._add(segment.start, segment.end)
            segment.end = segment.start

    def close_holes(self, segments: Iterable[Segment], buffers: Iterable[Tensor]) -> None:
        """Move all segments to the beginning, so that the free places are one hole.

        Args:
            segments: all that are taken.
            buffers: [capacity, ...] each, whose rows move too.
        """
        place, held = 0, list(buffers)
        for segment in sorted(segments, key=lambda one: one.start):
            if segment.start != place:
                for buffer in held:
                    rows = buffer[segment.start : segment.end].clone()  # both may overlap
                    buffer[place : place + len(rows)].copy_(rows)
                segment.start, segment.end = place, place + len(segment)
            place = segment.end
        self._holes = [(place, self.capacity)] if place < self.capacity else []
        self.moves += 1

    def _replace(self, hole: tuple[int, int], rest: tuple[int, int]) -> None:
        index = self._holes.index(hole)
        self._holes[index : index + 1] = [rest] if rest[0] < rest[1] else []

    def _add(self, start: int, end: int) -> None:
        merged: list[tuple[int, int]] = []
        for first, last in sorted([*self._holes, (start, end)]):
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], last)
            else:
                merged.append((first, last))
        self._holes = merged
