"""Shapes and positions of real prompts, by name."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import comemo_kernels as ops
from comemo_kernels import TEXT, ImageGrids
from comemo_kernels.grids import Grid

HEADS = {"2B": (16, 8), "9B": (32, 8)}  # of queries, of keys
HEAD_DIM = 128


class MixinSize(NamedTuple):
    """Sizes of a model's mixin layers."""

    width: int
    heads: int  # of queries and of keys
    layers: int
    wide: int  # inner width of the feed-forward network


MIXINS = {  # the first is for tests, the second for a CPU
    "tiny": MixinSize(64, 2, 2, 96),
    "small": MixinSize(512, 4, 2, 2048),
    "2B": MixinSize(2048, 16, 6, 8192),
    "9B": MixinSize(4096, 32, 8, 14336),
}
TOKENS_PER_TILE = 256


@dataclass(frozen=True)
class Prompt:
    """A row of samples; each is some text, then images with some text after each."""

    # Of each sample: tokens before the first image, grids, tokens after each image.
    samples: list[tuple[int, list[Grid], int]]
    batch: int = 1
    decoding: int | None = None  # position id of the one token, if this is a decode step
    grids: list[Grid] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", [grid for s in self.samples for grid in s[1]])

    @property
    def tokens(self) -> int:
        """Tokens of one row."""
        if self.decoding is not None:
            return 1
        return sum(
            before + sum(ops.image_tokens(grid) + after for grid in grids)
            for before, grids, after in self.samples
        )

    def image_grids(self, device: str) -> ImageGrids:
        """Grids, offsets and biases of a row's images and text."""
        entries: list[tuple[Grid, int, int]] = []
        place = 0
        for before, grids, after in self.samples:
            entries.append((TEXT, place, 0))
            place, count = place + before, before
            for grid in grids:
                entries.append((grid, place, count))
                place += ops.image_tokens(grid) + after
                count += TOKENS_PER_TILE + after
        kinds, offsets, biases = zip(*entries, strict=True)
        return ImageGrids.pack(kinds, offsets, biases, device=device)

    def position_ids(self, device: str) -> Tensor:
        """int64 [B, N]."""
        if self.decoding is not None:
            return torch.full((self.batch, 1), self.decoding, device=device)
        ids = self.image_grids(device).position_ids(self.tokens)
        return ids.expand(self.batch, -1).contiguous()

    def masks(self, device: str) -> tuple[Tensor, Tensor]:
        """Image mask and attention mask [B, N]."""
        row: list[bool] = []
        for before, grids, after in self.samples:
            row += [False] * before
            for grid in grids:
                row += [True] * ops.image_tokens(grid) + [False] * after
        image = torch.tensor(row, device=device).expand(self.batch, -1).contiguous()
        return image, torch.ones_like(image, dtype=torch.int64)


PROMPTS = {
    # A chat without images.
    "chat_1k": Prompt([(1024, [], 0)]),
    # System message and question around an image of 12 tiles and its thumbnail: 3,424 tokens.
    "one_image_3k": Prompt([(60, [(4, 3)], 36)]),
    # A training row of 16,384 tokens and 46 tiles: six samples, one of them without images.
    "pack_16k": Prompt(
        [
            (100, [(4, 3)], 300),
            (720, [], 0),
            (60, [(3, 3), (2, 1)], 96),
            (200, [(1, 1), (1, 1), (1, 1)], 156),
            (64, [(2, 2), (3, 2)], 200),
            (500, [(2, 2)], 1604),
        ]
    ),
    # A decode step of one conversation, and of 32.
    "decode_1": Prompt([], batch=1, decoding=352),
    "decode_32": Prompt([], batch=32, decoding=352),
}
