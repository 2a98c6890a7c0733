"""A drawing of how the model sees an image: tiles, token raster, position ids.

Every token shows its position id and the colour of the thumbnail cell with that id. With tile order
"row" the colours of the tiles match those of the thumbnail; with "column" they do not.
"""

import os
import string
import uuid
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from comemo.images import Grid, Source, open_image, split_tiles
from comemo.safety.regular import check_regular

_LETTERS = string.ascii_uppercase + string.ascii_lowercase
Colour: TypeAlias = tuple[int, int, int]

# side of one token in pixels: 14 x 14 patches, folded two by two
TOKEN_SIZE = 28
# a larger map cannot be read, and exceeds 25 megapixels
MAX_TILES = 100

_INK: Colour = (31, 41, 55)
_FAINT: Colour = (107, 114, 128)
_PAPER: Colour = (250, 250, 249)
_MARGIN, _GAP = 32, 10
# colours of the thumbnail's corners: top left, top right, bottom left, bottom right
_CORNERS: tuple[Colour, ...] = ((37, 99, 235), (22, 163, 74), (190, 24, 150), (234, 120, 12))
_TINT = 0.46
# between two tokens of the same id, and of different ids
_LINES = ((255, 255, 255, 50), (255, 255, 255, 190))


def token_ids(
    grid: Grid, side: int = 16, tile_order: str = "row", bias: int = 0, use_thumbnail: bool = True
) -> np.ndarray:
    """The position id of every token, tile by tile, as `comemo_kernels.image_position_ids`.

    That function needs torch, which takes longer to import than a map to draw.

    Args:
        grid: (cols, rows) of the tiles.
        side: tokens along the side of a tile.
        tile_order: "row" (by place) or "column" (as the published code counts).
        bias: id of the image's first token in its sequence.
        use_thumbnail: whether the whole image follows as one more tile if there are several.

    Returns:
        int64 [tiles, side, side], tiles row by row, the thumbnail last.
    """
    cols, rows = grid
    thumbnail = np.arange(side * side).reshape(1, side, side)
    if cols * rows <= 1:
        return bias + thumbnail
    tiles, tokens = np.arange(cols * rows)[:, None], np.arange(side)
    i, j = tiles % cols, tiles // cols
    if tile_order == "column":
        i, j = tiles // rows, tiles % rows

    def cell(tile: np.ndarray, count: int) -> np.ndarray:
        """The row or column of the thumbnail, for tiles and tokens: [tiles, side]."""
        # A raster of one token has one cell; the formula would divide by zero.
        places = side * ((side - 1) * tile + tokens) - 1
        return np.maximum(places, 0) // max((side - 1) * count, 1)

    ids = cell(j, rows)[:, :, None] * side + cell(i, cols)[:, None, :]
    return bias + (np.concatenate([ids, thumbnail]) if use_thumbnail else ids)


def cell_letters(grid: Grid, side: int, tile_order: str) -> list[str]:
    """Draw the token raster of the thumbnail in letters.

    Args:
        grid: (cols, rows) of more than one tile.
        side: tokens along the side of a tile.
        tile_order: "row" or "column".

    Returns:
        `side` lines; the letter of a cell names the tile with the most tokens of its id.
    """
    ids = token_ids(grid, side, tile_order, use_thumbnail=False).reshape(-1, side * side)
    shares = np.stack([np.bincount(tile, minlength=side * side) for tile in ids])
    letters = [_LETTERS[t % len(_LETTERS)] for t in shares.argmax(0).tolist()]
    return [" ".join(letters[row * side : (row + 1) * side]) for row in range(side)]


def draw_map(
    source: Source,
    *,
    input_size: int = 448,
    max_num: int = 12,
    tile_order: str = "row",
    bias: int = 0,
    published: bool = False,
) -> Image.Image:
    """Draw tiles, thumbnail and the position id of each token over an image.

    Args:
        source: anything that `open_image` reads.
        input_size: pixels along the side of a tile, a multiple of `TOKEN_SIZE`.
        max_num: most tiles, up to `MAX_TILES`; the thumbnail is not counted.
        tile_order: "row" (by place) or "column" (as the published code counts).
        bias: id of the image's first token in its sequence, not negative.
        published: exactly the pixels of the published code; see `open_image`.

    Returns:
        An image of mode RGB; the same for the same arguments.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an argument is out of range, or as `load_image`.
    """
    _check(input_size, max_num, tile_order, bias)
    image = open_image(source, published=published)
    tiles, grid = split_tiles(image, input_size, max_num=max_num)
    ids = token_ids(grid, input_size // TOKEN_SIZE, tile_order, bias)
    return _Map(tiles, grid, ids, bias).draw(_title(source, image), _story(grid, ids, tile_order))


def save_map(source: Source, path: str | os.PathLike[str], **options) -> Path:
    """Write the map of an image as a PNG file, whole or not at all.

    Args:
        source: anything that `open_image` reads.
        path: of the file, ending in .png; an old map there is replaced.
        options: the keyword arguments of `draw_map`.

    Returns:
        `path`.

    Raises:
        FileNotFoundError: there is no such image.
        ValueError: `path` does not end in .png, is a directory, a pipe, a device or the image
            itself, or is in a directory that does not exist; or as `draw_map`.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"save_map: path must be a path, got {type(path).__name__}")
    path = Path(path)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"save_map: path must be a file ending in .png, got {str(path)!r}")
    if path.exists():
        check_regular("save_map", path)
    if not path.parent.is_dir():
        raise ValueError(f"save_map: wanted an existing directory, got {str(path.parent)!r}")
    named = isinstance(source, (str, os.PathLike)) and os.path.exists(source)
    if named and path.exists() and os.path.samefile(cast(str, source), path):
        raise ValueError(f"save_map: the map would overwrite its image {str(path)!r}")
    drawing = draw_map(source, **options)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # On noise level 6, the default, takes three times as long and saves nothing.
        drawing.save(part, "PNG", compress_level=3)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


class _Map:
    """The layout: a heading, a card for each tile in the grid, and a card for the thumbnail."""

    def __init__(self, tiles: list[Image.Image], grid: Grid, ids: np.ndarray, bias: int):
        self.tiles, self.grid, self.ids, self.bias = tiles, grid, ids, bias
        self.side = ids.shape[-1]
        self.small, self.heading, self.text = (ImageFont.load_default(s) for s in (15, 30, 19))
        widest = self.small.getlength(str(int(ids.max())))
        # wide enough for the longest id, and for the name of a tile above few tokens
        self.cell = max(36, round(widest) + 10, -(-224 // self.side))
        self.step = self.side * self.cell + _GAP
        self.strip = 30  # height of the name above a card

    def draw(self, title: str, story: list[str]) -> Image.Image:
        """Draw everything."""
        cols, rows = self.grid
        alone = len(self.tiles) == 1
        # the thumbnail is below a wide grid, otherwise beside it: the map fits a screen better
        beside = not alone and cols <= 2 * rows
        across, down = cols + beside, rows + (not alone and not beside)
        width = max(across * self.step + (4 * _GAP if beside else 0), 18 * 36) + 2 * _MARGIN
        lines = self._wrap(story, width - 2 * _MARGIN)
        top = _MARGIN + 44 + 26 * len(lines) + 18
        space = 0 if alone or beside else 4 * _GAP
        height = top + down * (self.step + self.strip) + space + _MARGIN
        self.paper = Image.new("RGB", (width, height), _PAPER)
        self.pen = ImageDraw.Draw(self.paper)
        self.pen.text((_MARGIN, _MARGIN), self._fit(title, width - 2 * _MARGIN), _INK, self.heading)
        for line, text in enumerate(lines):
            self.pen.text((_MARGIN, _MARGIN + 44 + 26 * line), text, _FAINT, self.text)
        stamps = {int(i): self._stamp(int(i)) for i in np.unique(self.ids)}
        for t in range(len(self.tiles)):
            col, row = t % cols, t // cols
            name = f"tile {t}  ·  column {col}, row {row}"
            x, y = _MARGIN + col * self.step, top + row * (self.step + self.strip)
            if alone:
                name = "tile 0  ·  the whole image"
            elif t == cols * rows:
                name = "thumbnail  ·  the whole image"
                x = _MARGIN + (cols * self.step + 4 * _GAP if beside else 0)
                y = top + (0 if beside else rows * (self.step + self.strip) + space)
            self._card(t, name, (x, y), stamps)
        return self.paper

    def _card(self, t: int, name: str, corner: tuple[int, int], stamps: dict) -> None:
        """Draw one tile with its name, its tokens, and lines between them."""
        x, y = corner[0], corner[1] + self.strip
        size = self.side * self.cell
        self.pen.text((x, y - 7), name, _INK, self.text, anchor="ls")
        card = self.tiles[t].resize((size, size)).convert("RGBA")
        ids = self.ids[t].tolist()
        for r in range(self.side):
            for c in range(self.side):
                card.alpha_composite(stamps[ids[r][c]], (c * self.cell, r * self.cell))
        card = card.convert("RGB")
        pen = ImageDraw.Draw(card, "RGBA")  # blends lines
        for r in range(self.side):
            for c in range(self.side):
                left, top = c * self.cell, r * self.cell
                right, bottom = left + self.cell - 1, top + self.cell - 1
                if c:
                    pen.line((left, top, left, bottom), _LINES[ids[r][c - 1] != ids[r][c]])
                if r:
                    pen.line((left, top, right, top), _LINES[ids[r - 1][c] != ids[r][c]])
        self.paper.paste(card, (x, y))
        self.pen.rectangle((x - 2, y - 2, x + size + 1, y + size + 1), outline=_INK, width=2)

    def _stamp(self, token_id: int) -> Image.Image:
        """Draw one id on the tint of its cell, legible on any image."""
        row, col = divmod(token_id - self.bias, self.side)
        colour = _tint(row, col, self.side)
        stamp = Image.new("RGBA", (self.cell, self.cell), (*colour, round(255 * _TINT)))
        pen = ImageDraw.Draw(stamp)
        middle = (self.cell // 2, self.cell // 2)
        dark = (*(channel // 4 for channel in colour), 255)
        pen.text(middle, str(token_id), "white", self.small, "mm", stroke_width=2, stroke_fill=dark)
        return stamp

    def _wrap(self, story: list[str], width: int) -> list[str]:
        """Break paragraphs into lines."""
        lines = []
        for paragraph in story:
            line = ""
            for word in paragraph.split(" "):
                longer = f"{line} {word}" if line else word
                if line and self.text.getlength(longer) > width:
                    lines.append(line)
                    longer = word
                line = longer
            lines.append(line)
        return lines

    def _fit(self, title: str, width: int) -> str:
        """Shorten a heading in the middle."""
        short, keep = title, len(title) // 2
        while keep > 4 and self.heading.getlength(short) > width:
            keep -= 1
            short = f"{title[:keep]} ... {title[-keep:]}"
        return short


def _tint(row: int, col: int, side: int) -> Colour:
    """Blend the corners' colours."""
    v, h = row / max(side - 1, 1), col / max(side - 1, 1)
    weights = ((1 - v) * (1 - h), (1 - v) * h, v * (1 - h), v * h)
    red, green, blue = (
        round(sum(w * corner[i] for w, corner in zip(weights, _CORNERS, strict=True)))
        for i in range(3)
    )
    return red, green, blue


def _title(source: Source, image: Image.Image) -> str:
    """The name of the image and its size."""
    size = f"{image.width} x {image.height} pixels"
    if not isinstance(source, (str, os.PathLike)):
        return size
    kilobytes = os.path.getsize(source) / 1000
    weight = f"{kilobytes:,.0f} kB" if kilobytes >= 1 else f"{1000 * kilobytes:.0f} bytes"
    return f"{Path(source).name}  ·  {size}  ·  {weight}"


def _story(grid: Grid, ids: np.ndarray, tile_order: str) -> list[str]:
    """A description of what the map shows."""
    cols, rows = grid
    low, high, used = int(ids.min()), int(ids.max()), len(np.unique(ids))
    tiles = f"{cols} x {rows} tiles (columns x rows) + thumbnail" if len(ids) > 1 else "one tile"
    counts = (
        f"{tiles}  ·  {ids.shape[-1]} x {ids.shape[-1]} tokens a tile, {ids.size:,} tokens"
        f"  ·  position ids {low} to {high} ({used} in use)  ·  tile order: {tile_order}"
    )
    if len(ids) == 1:
        return [counts, "A token has the position id written in its cell."]
    if tile_order == "row" or 1 in grid:
        return [
            counts,
            "A token has the id and the colour of the thumbnail cell that covers the same place.",
        ]
    return [
        counts,
        f"As published: tile t takes the ids of column t // {rows}, row t % {rows}, so the ids and "
        "colours of a tile are those of another place on the thumbnail.",
    ]


def _check(input_size: int, max_num: int, tile_order: str, bias: int) -> None:
    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    if not whole(input_size) or input_size < TOKEN_SIZE or input_size % TOKEN_SIZE:
        wanted = f"input_size must be a multiple of {TOKEN_SIZE}"
        raise ValueError(f"draw_map: {wanted}, got {input_size!r}")
    if not whole(max_num) or not 1 <= max_num <= MAX_TILES:
        raise ValueError(f"draw_map: max_num must be 1 to {MAX_TILES}, got {max_num!r}")
    if tile_order not in ("row", "column"):
        raise ValueError(f"draw_map: tile_order must be 'row' or 'column', got {tile_order!r}")
    if not whole(bias) or bias < 0:
        raise ValueError(f"draw_map: bias must be an integer of at least 0, got {bias!r}")
