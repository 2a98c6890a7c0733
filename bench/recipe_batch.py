"""A packed batch of training as the loader makes it, with random words and pixels."""

import itertools
import random
from typing import Any

import torch

import comemo_kernels as ops
from comemo.config import CoMemoConfig
from comemo_kernels.grids import Grid

GRIDS: tuple[Grid, ...] = ((1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3))
ANSWER = 0.3  # share of a sample's words that are labels: instructions and answers, as in chats


def draw_batch(config: CoMemoConfig, tokens: int, tiles: int, samples: int) -> dict[str, Any]:
    """One pack with exactly so many tokens and tiles; the same arguments give the same pack.

    Args:
        config: of the model; `image_token_id` is set.
        tokens: of the row.
        tiles: thumbnails included; they need `tiles` * tokens per tile of the row.
        samples: each has at least one image while there are tiles.
    """
    draw = random.Random(f"{tokens} {tiles} {samples}")
    images: list[list[Grid]] = [[] for _ in range(samples)]
    left = tiles
    for index in itertools.cycle(range(samples)):
        if not left:
            break
        fitting = [grid for grid in GRIDS if _tiles(grid) <= left - max(0, samples - index - 1)]
        images[index].append(draw.choice(fitting or [(1, 1)]))
        left -= _tiles(images[index][-1])
    per_tile, words = config.tokens_per_tile, tokens - tiles * config.tokens_per_tile
    shares = [draw.uniform(0.5, 1.5) for _ in images]
    ends = [round(words * x / sum(shares)) for x in itertools.accumulate(shares)]
    generator = torch.Generator().manual_seed(0)
    ids, labels, weights, bounds = [], [], [], [0]
    for held, count in zip(images, (b - a for a, b in itertools.pairwise([0, *ends])), strict=True):
        own = torch.randint(3, 400, (count,), generator=generator)
        marked = torch.full_like(own, -100)
        answer = max(1, round(ANSWER * count))
        marked[-answer:] = own[-answer:]
        pixels = sum(map(_tiles, held)) * per_tile
        image = torch.full((pixels,), config.image_token_id or 0)
        ids += [own[:8], image, own[8:]]
        labels += [marked[:8], torch.full_like(image, -100), marked[8:]]
        weights += [torch.full((count + pixels,), answer**-0.5)]
        bounds.append(bounds[-1] + count + pixels)
    label_row = torch.cat(labels)[None]
    size = config.vision_config.image_size[0]
    return {
        "input_ids": torch.cat(ids)[None],
        "labels": label_row,
        "loss_weights": torch.cat(weights)[None] * (label_row != -100),
        "cu_seqlens": bounds,
        "pixel_values": torch.randn(tiles, 3, size, size, generator=generator),
        "tile_grid": [grid for held in images for grid in held],
    }


def tiles_of_samples(batch: dict[str, Any], per_tile: int, image_id: int) -> list[int]:
    """Tiles of each sample."""
    image = batch["input_ids"][0] == image_id
    bounds = batch["cu_seqlens"]
    return [int(image[a:b].sum()) // per_tile for a, b in itertools.pairwise(bounds)]


def _tiles(grid: Grid) -> int:
    return ops.image_tokens(grid, 1)
