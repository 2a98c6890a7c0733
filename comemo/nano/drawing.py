"""From a scene to pixels, with Pillow and its own font."""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from comemo.nano.scenes import Item, Scene
from comemo.nano.words import COLOURS

PHOTOGRAPHS = Path(__file__).parent / "photographs"
GROUNDS_OF_ONE = ("plain", "gradient", "noise", "photograph")  # of a thing alone
JITTER = 0.03  # how far from the middle of its place text is, as a share of the place
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Colour = tuple[int, ...]
Pen = ImageDraw.ImageDraw


@dataclass(frozen=True)
class Part:
    """Something that is drawn, and where.

    Attributes:
        box: of all of it.
        names: words for all of it.
        text: what is written in it.
        line: where that is.
    """

    box: Box
    names: tuple[str, ...]
    text: str = ""
    line: Box = (0, 0, 0, 0)


def draw(scene: Scene) -> Image.Image:
    """Draw a scene.

    Args:
        scene: of `make_scene`, `make_pair` or `make_lesson`.

    Returns:
        An RGB image, 1,152 to 1,280 pixels on its longer side.
    """
    return draw_parts(scene)[0]


def draw_parts(scene: Scene) -> tuple[Image.Image, list[Part]]:
    """Draw a scene, and tell what is where. As `draw`."""
    random = Random(f"pixels {scene.seed} {scene.size} {len(scene.items)}")
    width, height = scene.extent[:2]
    image = draw_ground(random, scene.ground, (width, height))
    pen = ImageDraw.Draw(image)
    layouts = {"objects": _objects, "sign": _sign, "chart": _chart, "form": _form, "marks": _marks}
    return image, layouts[scene.layout](random, pen, scene, (width, height))


def draw_item(item: Item, seed: int) -> Image.Image:
    """Draw one item alone, as large as a place: a RGB image of 320 x 320 pixels."""
    random = Random(f"item {seed}")
    image = draw_ground(random, random.choice(GROUNDS_OF_ONE), (320, 320))
    _item(random, ImageDraw.Draw(image), item, (0, 0, 320, 320))
    return image


def draw_ground(random: Random, kind: str, size: tuple[int, int]) -> Image.Image:
    """What is behind everything: one of `scenes.GROUNDS`, of width and height in pixels."""
    pale = random.random() < 0.75
    low, high = (185, 235) if pale else (60, 110)

    def tone() -> Colour:
        base = random.randint(low, high)
        return tuple(min(255, max(0, base + random.randint(-14, 14))) for _ in range(3))

    if kind == "plain":
        return Image.new("RGB", size, tone())
    if kind == "photograph":
        photograph = _photograph(random.choice(("astronaut", "chelsea", "coffee", "rocket")))
        side = random.randint(120, min(photograph.size))
        left, top = (random.randint(0, total - side) for total in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side)).resize(size)
        return Image.blend(crop, Image.new("RGB", size, tone()), random.uniform(0.55, 0.8))
    if kind == "stripes":
        first, image = tone(), Image.new("RGB", size, tone())
        pen, step = ImageDraw.Draw(image), random.randint(60, 160)
        slant = random.choice((0, size[1]))
        for start in range(-size[1], size[0], 2 * step):
            end = start + step
            corners = [(start, 0), (end, 0), (end + slant, size[1]), (start + slant, size[1])]
            pen.polygon(corners, first)
        return image
    cells = (2, 2) if kind == "gradient" else (random.randint(4, 24), random.randint(4, 24))
    small = Image.new("RGB", cells)
    small.putdata([tone() for _ in range(cells[0] * cells[1])])
    return small.resize(size, Image.Resampling.BICUBIC)


@lru_cache
def _photograph(name: str) -> Image.Image:
    with Image.open(PHOTOGRAPHS / f"{name}.jpg") as image:
        return image.convert("RGB").filter(ImageFilter.GaussianBlur(1))


@lru_cache(maxsize=256)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _shade(random: Random, name: str) -> Colour:
    return tuple(min(255, max(0, part + random.randint(-12, 12))) for part in COLOURS[name])


def _contrast(colour: Colour) -> Colour:
    bright = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2]
    return (20, 20, 24) if bright > 140 else (250, 250, 250)


def _objects(random: Random, pen: Pen, scene: Scene, size: tuple[int, int]) -> list[Part]:
    rows, cols = scene.shape
    wide, high = size[0] / cols, size[1] / rows
    return [
        _item(random, pen, item, (col * wide, row * high, (col + 1) * wide, (row + 1) * high))
        for (row, col), item in scene.items.items()
    ]


def _item(random: Random, pen: Pen, item: Item, box: Box) -> Part:
    """Draw an item at some place and of some size within the box."""
    left, top, right, bottom = box
    least = min(right - left, bottom - top)
    colour = _shade(random, item.colour)
    if item.kind == "shape":
        radius = least * random.uniform(0.22, 0.42)
        x = random.uniform(left + radius * 1.1, right - radius * 1.1)
        y = random.uniform(top + radius * 1.1, bottom - radius * 1.1)
        _shape(pen, item.text, x, y, radius, colour)
        return Part(_around(x, y, radius), (item.kind, item.colour, item.text))
    wide = least * (0.9 if item.kind == "word" else 0.6)
    high = least * (0.4 if item.kind == "word" else 0.55)
    # Text is in the middle: letters that are always somewhere else take far longer to learn.
    x = (left + right) / 2 + least * random.uniform(-JITTER, JITTER)
    y = (top + bottom) / 2 + least * random.uniform(-JITTER, JITTER)
    plate = (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
    pen.rounded_rectangle(plate, high * 0.12, colour, _contrast(colour), 3)
    line = _write(pen, item.text, plate, _contrast(colour))
    return Part(plate, (item.kind, item.colour), item.text, line)


def _around(x: float, y: float, radius: float) -> Box:
    return (x - radius, y - radius, x + radius, y + radius)


def _write(
    pen: Pen,
    text: str,
    box: Box,
    colour: Colour,
    fill: float = 0.86,
) -> Box:
    """Write the text as large as fits into the box, in the middle of it; where it is."""
    wide, high = (box[2] - box[0]) * fill, (box[3] - box[1]) * fill
    trial = _font(100).getbbox(text)
    scale = min(wide / (trial[2] - trial[0]), high / (trial[3] - trial[1]))
    size = max(8, int(100 * scale))
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    pen.text(middle, text, colour, _font(size), "mm")
    return pen.textbbox(middle, text, _font(size), "mm")


def _shape(pen: Pen, name: str, x: float, y: float, radius: float, colour: Colour) -> None:
    edge, line = _contrast(colour), 3
    box = _around(x, y, radius)
    if name == "circle":
        pen.ellipse(box, colour, edge, line)
    elif name == "ring":
        pen.ellipse(box, None, edge, int(radius * 0.42) + line)
        inner = (x - radius + line, y - radius + line, x + radius - line, y + radius - line)
        pen.ellipse(inner, None, colour, int(radius * 0.42) - line)
    elif name == "square":
        side = radius * 0.86
        pen.rectangle((x - side, y - side, x + side, y + side), colour, edge, line)
    else:
        pen.polygon(_corners(name, x, y, radius), colour, edge, line)


def _corners(name: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if name == "triangle":
        return [(x, y - radius), (x + radius, y + radius * 0.8), (x - radius, y + radius * 0.8)]
    if name == "diamond":
        wide = radius * 0.75
        return [(x, y - radius), (x + wide, y), (x, y + radius), (x - wide, y)]
    if name == "star":
        turns = [(math.pi * i / 5, radius if i % 2 == 0 else radius * 0.42) for i in range(10)]
        return [(x + r * math.sin(a), y - r * math.cos(a)) for a, r in turns]
    arm = radius * 0.32  # a cross
    steps = [
        (-arm, -radius),
        (arm, -radius),
        (arm, -arm),
        (radius, -arm),
        (radius, arm),
        (arm, arm),
    ]
    steps += [(-dx, -dy) for dx, dy in steps]
    return [(x + dx, y + dy) for dx, dy in steps]


def _sign(random: Random, pen: Pen, scene: Scene, size: tuple[int, int]) -> list[Part]:
    width, height = size
    colour = _shade(random, scene.sign["colour"])
    ink = _contrast(colour)
    left, right = width * random.uniform(0.01, 0.03), width * random.uniform(0.97, 0.99)
    top, bottom = height * random.uniform(0.01, 0.04), height * random.uniform(0.96, 0.99)
    pen.rounded_rectangle((left, top, right, bottom), 30, colour, ink, 8)
    rows, cols = scene.shape
    tile = min(width / cols, height / rows)
    # A word, and below it an arrow and a number, each in the middle of a place.
    word, number = scene.sign["word"], scene.sign["number"]
    x = width * (random.choice((cols - 1, cols)) // 2 + 0.5) / cols
    y = height * (rows - 1.5) / rows
    box = (x - tile * 0.45, y - tile * 0.2, x + tile * 0.45, y + tile * 0.2)
    written = _write(pen, word, box, ink)
    middle = height * (rows - 0.5) / rows
    way, across = scene.sign["arrow"], width * 0.5 / cols
    _arrow(pen, way, across, middle, tile * 0.25, ink)
    x, high = width * (cols - 0.5) / cols, tile * random.uniform(0.3, 0.45)
    box = (x - high, middle - high / 2, x + high, middle + high / 2)
    line = _write(pen, number, box, ink, 1)
    return [
        Part((left, top, right, bottom), ("sign", scene.sign["colour"])),
        Part(written, ("word",), word, written),
        Part(_around(across, middle, tile * 0.25), ("arrow", way)),
        Part(line, ("number",), number, line),
    ]


def _arrow(pen: Pen, way: str, x: float, y: float, radius: float, colour: Colour) -> None:
    turn = {"up": 0, "right": 1, "down": 2, "left": 3}[way]
    points = [
        (0, -1),
        (0.7, -0.1),
        (0.25, -0.1),
        (0.25, 1),
        (-0.25, 1),
        (-0.25, -0.1),
        (-0.7, -0.1),
    ]
    for _ in range(turn):
        points = [(-dy, dx) for dx, dy in points]
    pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in points], colour)


def _chart(random: Random, pen: Pen, scene: Scene, size: tuple[int, int]) -> list[Part]:
    width, height = size
    step = width / len(scene.bars)
    floor = height * 0.85
    ink = (20, 20, 24)
    pen.rectangle((0, 0, width, height), _pale(random))
    pen.line((width * 0.02, floor, width * 0.98, floor), ink, 6)
    parts = []
    for index, bar in enumerate(scene.bars):
        x, wide = (index + 0.5) * step, step * random.uniform(0.22, 0.3)
        top = floor - (floor - height * 0.2) * bar.value / 99
        colour = _shade(random, bar.colour)
        pen.rectangle((x - wide, top, x + wide, floor), colour, ink, 3)
        parts.append(Part((x - wide, top, x + wide, floor), ("bar", bar.colour)))
        value = str(bar.value)
        line = _write(pen, value, (x - step, height * 0.03, x + step, height * 0.15), ink)
        parts.append(Part(line, ("number",), value, line))
        line = _write(pen, bar.letter, (x - step, floor + 10, x + step, height - 10), ink)
        parts.append(Part(line, ("letter",), bar.letter, line))
    return parts


def _pale(random: Random) -> Colour:
    return tuple(random.randint(220, 250) for _ in range(3))


def _form(random: Random, pen: Pen, scene: Scene, size: tuple[int, int]) -> list[Part]:
    width, height = size
    margin = 24
    pen.rectangle((margin, margin, width - margin, height - margin), _pale(random), (90, 90, 90), 4)
    step, ink = height / len(scene.fields), (25, 25, 30)
    parts = []
    for index, (name, item) in enumerate(scene.fields.items()):
        y = (index + 0.5) * step + random.uniform(-JITTER, JITTER) * step
        tall = min(step * 0.16, width * 0.055)
        line = _write(pen, name, (width * 0.06, y - tall, width * 0.31, y + tall), ink, 0.9)
        parts.append(Part(line, (), name, line))
        left = width * random.choice((0.37, 0.69))
        box = (left, y - tall, left + width * 0.26, y + tall)
        pen.line((width * 0.36, y + tall * 1.3, width * 0.94, y + tall * 1.3), (120, 120, 120), 4)
        shade = _shade(random, item.colour) if item.colour not in ("white", "yellow") else ink
        line = _write(pen, item.text, box, shade, 0.9)
        parts.append(Part(line, (item.kind,), item.text, line))
    return parts


def _marks(random: Random, pen: Pen, scene: Scene, size: tuple[int, int]) -> list[Part]:
    width, height = size
    step = width / scene.side
    ink = (25, 25, 30)
    pen.rectangle((0, 0, width, height), _pale(random))
    for index in range(scene.side + 1):
        pen.line((index * step, 0, index * step, height), (140, 140, 150), 5)
        pen.line((0, index * step, width, index * step), (140, 140, 150), 5)
    parts = []
    for (row, col), item in scene.items.items():
        radius = width * random.uniform(0.03, 0.045)
        x = (col + 0.5) * step + random.uniform(-0.08, 0.08) * step
        y = (row + 0.5) * step + random.uniform(-0.08, 0.08) * step
        box = _around(x, y, radius)
        parts.append(Part(box, ("mark", item.text)))
        thick = int(radius * 0.45)
        if item.text == "cross":
            pen.line(box, ink, thick)
            pen.line((box[0], box[3], box[2], box[1]), ink, thick)
        elif item.text == "ring":
            pen.ellipse(box, None, ink, thick)
        else:
            pen.ellipse(box, ink)
    return parts
