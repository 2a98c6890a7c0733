"""What a cache holds, token by token: enough to tell how much of it a new prompt can go on from.

Keys and values of a token depend on all tokens before it, on where it and they stand, and on which
pictures they see. A transcript notes these, one column a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NOBODY = -1  # pictures that a token sees in a conversation without any: its mixin layers are passed


@dataclass(frozen=True)
class Transcript:
    """Columns of N tokens.

    Attributes:
        columns: int64 [5, N] on the CPU. Rows: the token's id, or -1 - the number of its picture;
            its position id; where its mixin queries stand; how many pictures it sees, or `NOBODY`;
            the length by which dynamic scaling turned it, 0 within the trained range.
    """

    columns: Tensor

    @classmethod
    def of(
        cls, tokens: Tensor, positions: Tensor, queries: Tensor, visible: Tensor, scaling: Tensor
    ) -> "Transcript":
        """From its rows, each [N] or one number for all."""
        rows = (tokens, positions, queries, visible, scaling)
        return cls(torch.stack([row.long().expand(len(tokens)) for row in rows]))

    @classmethod
    def empty(cls) -> "Transcript":
        return cls(torch.empty(5, 0, dtype=torch.long))

    def __len__(self) -> int:
        return self.columns.shape[1]

    def __add__(self, other: "Transcript") -> "Transcript":
        return Transcript(torch.cat([self.columns, other.columns], 1))

    def first(self, length: int) -> "Transcript":
        """The first `length` tokens."""
        return Transcript(self.columns[:, :length])

    def common(self, other: "Transcript") -> int:
        """How many tokens both begin with."""
        length = min(len(self), len(other))
        same = (self.columns[:, :length] == other.columns[:, :length]).all(0)
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
        """[N], pictures that each token sees."""
        return self.columns[3]
