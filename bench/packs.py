"""Cases of training: rows that are packed from samples of uneven lengths, and dense rows."""

import itertools
import random

import comemo_kernels as ops
from bench.cases import TOKENS_PER_TILE
from bench.readings import Reading
from comemo_kernels.grids import Grid

TILES = 48  # of a pack at most, except where every sample has a picture
GRIDS: tuple[Grid, ...] = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3))  # 1 to 13 tiles
PICTURES = ("one", "many", "none")  # of a sample: one, as many as fit into the pack, none


def draw_pack(tokens: int, samples: int, pictures: str, tiles: int = TILES) -> Reading:
    """A packed row; the same arguments give the same row.

    Args:
        tokens: of the row.
        samples: of uneven lengths, so that blocks of queries straddle them.
        pictures: "one" picture of each sample; "many", drawn until no tile is left, each for any
            sample, so that some have several and some none; "none".
        tiles: of all pictures, but at least one of each sample for "one".
    """
    draw = random.Random(f"{tokens} {samples} {pictures}")
    shares = [draw.uniform(0.25, 1.75) for _ in range(samples)]
    ends = [round(tokens * x / sum(shares)) for x in itertools.accumulate(shares)]
    counts = [end - start for start, end in itertools.pairwise([0, *ends])]
    images: list[list[Grid]] = [[] for _ in counts]
    if pictures == "one":
        fitting = _fitting(tiles // samples)
        for held in images:
            held.append(fitting[-1] if samples == 1 else draw.choice(fitting))
    left = tiles if pictures == "many" else 0
    while left:
        # Two pictures of each sample fit, and one tile always does.
        grid = draw.choice(_fitting(min(left, max(1, tiles // (2 * samples)))))
        draw.choice(images).append(grid)
        left -= _tiles(grid)
    return Reading(tuple(zip(counts, map(tuple, images), strict=True)), packed=True)


def dense_of(pack: Reading) -> Reading:
    """One sample with one picture and as many pairs of query and key, to less than one query."""
    tiles = round(pack.pairs / pack.queries / TOKENS_PER_TILE)
    tiles = max(1, tiles) if tiles != 2 else 3  # a picture of two tiles gets a thumbnail
    grid = (1, 1) if tiles == 1 else (tiles - 1, 1)
    return Reading(((round(pack.pairs / tiles / TOKENS_PER_TILE), (grid,)),))


def _tiles(grid: Grid) -> int:
    return ops.image_tokens(grid) // TOKENS_PER_TILE


def _fitting(tiles: int) -> list[Grid]:
    return [grid for grid in GRIDS if _tiles(grid) <= max(1, tiles)]


PACKS = {
    f"{name}_{samples}_{pictures}": draw_pack(tokens, samples, pictures)
    for name, tokens in (("4k", 4096), ("16k", 16384))
    for samples in (1, 8, 64)
    for pictures in PICTURES
}
SMALL_PACKS = {  # for a CPU
    f"{name}_{samples}_{pictures}": draw_pack(tokens, samples, pictures, tiles)
    for name, tokens, tiles in (("96", 96, 3), ("1k", 1024, 8))
    for samples in (1, 8)
    for pictures in PICTURES
}
