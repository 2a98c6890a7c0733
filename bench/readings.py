"""Cases of attention over the image memory, by name: which queries read which images."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

import comemo_kernels as ops
from bench.cases import PROMPTS, Prompt
from comemo_kernels.grids import Grid

IMAGE: Grid = (4, 3)  # 13 tiles with its thumbnail, 3,328 tokens
BEFORE, PER_IMAGE = 64, 292  # ids before the first image; ids of an image and the text after it


@dataclass(frozen=True)
class Reading:
    """Samples, each with a number of queries and the images that they read."""

    samples: tuple[tuple[int, tuple[Grid, ...]], ...]
    packed: bool = False  # samples are packed into one row; otherwise each is a row
    shared: bool = False  # all samples read the images of the first

    @classmethod
    def of(cls, prompt: Prompt) -> "Reading":
        """A packed row: every token reads the images of its own sample."""
        samples = tuple(
            (before + sum(ops.image_tokens(grid) + after for grid in grids), tuple(grids))
            for before, grids, after in prompt.samples
        )
        return cls(samples, packed=True)

    @property
    def queries(self) -> int:
        """Queries of all rows."""
        return sum(count for count, _ in self.samples)

    @property
    def shape(self) -> tuple[int, int]:
        """B, N."""
        return (1, self.queries) if self.packed else (len(self.samples), self.samples[0][0])

    @property
    def grids(self) -> list[Grid]:
        """Grids of the images in the memory."""
        samples = self.samples[:1] if self.shared else self.samples
        return [grid for _, grids in samples for grid in grids]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each image."""
        return [ops.image_tokens(grid) for grid in self.grids]

    @property
    def lengths(self) -> list[int]:
        """Keys that each sample reads."""
        return [sum(ops.image_tokens(grid) for grid in grids) for _, grids in self.samples]

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs."""
        return sum(n * m for (n, _), m in zip(self.samples, self.lengths, strict=True))

    @property
    def uniform(self) -> bool:
        """Whether SDPA can process the batch without a mask."""
        return not self.packed and len(set(self.lengths)) == 1

    @property
    def decoding(self) -> bool:
        return not self.packed and self.samples[0][0] == 1

    def positions(self, device: str) -> Tensor:
        """Ids of the queries [B, N]: after the images for a decode step, otherwise 0, 1, ..."""
        if self.decoding:
            rows = [[BEFORE + PER_IMAGE * len(grids)] for _, grids in self.samples]
            return torch.tensor(rows, device=device)
        parts = [torch.arange(count, device=device) for count, _ in self.samples]
        return torch.cat(parts).view(self.shape)

    def ranges(self) -> list[tuple[int, int]]:
        """Keys [start, end) of each sample."""
        if self.shared:
            return [(0, self.lengths[0])] * len(self.samples)
        ends = list(itertools.accumulate(self.lengths))
        return [(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def spans(self, device: str) -> Tensor:
        """int64 [B, 1, 2], or [1, N, 2] of a packed row, like the model's image memory."""
        spans = torch.tensor(self.ranges(), device=device)
        if not self.packed:
            return spans[:, None]
        counts = torch.tensor([count for count, _ in self.samples], device=device)
        return spans.repeat_interleave(counts, 0)[None]

    def places(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Place [M] of each key in its image; first key [I], bias [1, I] of each image; int32."""
        found = [ops.image_position_ids(grid) for grid in self.grids]
        ids = torch.cat(found).int() if found else torch.zeros(0, dtype=torch.int32)
        starts = [0, *itertools.accumulate(self.sizes)][:-1]
        samples = self.samples[:1] if self.shared else self.samples
        biases = [BEFORE + PER_IMAGE * i for _, grids in samples for i in range(len(grids))]
        starts, biases = (
            torch.tensor(t, dtype=torch.int32, device=device) for t in (starts, [biases])
        )
        return ids.to(device), starts, biases


def _prompt(queries: int, images: int) -> Reading:
    return Reading(((queries, (IMAGE,) * images),))


def _batch(rows: int, shared: bool = False) -> Reading:
    return Reading(((1, (IMAGE,)),) * rows, shared=shared)


RAGGED: tuple[Grid, ...] = ((4, 3), (2, 2), (3, 2), (1, 1), (3, 3), (4, 3), (2, 1), (1, 1))
READINGS = {
    "decode_1": _batch(1),
    "decode_8": _batch(8),
    "prefill_8k_13k": _prompt(8192, 4),
    "few_256_13k": _prompt(256, 4),
    "pack_16k": Reading.of(PROMPTS["pack_16k"]),
    "decode_32": _batch(32),
    "decode_8_shared": _batch(8, shared=True),
    "decode_32_shared": _batch(32, shared=True),
    "decode_8_ragged": Reading(tuple((1, (grid,)) for grid in RAGGED)),
    "few_500_40k": _prompt(500, 12),
    "few_256_40k": _prompt(256, 12),
    "few_500_13k": _prompt(500, 4),
    "prefill_2k_3k": _prompt(2048, 1),
    "prefill_2k_13k": _prompt(2048, 4),
    "prefill_2k_40k": _prompt(2048, 12),
    "prefill_8k_3k": _prompt(8192, 1),
    "prefill_8k_40k": _prompt(8192, 12),
    "prefill_16k_3k": _prompt(16384, 1),
    "prefill_16k_13k": _prompt(16384, 4),
    "prefill_16k_40k": _prompt(16384, 12),
}
SMALL = {  # for a CPU
    "small_pack": Reading(((40, ((1, 1),)), (24, ()), (64, ((2, 1),))), packed=True),
    "small_prompt": Reading(((48, ((1, 1), (1, 1))),)),
    "small_decode": Reading(((1, ((1, 1),)),) * 2),
    "small_shared": Reading(((1, ((2, 1),)),) * 3, shared=True),
    "small_ragged": Reading(((1, ((1, 1),)), (1, ((2, 1),)))),
}
