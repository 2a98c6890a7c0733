"""A sheet of heat maps: a picture, where the memory path looked for the answer, and for each word.

All maps have one colour scale, in multiples of an even spread: at 1 a place has as much weight as
if all places had the same.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from comemo.look.asking import Look
from comemo.look.colours import on_grey, paint_heat

MOST_WORDS = 24  # small maps
_INK, _FAINT, _PAPER = (31, 41, 55), (107, 114, 128), (250, 250, 249)
_MARGIN, _GAP, _WIDTH = 32, 20, 1180  # _WIDTH is between the margins
_COLUMNS = 4  # of small maps
_TALLEST = 1.25  # most height of a map, as a multiple of the width it may have
_LINE = 26  # of text
_MOST_LINES = 10  # of question and answer each
_LONGEST = 300  # characters; more do not fit in a line
_BAR = (540, 18)  # the legend


def draw_look(picture: Image.Image, look: Look, most_words: int = MOST_WORDS) -> Image.Image:
    """Draw a sheet of heat maps.

    Args:
        picture: of mode RGB, which the model was shown.
        look: what it looked at.
        most_words: small maps at most; the sheet says how many words have none.

    Returns:
        An image of mode RGB; the same for the same arguments.

    Raises:
        ValueError: fewer than 0 words.
    """
    if most_words < 0:
        raise ValueError(f"draw_look: most_words must be at least 0, got {most_words}")
    return _Sheet(picture, look, min(most_words, len(look.words))).draw()


class _Sheet:
    def __init__(self, picture: Image.Image, look: Look, count: int) -> None:
        self.picture, self.look, self.count = picture, look, count
        self.heading, self.text, self.small = (ImageFont.load_default(s) for s in (26, 19, 16))
        self.whole = _multiples(look.of_answer.cells)
        self.maps = _multiples(look.of_words.cells[:count])
        # The hottest cell of all maps, so that no heat is cut off.
        self.top = max(float(heat.max()) for heat in (self.whole, self.maps) if heat.numel())

    def draw(self) -> Image.Image:
        """Draw everything."""
        half, part = (_WIDTH - _GAP) // 2, (_WIDTH - (_COLUMNS - 1) * _GAP) // _COLUMNS
        large, little = self._size(half), self._size(part)
        question = self._wrap(self.look.question, self.heading)
        answer = self._wrap(self.look.answer or "(no text)", self.heading)
        story = self._wrap(self._story(), self.text)
        first = _MARGIN + 34 * (len(question) + len(answer)) + 16
        legend = first + _LINE + large[1] + _GAP
        told = legend + _BAR[1] + 2 * _LINE
        maps = told + _LINE * len(story) + _GAP
        step = 2 * _LINE + little[1] + _GAP
        height = maps + -(-self.count // _COLUMNS) * step + _MARGIN - _GAP
        self.paper = Image.new("RGB", (_WIDTH + 2 * _MARGIN, height), _PAPER)
        self.pen = ImageDraw.Draw(self.paper)
        self._lines(question, _MARGIN, 34, _FAINT, self.heading)
        self._lines(answer, _MARGIN + 34 * len(question), 34, _INK, self.heading)
        right, heat = _MARGIN + half + _GAP, self.look.of_answer
        self.pen.text((_MARGIN, first), "the picture", _INK, self.text)
        title = f"the whole answer: {shares(heat.on_tiles, heat.on_thumbnail)}"
        self.pen.text((right, first), title, _INK, self.text)
        self.paper.paste(self.picture.resize(large), (_MARGIN, first + _LINE))
        painted = paint_heat(self.picture, self.whole, self.top, large)
        self.paper.paste(painted, (right, first + _LINE))
        self._legend(_MARGIN, legend)
        self._lines(story, told, _LINE, _FAINT, self.text)
        for index in range(self.count):
            row, col = divmod(index, _COLUMNS)
            self._word(index, (_MARGIN + col * (part + _GAP), maps + row * step), part, little)
        return self.paper

    def _word(self, index: int, corner: tuple[int, int], width: int, size: tuple[int, int]) -> None:
        """Draw one small map below its word and shares."""
        (x, y), heat = corner, self.look.of_words
        title = _cut(" ".join(self.look.words[index].text.split()), width, self.text)
        told = shares(heat.on_tiles[index], heat.on_thumbnail[index])
        self.pen.text((x, y), title, _INK, self.text)
        self.pen.text((x, y + _LINE), told, _FAINT, self.small)
        painted = paint_heat(self.picture, self.maps[index], self.top, size)
        self.paper.paste(painted, (x, y + 2 * _LINE))

    def _legend(self, x: int, y: int) -> None:
        """Draw the colour scale as it looks over middle grey, with numbers."""
        wide, high = _BAR
        levels = np.broadcast_to(np.linspace(0, 1, wide), (high, wide))
        self.paper.paste(on_grey(levels, np.full((high, wide), 128.0)), (x, y))
        for share in (0, 0.25, 0.5, 0.75, 1):
            at = x + round(share * (wide - 1))
            self.pen.line((at, y + high, at, y + high + 5), _FAINT)
            told = f"{share * self.top:.1f}" if share else "0"
            self.pen.text((at, y + high + 6), told, _FAINT, self.small, anchor="ma")
        note = "times the weight of an even spread over the picture"
        self.pen.text((x + wide + _GAP, y - 2), note, _INK, self.text)

    def _story(self) -> str:
        """What the maps show."""
        look, left = self.look, len(self.look.words) - self.count
        gates = zip(look.layers, look.gates, strict=True)
        layers = ", ".join(f"{layer} ({size:.2f})" for layer, size in gates)
        told = (
            "Attention weights of the memory path, the mean over heads and over the mixin layers"
            f" before decoder layers {layers}, each counted by the size of its gate."
        )
        return told + (f" {left} more words have no map." if left else "")

    def _size(self, width: int) -> tuple[int, int]:
        """Of the picture, as large as fits in a width."""
        wide, high = self.picture.size
        scale = min(width / wide, _TALLEST * width / high)
        return max(1, round(scale * wide)), max(1, round(scale * high))

    def _lines(
        self,
        lines: list[str],
        y: int,
        step: int,
        colour: tuple[int, int, int],
        font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    ) -> None:
        for index, line in enumerate(lines):
            self.pen.text((_MARGIN, y + step * index), line, colour, font)

    def _wrap(self, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
        """Break text into lines, at most `_MOST_LINES`."""
        lines, line = [], ""
        for word in text.split():
            longer = f"{line} {word}" if line else word
            if line and font.getlength(longer) > _WIDTH:
                lines.append(line)
                longer = word
            line = _cut(longer, _WIDTH, font)
            if len(lines) == _MOST_LINES:
                return [*lines[:-1], "..."]
        return [*lines, line]


def shares(on_tiles: Tensor, on_thumbnail: Tensor) -> str:
    """How much weight is on tiles and on the thumbnail, in words.

    Args:
        on_tiles, on_thumbnail: numbers, of a `PictureHeat`.
    """
    return f"{float(on_tiles):.0%} tiles, {float(on_thumbnail):.0%} thumbnail"


def _multiples(cells: Tensor) -> Tensor:
    """Weights [..., height, width] as multiples of an even spread."""
    return cells * (cells.shape[-2] * cells.shape[-1])


def _cut(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The beginning of a text, as much as fits in a width."""
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    text = text[:_LONGEST]
    while len(short) > 1 and font.getlength(short) > width:
        text = text[:-1]
        short = f"{text}..."
    return short
