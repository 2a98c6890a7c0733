"""Pictures of up to seven coloured shapes, and what the frozen vision tower makes of them.

A picture is drawn, cut into tiles and encoded once. All configurations and seeds read the same
file, so no training runs the tower.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from comemo import CoMemoForConditionalGeneration
from comemo.image_processor import CoMemoImageProcessor
from comemo.nano.drawing import draw
from comemo.nano.scenes import GROUNDS, SEEDS, Item, Place, Scene
from comemo.nano.words import COLOURS, SHAPES
from comemo_kernels import fold_tiles

COUNTS = {1: (1, 1), 2: (2, 4), 3: (4, 7)}  # side of a picture -> fewest and most shapes
ROUND = 32  # pictures that are drawn and encoded together


class Wanted(NamedTuple):
    """A picture to draw.

    Attributes:
        seed, side, count: of `make_shapes`.
        tiles: at most; two or more get a thumbnail in addition.
    """

    seed: int
    side: int
    count: int | None
    tiles: int


class Pictures(NamedTuple):
    """Encoded pictures.

    Attributes:
        scenes: what is in each.
        grids: (cols, rows) of the tiles of each.
        features: float16 [tiles of all, tokens a tile, channels], before the projector.
        starts: the first tile of each, and at last the number of tiles.
    """

    scenes: list[Scene]
    grids: list[tuple[int, int]]
    features: Tensor
    starts: list[int]

    def tokens(self, index: int) -> Tensor:
        """Features [image tokens, channels] of a picture."""
        return self.features[self.starts[index] : self.starts[index + 1]].flatten(0, 1)

    def count(self, index: int) -> int:
        """Image tokens of a picture."""
        return (self.starts[index + 1] - self.starts[index]) * self.features.shape[1]


def make_shapes(seed: int, side: int = 2, count: int | None = None) -> Scene:
    """A square picture of shapes of any colour, no shape twice.

    Args:
        seed: in one of `SEEDS`.
        side: 1 to 3: the picture has `side` x `side` places.
        count: of shapes; None for any number of `COUNTS`.

    Raises:
        ValueError: a seed outside `SEEDS`, another side, or more shapes than there are.
    """
    if not any(seed in seeds for seeds in SEEDS.values()):
        raise ValueError(f"make_shapes: the seed must be in one of {SEEDS}, got {seed!r}")
    if side not in COUNTS or not (count is None or 1 <= count <= COUNTS[side][1]):
        raise ValueError(f"make_shapes: side and count must fit {COUNTS}, got {side}, {count}")
    random = Random(f"shapes {seed} {side}")
    places: list[Place] = [(row, col) for row in range(side) for col in range(side)]
    count = random.randint(*COUNTS[side]) if count is None else count
    scene = Scene(seed, "objects", "square", random.choice(GROUNDS), side=side)
    chosen = sorted(random.sample(places, count))
    for place, shape in zip(chosen, random.sample(SHAPES, count), strict=True):
        scene.items[place] = Item("shape", shape, random.choice(list(COLOURS)))
    return scene


def write_pictures(file: Path, checkpoint: Path, wanted: Sequence[Wanted]) -> None:
    """Draw and encode pictures and write them for `read_pictures`.

    Args:
        file: appears when it is whole.
        checkpoint: whose vision tower encodes.
        wanted: the pictures.
    """
    torch.set_num_threads(1)
    model = CoMemoForConditionalGeneration.from_pretrained(checkpoint).eval()
    config = model.config
    processor = CoMemoImageProcessor(input_size=config.force_image_size)
    grids, parts, starts = [], [], [0]
    for first in range(0, len(wanted), ROUND):
        tiles = []
        for picture in wanted[first : first + ROUND]:
            scene = make_shapes(picture.seed, picture.side, picture.count)
            cut = processor(draw(scene), max_num=picture.tiles)
            tiles.append(cut["pixel_values"])
            grids.append(tuple(cut["tile_grid"][0].tolist()))
            starts.append(starts[-1] + len(tiles[-1]))
        with torch.no_grad():
            x = model.get_image_features(torch.cat(tiles)).last_hidden_state[:, 1:]
        x = x.unflatten(1, (round(x.shape[1] ** 0.5), -1))
        x = fold_tiles(x, config.downsample_ratio, config.ps_version)
        parts.append(x.flatten(1, 2).half())
    whole = {
        "made": [tuple(picture[:3]) for picture in wanted],
        "grids": grids,
        "features": torch.cat(parts),
        "starts": starts,
    }
    partial = file.with_suffix(".partial")
    torch.save(whole, partial)
    partial.replace(file)


def read_pictures(file: Path) -> Pictures:
    """Pictures of `write_pictures`; features stay on the disk until they are used."""
    whole = torch.load(file, mmap=True)
    scenes = [make_shapes(*made) for made in whole["made"]]
    return Pictures(scenes, whole["grids"], whole["features"], whole["starts"])
