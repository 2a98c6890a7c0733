"""Packing: which samples share a row."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(eq=False)  # lists are searched for the pack itself
class Pack(Generic[Item]):
    """Samples that share a row.

    Attributes:
        items: of the samples, in the order in which they came.
        tokens, tiles: how many they have.
    """

    items: list[Item] = field(default_factory=list)
    tokens: int = 0
    tiles: int = 0


class Packer(Generic[Item]):
    """Fills packs, several at the same time.

    A sample goes to the first pack that has room for it, the one with most tiles first, of equal
    ones the older first; else it begins a pack. A pack is given out when its tiles or its tokens
    are as many as fit, or, the fullest in tiles and then in tokens, when more than `buffer` packs
    are open. No sample is split.

    Args:
        max_tokens, max_tiles: the most of a pack.
        buffer: packs that stay open.
    """

    def __init__(self, max_tokens: int, max_tiles: int, buffer: int):
        self.max_tokens, self.max_tiles, self.buffer = max_tokens, max_tiles, buffer
        self.open: list[Pack[Item]] = []  # oldest first

    def add(self, item: Item, tokens: int, tiles: int) -> list[Pack[Item]]:
        """Put a sample into a pack.

        Args:
            item: the sample.
            tokens, tiles: its size, at most that of a pack.

        Returns:
            Packs that are given out.
        """
        best: Pack[Item] | None = None
        for pack in self.open:
            fits = pack.tokens + tokens <= self.max_tokens and pack.tiles + tiles <= self.max_tiles
            if fits and (best is None or pack.tiles > best.tiles):
                best = pack
        if best is None:
            best = Pack()
            self.open.append(best)
        best.items.append(item)
        best.tokens += tokens
        best.tiles += tiles
        # without tiles in any sample, no tiles are not many
        if best.tokens == self.max_tokens or best.tiles == self.max_tiles > 0:
            self.open.remove(best)
            return [best]
        if len(self.open) > self.buffer:
            return [self._take_fullest()]
        return []

    def flush(self) -> list[Pack[Item]]:
        """Give out all packs, the fullest first."""
        return [self._take_fullest() for _ in range(len(self.open))]

    def _take_fullest(self) -> Pack[Item]:
        fullest = max(self.open, key=lambda pack: (pack.tiles, pack.tokens))
        self.open.remove(fullest)
        return fullest
