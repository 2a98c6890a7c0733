"""What a cache holds, token by token: enough to tell how much of it a new prompt can go on from.

Keys and values of a token depend on all tokens before it, on where it and they stand, and on which
pictures they see, where. A transcript notes these: a column a token, and the pictures.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from comemo.decode.cache import RoomyCache

NOBODY = -1  # pictures that a token sees in a conversation without any: its mixin layers are passed


@dataclass(frozen=True)
class Transcript:
    """Columns of N tokens, and the pictures that they see.

    Attributes:
        columns: int64 [5, N] on the CPU. Rows: the token's id, or -1 - the number of its picture;
            its position id; where its mixin queries stand; how many pictures it sees, or `NOBODY`;
            the length by which dynamic scaling turned it, 0 within the trained range.
        pictures: (number, position id of the first token) of each picture. A token that sees k of
            them sees the first k.
    """

    columns: Tensor
    pictures: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        positions: Tensor,
        queries: Tensor,
        visible: Tensor,
        scaling: Tensor,
        pictures: tuple[tuple[int, int], ...],
    ) -> "Transcript":
        """From its rows, each [N] or one number for all."""
        rows = (tokens, positions, queries, visible, scaling)
        return cls(torch.stack([row.long().expand(len(tokens)) for row in rows]), pictures)

    @classmethod
    def empty(cls) -> "Transcript":
        return cls(torch.empty(5, 0, dtype=torch.long))

    def __len__(self) -> int:
        return self.columns.shape[1]

    def __add__(self, other: "Transcript") -> "Transcript":
        """Both behind each other; they see the same pictures."""
        return Transcript(torch.cat([self.columns, other.columns], 1), self.pictures)

    def first(self, length: int) -> "Transcript":
        """The first `length` tokens."""
        return Transcript(self.columns[:, :length], self.pictures)

    def common(self, other: "Transcript") -> int:
        """How many tokens both begin with: the same ones, that saw the same pictures."""
        length = min(len(self), len(other))
        shared = 0
        for mine, theirs in zip(self.pictures, other.pictures, strict=False):
            if mine != theirs:
                break
            shared += 1
        same = (self.columns[:, :length] == other.columns[:, :length]).all(0)
        same &= self.visible[:length] <= shared
        return int(same.long().cumprod(0).sum())

    @property
    def tokens(self) -> Tensor:
        """[N], negative at image tokens."""
        return self.columns[0]

    @property
    def positions(self) -> Tensor:
        """[N]"""
        return self.columns[1]

    @property
    def visible(self) -> Tensor:
        """[N], how many pictures each token sees."""
        return self.columns[3]


class HeldTokens:
    """A cache, and a transcript that never claims a token that the cache does not hold.

    Tokens are claimed when they are in all layers, and given up before any layer is touched: the
    transcript is true whatever interrupts, wherever. The cache may hold more.

    Args:
        layers: of the decoder.

    Attributes:
        cache: of the self-attention.
        transcript: of the tokens that can be gone on from.
    """

    def __init__(self, layers: int) -> None:
        self.cache, self.transcript = RoomyCache(layers), Transcript.empty()

    def go_back(self, wanted: Transcript) -> int:
        """Keep what a prompt can go on from; how many of its tokens that are.

        One is left to be read at least: its logits begin the answer.
        """
        kept = min(self.transcript.common(wanted), len(wanted) - 1)
        self.transcript = wanted.first(kept)
        self.cache.crop_to(kept)
        return kept

    def claim(self, transcript: Transcript) -> None:
        """Note what the cache holds, as far as it does."""
        self.transcript = transcript.first(self.cache.get_seq_length())

    def fork(self) -> "HeldTokens":
        """The same tokens in buffers of their own."""
        other = HeldTokens(0)
        other.cache = self.cache.fork(len(self.transcript))
        other.transcript = self.transcript
        return other
