"""What a KV cache holds, token by token: enough to find the prefix that a new prompt can reuse.

Keys and values of a token depend on all tokens before it, on their positions, and on the images
that they read and the positions of those. A transcript records this: a column per token, and the
images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from comemo.decode.cache import RoomyCache

NO_IMAGES = -1  # images that a token reads where there are none: mixin layers are skipped


@dataclass(frozen=True)
class Transcript:
    """Columns of N tokens, and the images that they read.

    Attributes:
        columns: int64 [5, N] on the CPU. Rows: the token's id, or -1 - the number of its image;
            its position id; the position of its mixin queries; how many images it reads, or
            `NO_IMAGES`; the length for dynamic scaling, 0 within the trained range.
        images: (number, position id of the first token) of each image. A token that reads k images
            reads the first k.
    """

    columns: Tensor
    images: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        positions: Tensor,
        queries: Tensor,
        visible: Tensor,
        scaling: Tensor,
        images: tuple[tuple[int, int], ...],
    ) -> "Transcript":
        """Make one from its rows, each [N] or one number for all."""
        rows = (tokens, positions, queries, visible, scaling)
        return cls(torch.stack([row.long().expand(len(tokens)) for row in rows]), images)

    @classmethod
    def empty(cls) -> "Transcript":
        return cls(torch.empty(5, 0, dtype=torch.long))

    def __len__(self) -> int:
        return self.columns.shape[1]

    def __add__(self, other: "Transcript") -> "Transcript":
        """Concatenate; both read the same images."""
        return Transcript(torch.cat([self.columns, other.columns], 1), self.images)

    def first(self, length: int) -> "Transcript":
        """The first `length` tokens."""
        return Transcript(self.columns[:, :length], self.images)

    def common(self, other: "Transcript") -> int:
        """Length of the common prefix: the same tokens, which read the same images."""
        length = min(len(self), len(other))
        shared = 0
        for mine, theirs in zip(self.images, other.images, strict=False):
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
        """[N], how many images each token reads."""
        return self.columns[3]


class HeldTokens:
    """A KV cache, and a transcript that never claims a token that the cache does not hold.

    Tokens are claimed when all layers hold them, and released before any layer changes. So the
    transcript is true wherever an interrupt comes. The cache may hold more.

    Args:
        layers: number of decoder layers.

    Attributes:
        cache: the KV cache.
        transcript: of the tokens that can be reused.
    """

    def __init__(self, layers: int) -> None:
        self.cache, self.transcript = RoomyCache(layers), Transcript.empty()

    def go_back(self, wanted: Transcript) -> int:
        """Keep the reusable prefix of a prompt, and return its length.

        At least one token remains to be read, because its logits begin the answer.
        """
        kept = min(self.transcript.common(wanted), len(wanted) - 1)
        self.transcript = wanted.first(kept)
        self.cache.crop_to(kept)
        return kept

    def claim(self, transcript: Transcript) -> None:
        """Record the tokens that the cache holds, at most those of `transcript`."""
        self.transcript = transcript.first(self.cache.get_seq_length())

    def fork(self) -> "HeldTokens":
        """A copy with buffers of its own."""
        other = HeldTokens(0)
        other.cache = RoomyCache.copy_of(self.cache, len(self.transcript))
        other.transcript = self.transcript
        return other
