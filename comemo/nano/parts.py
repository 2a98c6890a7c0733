"""What each token of a tile shows: words for what is drawn there."""

from collections.abc import Sequence

from comemo.nano.drawing import Box, Part

SIDE, GRID = 64, 4  # pixels and image tokens on a side of a tile
READABLE = 9.0  # pixels of a tile that text must be high
DIGITS = ("first", "second")  # which of a number is on the left
FULL = 0.2  # share of a token that is shown by a part, at least


def words_of_tiles(
    parts: Sequence[Part], size: tuple[int, int], grid: tuple[int, int]
) -> list[list[list[str]]]:
    """Words for each token of each tile of a picture, in the order of its tokens.

    Args:
        parts: of `draw_parts`.
        size: width and height of the picture in pixels.
        grid: columns and rows of the tiles.
    """
    cols, rows = grid
    wide, high = size[0] / cols, size[1] / rows
    tiles = [
        (col * wide, row * high, (col + 1) * wide, (row + 1) * high)
        for row in range(rows)
        for col in range(cols)
    ]
    if len(tiles) > 1:
        tiles.append((0, 0, *size))  # the thumbnail
    return [_words_of_tile(parts, tile) for tile in tiles]


def _words_of_tile(parts: Sequence[Part], tile: Box) -> list[list[str]]:
    left, top, right, bottom = tile
    shown = [part for part in parts if _share(part.box, tile) > 0]
    alone = len(shown) == 1 and _share(shown[0].box, tile) > 0.99
    scale = SIDE / (bottom - top)
    wide, high = (right - left) / GRID, (bottom - top) / GRID
    words = []
    for token in range(GRID * GRID):
        row, col = divmod(token, GRID)
        x, y = left + col * wide, top + row * high
        area = (x, y, x + wide, y + high)
        if alone:  # every token names the thing, and the text in its column
            found = shown
            area = (x, top, x + wide, bottom)
        else:
            found = [p for p in shown if max(_share(area, p.box), _share(p.box, area)) > FULL]
        own = [word for part in found for word in words_of(part, area, scale, alone)]
        words.append(own or ["nothing"])
    return words


def _share(one: Box, other: Box) -> float:
    """How much of one box is in the other."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0) * max(high, 0) / ((one[2] - one[0]) * (one[3] - one[1]))


def words_of(part: Part, area: Box, scale: float, alone: bool = False) -> list[str]:
    """Words for what is within an area of a part.

    Args:
        part: to be named.
        area: in pixels of the picture.
        scale: pixels of a tile for one of the picture.
        alone: whether it is named even beside its text, by the nearest of its letters.
    """
    left, top, right, bottom = part.line
    if (bottom - top) * scale < READABLE:
        return list(part.names)
    step = (right - left) / len(part.text)
    letters = [
        index
        for index in range(len(part.text))
        if left + (index + 0.75) * step > area[0] and left + (index + 0.25) * step < area[2]
    ]
    if not letters and not alone:
        return list(part.names)
    if not letters:
        letters = [0 if area[2] < (left + right) / 2 else len(part.text) - 1]
    if part.text.isdigit():
        return [*part.names, *(w for i in letters for w in (part.text[i], DIGITS[i]))]
    if len(part.text) == 1:
        return [*part.names, part.text]
    # The word counts twice: it is what is asked for.
    return [*part.names, part.text, part.text, *dict.fromkeys(part.text[i] for i in letters)]
