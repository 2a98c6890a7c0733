"""What is in a drawn picture: layouts and their contents, each from one seed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from comemo.nano.words import (
    COLOURS,
    DIRECTIONS,
    FIELDS,
    LETTERS,
    SHAPES,
    WORDS,
    place_names,
    with_article,
)

# Seeds of pictures. No seed is in two of them, so nothing that is asked in a test was learnt.
SEEDS = {
    "train": range(0, 2**40),
    "held-out": range(2**40, 2**41),
    "demo": range(2**41, 2**42),
}
# Width and height in pixels, rows and columns of places: the grid that the image processor
# chooses for this shape, so that a place is about a tile.
SIZES = {
    "square": (1152, 1152, 3, 3),
    "wide": (1200, 800, 2, 3),
    "tall": (800, 1200, 3, 2),
    "landscape": (1280, 960, 3, 4),
    "portrait": (960, 1280, 4, 3),
    "panorama": (1280, 640, 2, 4),
}
# How often things are a shape, word, letter or number: in pictures, and where reading is learnt.
ITEMS, TEXTS = (5, 3, 1, 2), (4, 5, 2, 3)
# Of pictures that are cut into four tiles, to begin with.
LESSONS = {"four": (1152, 1152, 2, 2)}
GROUNDS = ("plain", "gradient", "stripes", "noise", "photograph")

Place = tuple[int, int]  # row, column, from 0


@dataclass(frozen=True)
class Item:
    """One thing at one place.

    Attributes:
        kind: "shape", "word", "letter" or "number".
        text: the shape's name, or what is written.
        colour: of the shape, or of the plate behind the text.
    """

    kind: str
    text: str
    colour: str

    def phrase(self) -> str:
        """How answers name it."""
        if self.kind == "shape":
            return with_article(f"{self.colour} {self.text}")
        return f"the {self.kind} {self.text}"


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: its colour, the letter below it and the number at the top."""

    colour: str
    letter: str
    value: int


@dataclass
class Scene:
    """A picture before it is drawn.

    Attributes:
        seed: gives the scene and, with it, the pixels.
        layout: a key of `LAYOUTS`.
        size: a key of `SIZES` or `LESSONS`.
        ground: one of `GROUNDS`.
        items: place -> what is there; of "objects" and "marks".
        bars: of a "chart", from left to right.
        fields: name -> value of a "form", from top to bottom.
        sign: of a "sign": word, number, colour, arrow.
        side: of "marks": rows and columns of its grid.
    """

    seed: int
    layout: str
    size: str
    ground: str
    items: dict[Place, Item] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    fields: dict[str, Item] = field(default_factory=dict)
    sign: dict[str, str] = field(default_factory=dict)
    side: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the places."""
        return (self.side, self.side) if self.side else self.extent[2:]

    @property
    def extent(self) -> tuple[int, int, int, int]:
        """Width and height in pixels, rows and columns that the image processor chooses."""
        return (SIZES | LESSONS)[self.size]

    def places(self) -> dict[Place, str]:
        """The names of all places."""
        return place_names(*self.shape)


def make_scene(seed: int, layout: str | None = None) -> Scene:
    """Think of a picture.

    Args:
        seed: the same seed and layout give the same scene.
        layout: a key of `LAYOUTS`; None for any.

    Raises:
        ValueError: a seed outside `SEEDS`, or an unknown layout.
    """
    _check_seed("make_scene", seed)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"make_scene: the layout must be of {sorted(LAYOUTS)}, got {layout!r}")
    random = Random(seed)
    if layout is None:
        layout = random.choices(list(LAYOUTS), (8, 2, 3, 2, 3))[0]
    return LAYOUTS[layout](seed, random)


def _check_seed(caller: str, seed: int) -> None:
    # Python looks for a number that is no integer in a range one by one, which takes hours.
    if not isinstance(seed, int) or not any(seed in seeds for seeds in SEEDS.values()):
        raise ValueError(f"{caller}: the seed must be in one of {SEEDS}, got {seed!r}")


def make_item(random: Random, weights: tuple[int, ...] = ITEMS) -> Item:
    """Any one thing, the kinds with these weights."""
    kind = random.choices(("shape", "word", "letter", "number"), weights)[0]
    colour = random.choice(list(COLOURS))
    text = {
        "shape": random.choice(SHAPES),
        "word": random.choice(WORDS),
        "letter": random.choice(LETTERS),
        "number": str(random.randint(10, 99)),
    }[kind]
    return Item(kind, text, colour)


def _objects(seed: int, random: Random, sizes: tuple[str, ...] = tuple(SIZES)) -> Scene:
    scene = Scene(seed, "objects", random.choice(sizes), random.choice(GROUNDS))
    places = [(row, col) for row in range(scene.shape[0]) for col in range(scene.shape[1])]
    most = min(9, len(places))
    count = random.randint(1, 4) if random.random() < 0.4 else random.randint(4, most)
    for place in sorted(random.sample(places, count)):
        scene.items[place] = make_item(random)
    return scene


def make_lesson(seed: int) -> Scene:
    """A picture of "objects" with four places, some of them empty at times.

    Raises:
        ValueError: a seed outside `SEEDS`.
    """
    _check_seed("make_lesson", seed)
    random = Random(f"lesson {seed}")
    scene = Scene(seed, "objects", "four", random.choice(GROUNDS))
    rows, cols = scene.shape
    for place in [(row, col) for row in range(rows) for col in range(cols)]:
        if random.random() < 0.8 or (not scene.items and place == (rows - 1, cols - 1)):
            scene.items[place] = make_item(random)
    return scene


def make_shapes(seed: int) -> Scene:
    """A picture of "objects" with four different shapes in four places.

    Raises:
        ValueError: a seed outside `SEEDS`.
    """
    _check_seed("make_shapes", seed)
    random = Random(f"shapes {seed}")
    scene = Scene(seed, "objects", "four", random.choice(GROUNDS))
    for place, shape in zip(scene.places(), random.sample(SHAPES, 4), strict=True):
        scene.items[place] = Item("shape", shape, random.choice(list(COLOURS)))
    return scene


def make_pair(seed: int) -> tuple[Scene, Scene]:
    """Two pictures of few objects each, to be compared; they differ in some.

    Raises:
        ValueError: a seed outside `SEEDS`.
    """
    _check_seed("make_pair", seed)
    random = Random(f"pair {seed}")
    sizes = ("wide", "tall")
    return _pairs_half(seed, random, sizes), _pairs_half(seed, random, sizes)


def _pairs_half(seed: int, random: Random, sizes: tuple[str, ...]) -> Scene:
    scene = _objects(seed, random, sizes)
    for place in list(scene.items)[4:]:
        del scene.items[place]
    scene.seed = seed
    return scene


def _sign(seed: int, random: Random) -> Scene:
    size = random.choice(("wide", "landscape", "square"))
    scene = Scene(seed, "sign", size, random.choice(GROUNDS))
    scene.sign = {
        "word": random.choice(WORDS),
        "number": str(random.randint(10, 99)),
        "colour": random.choice(list(COLOURS)),
        "arrow": random.choice(DIRECTIONS),
    }
    return scene


def _chart(seed: int, random: Random) -> Scene:
    size = random.choice(("wide", "landscape"))
    scene = Scene(seed, "chart", size, random.choice(GROUNDS[:2]))
    count = SIZES[size][3]  # so that each bar has a column of tiles
    colours = random.sample([c for c in COLOURS if c != "white"], count)
    letters = random.sample(LETTERS, count)
    heights = random.sample(range(2, 10), count)
    values = [10 * height + random.randint(0, 5) for height in heights]
    scene.bars = [Bar(*bar) for bar in zip(colours, letters, values, strict=True)]
    return scene


def _form(seed: int, random: Random) -> Scene:
    scene = Scene(seed, "form", random.choice(("square", "wide")), random.choice(GROUNDS[:4]))
    for name in random.sample(FIELDS, scene.shape[0]):
        item = make_item(random)
        while item.kind == "shape":
            item = make_item(random)
        scene.fields[name] = item
    return scene


def _marks(seed: int, random: Random) -> Scene:
    scene = Scene(
        seed, "marks", "square", random.choice(GROUNDS[:2]), side=random.choice((3, 3, 4))
    )
    places = [(row, col) for row in range(scene.side) for col in range(scene.side)]
    crosses = random.randint(0, 4)
    chosen = random.sample(places, crosses + 1 + random.randint(1, 3))
    for index, place in enumerate(chosen):
        kind = "cross" if index < crosses else "ring" if index == crosses else "dot"
        scene.items[place] = Item("mark", kind, "black")
    return scene


LAYOUTS: dict[str, Callable[[int, Random], Scene]] = {
    "objects": _objects,
    "sign": _sign,
    "chart": _chart,
    "form": _form,
    "marks": _marks,
}
