"""From weights of image tokens to a map over the picture.

Letters: M tokens of an image, S tokens along the side of a tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from comemo.config import CoMemoConfig
from comemo.images import Grid
from comemo_kernels import image_tokens


class PictureHeat(NamedTuple):
    """How much weight is where on a picture; cell (y, x) covers the same share of it as any other.

    Attributes:
        cells: [..., rows * S, cols * S], tiles and thumbnail together; the sum is that of the
            weights.
        tiles: the same of the tiles alone.
        thumbnail: the same of the thumbnail alone; zeros without one.
    """

    cells: Tensor
    tiles: Tensor
    thumbnail: Tensor

    @property
    def on_tiles(self) -> Tensor:
        """[...], weight on tiles."""
        return self.tiles.sum((-2, -1))

    @property
    def on_thumbnail(self) -> Tensor:
        """[...], weight on the thumbnail."""
        return self.thumbnail.sum((-2, -1))


def heat_over_picture(weights: Tensor, grid: Grid, config: CoMemoConfig) -> PictureHeat:
    """Put the weights of one image's tokens where the tokens are in the picture.

    Tiles are in the sequence row by row, whatever `config.tile_order` says: that is about position
    ids. A cell of the thumbnail covers cols x rows cells of the tiles, which share its weight.

    Args:
        weights: floating point [..., M], of the tokens of one image in their order.
        grid: (cols, rows) of its tiles.
        config: of the model; its `side`, `use_thumbnail` and `ps_version` are used.

    Returns:
        The map, in the dtype of the weights.

    Raises:
        ValueError: weights of another number of tokens, or a grid that is not positive.
    """
    (cols, rows), side = (int(n) for n in grid), config.side
    if min(cols, rows) < 1:
        raise ValueError(f"heat_over_picture: grid must be (cols, rows) above 0, got {grid}")
    tokens = image_tokens((cols, rows), side, config.use_thumbnail)
    if weights.shape[-1:] != (tokens,) or not weights.is_floating_point():
        raise ValueError(
            f"heat_over_picture: weights must be floating point [..., {tokens}] for a grid of"
            f" {cols} x {rows}, got {weights.dtype} {tuple(weights.shape)}"
        )
    by_tile = weights.unflatten(-1, (-1, side, side))
    if config.ps_version == "v1":  # such tokens are in the transposed order
        by_tile = by_tile.transpose(-2, -1)
    whole = by_tile[..., : cols * rows, :, :].unflatten(-3, (rows, cols))
    tiles = whole.transpose(-3, -2).flatten(-4, -3).flatten(-2)  # [..., rows * S, cols * S]
    thumbnail = torch.zeros_like(tiles)
    if by_tile.shape[-3] > cols * rows:
        small = by_tile[..., -1, :, :] / (cols * rows)
        thumbnail = small.repeat_interleave(rows, -2).repeat_interleave(cols, -1)
    return PictureHeat(tiles + thumbnail, tiles, thumbnail)
