"""Tile grids: number of tokens of an image, and the thumbnail cell of each token.

RoPE-DHR gives a tile token the id of the thumbnail cell that covers the same place:

    id = bias + f(j, r, rows) * S + f(i, c, cols)
    f(k, t, n) = max(S * ((S-1)*k + t) - 1, 0) // ((S-1) * n)

for tile column i, tile row j, raster row r and raster column c of the token. The thumbnail comes
last and has the ids bias + 0 .. S*S-1.
Source: CoMemo (arXiv:2506.06279); exact integers instead of the published float linspace.

Letters: S tokens along a tile's side, I images.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._op import check, check_count, to_device

Grid = tuple[int, int]  # (cols, rows) of tiles
TEXT = (-1, -1)  # instead of a grid: no image, text continues from here


@public
def image_tokens(grid: Grid, side: int = 16, thumbnail: bool = True) -> int:
    """Tokens of one image: S*S per tile, and S*S for the thumbnail if it has one.

    Args:
        grid: (cols, rows) of tiles; 0 x 0 is a video frame: one image without tiles.
        side: S.
        thumbnail: whether images of more than one tile have a thumbnail.

    Returns:
        Number of tokens, a multiple of S*S.

    Raises:
        ValueError: a negative grid or a side below 1.
    """
    tiles = check_grid("image_tokens", grid, side)
    return side * side * (tiles + 1 if thumbnail and tiles > 1 else max(tiles, 1))


def check_grid(name: str, grid: Grid, side: int) -> int:
    """Check a grid, and return its number of tiles.

    Raises:
        ValueError: naming function `name`: not a grid, a negative one, a side below 1, or 2^31
            tokens or more.
    """
    try:
        cols, rows = map(operator.index, grid) if isinstance(grid, Sequence) else (-1, -1)
    except (TypeError, ValueError):  # not integers, or not two
        cols = rows = -1
    if cols < 0 or rows < 0:
        raise ValueError(f"{name}: grid must be (cols, rows), integers of at least 0, got {grid}")
    check_count(name, "side", side, 1)
    tiles = cols * rows
    if side * side * (tiles + 1) >= 2**31:
        raise ValueError(
            f"{name}: an image must have fewer than 2^31 tokens, got grid {grid} of side {side}"
        )
    return tiles


def check_tile_order(name: str, tile_order: str) -> None:
    """Raise ValueError, naming function `name`, for an unknown tile order."""
    check(
        tile_order in ("row", "column"),
        f"{name}: tile_order must be 'row' or 'column', got {tile_order!r}",
    )


def thumbnail_cells(
    place: Tensor, cols: Tensor | int, rows: Tensor | int, side: int, tile_order: str
) -> Tensor:
    """Thumbnail cell 0 .. S*S-1 of the token at index `place` of an image of cols x rows tiles."""
    cols, rows = torch.as_tensor(cols), torch.as_tensor(rows)
    tile, inside = place // side**2, place % side**2
    r, c = inside // side, inside % side
    if tile_order == "column":
        i, j = tile // rows.clamp(min=1), tile % rows.clamp(min=1)
    else:
        i, j = tile % cols.clamp(min=1), tile // cols.clamp(min=1)

    def cell(k: Tensor, t: Tensor, n: Tensor) -> Tensor:
        # A raster of one token has one cell; the formula would divide by zero.
        return (side * ((side - 1) * k + t) - 1).clamp(min=0) // ((side - 1) * n).clamp(min=1)

    thumbnail = (tile >= cols * rows) | (cols * rows <= 1)
    return torch.where(thumbnail, inside, cell(j, r, rows) * side + cell(i, c, cols))


@dataclass(frozen=True)
class ImageGrids:
    """Places of images in a sequence of tokens, from which kernels compute position ids.

    Tokens before the first image have the ids 0, 1, ...; an image has the ids [bias, bias + S*S);
    the text after it continues with bias + S*S. The sequence of a batch [B, N] is its B*N tokens,
    row by row. Build it with `pack`, which checks its arguments.

    Attributes:
        table: int32 [I, 4], contiguous, ascending in its first column: offset (index of the
            image's first token), bias, cols, rows. Cols and rows of -1 (`TEXT`) are not an image:
            from `offset` on text counts from `bias` (the start of a packed sample or batch row).
        side: S.
        tile_order: "row", or "column" as published.
        thumbnail: whether images of more than one tile have a thumbnail.
        end: number of tokens of the shortest sequence that contains all images.
    """

    table: Tensor
    side: int = 16
    tile_order: str = "row"
    thumbnail: bool = True
    end: int = 0

    @classmethod
    @public
    def pack(
        cls,
        grids: Sequence[Grid],
        offsets: Sequence[int] | None = None,
        biases: Sequence[int] | None = None,
        side: int = 16,
        tile_order: str = "row",
        thumbnail: bool = True,
        device: torch.device | str | None = None,
    ) -> "ImageGrids":
        """Check the arguments, and copy them to a device without a sync.

        Args:
            grids: (cols, rows) of every image, in order; `TEXT` where text restarts.
            offsets: index of each image's first token; if None images are concatenated, as in an
                image memory.
            biases: id of each image's first thumbnail token; if None all 0: image-relative ids.
            side, tile_order, thumbnail: see `image_position_ids`.
            device: device of the table.

        Raises:
            ValueError: different numbers of grids, offsets and biases; an image that starts before
                the end of the previous one; a negative grid, offset or bias; an unknown tile order.
        """
        check_tile_order("ImageGrids.pack", tile_order)
        counts = [
            0 if tuple(grid) == TEXT else image_tokens(grid, side, thumbnail) for grid in grids
        ]
        if offsets is None:
            offsets = [sum(counts[:i]) for i in range(len(counts))]
        biases = [0] * len(counts) if biases is None else biases
        check(
            len(offsets) == len(biases) == len(counts),
            f"ImageGrids.pack: {len(counts)} grids need as many offsets and biases, got"
            f" {len(offsets)} and {len(biases)}",
        )
        end = 0
        for i, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
            for name, value in ((f"offsets[{i}]", offset), (f"biases[{i}]", biases[i])):
                check_count("ImageGrids.pack", name, value, -(2**31))
            check(
                offset >= end and biases[i] >= 0,
                f"ImageGrids.pack: image {i} must start at {end} or later with a bias of at least"
                f" 0, got offset {offset} and bias {biases[i]}",
            )
            end = offset + count
        check_count("ImageGrids.pack", "the end of the last image", end)
        rows = [
            (offset, bias, *grid) for offset, bias, grid in zip(offsets, biases, grids, strict=True)
        ]
        table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 4)
        return cls(to_device(table, device), side, tile_order, bool(thumbnail), end)

    @public
    def position_ids(self, tokens: int) -> Tensor:
        """Position ids of the first `tokens` tokens of the sequence.

        Args:
            tokens: length of the sequence.

        Returns:
            int64 [tokens] on the table's device; no sync.

        Raises:
            ValueError: a sequence too short for the images.
        """
        check_count("ImageGrids.position_ids", "tokens", tokens)
        self.check_length("ImageGrids.position_ids", tokens)
        place = torch.arange(tokens, device=self.table.device)
        if not len(self.table):
            return place
        image = torch.searchsorted(self.table[:, 0].contiguous(), place.int(), right=True) - 1
        offset, bias, cols, rows = self.table[image.clamp(min=0)].long().unbind(-1)
        area, tiles = self.side**2, cols * rows
        tiles = torch.where((tiles > 1) & bool(self.thumbnail), tiles + 1, tiles.clamp(min=1))
        count = torch.where(cols < 0, 0, area * tiles)
        place_in_image = place - offset
        cells = thumbnail_cells(place_in_image, cols, rows, self.side, self.tile_order)
        after = place_in_image - count + torch.where(cols < 0, 0, area)
        ids = bias + torch.where(place_in_image < count, cells, after)
        return torch.where(image < 0, place, ids)

    def check_length(self, name: str, tokens: int) -> None:
        """Raise ValueError, naming function `name`, for an invalid or too long table."""
        table = self.table
        if table.ndim != 2 or table.shape[1] != 4 or table.dtype != torch.int32:
            raise ValueError(
                f"{name}: the table of ImageGrids must be int32 [I, 4], as pack returns it, got"
                f" {table.dtype} {tuple(table.shape)}"
            )
        check_count(name, "the side of ImageGrids", self.side, 1, 2**15)
        check_tile_order(name, self.tile_order)
        if self.end > tokens:
            raise ValueError(
                f"{name}: images that end at token {self.end} overrun a sequence of {tokens} tokens"
            )
