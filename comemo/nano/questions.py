"""Questions about drawn pictures, with their answers."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from comemo.nano.scenes import Item, Scene
from comemo.nano.words import (
    COLOURS,
    DIRECTIONS,
    LETTERS,
    SHAPES,
    WORDS,
    listed,
    with_article,
)

# What a kind asks for.
KINDS = {
    "detail": "a word, number or letter that only the tiles show",
    "place": "what is at a place, or where something is",
    "count": "how many",
    "colour": "the colour of something",
    "yes/no": "whether something is so; half of the answers are yes",
    "compare": "two pictures",
    "caption": "everything in a picture of up to four things",
}


@dataclass(frozen=True)
class Question:
    """A question and the right answer.

    Attributes:
        kind: a key of `KINDS`, or "list", which is learnt but not asked in tests.
        text, answer: as in a chat.
    """

    kind: str
    text: str
    answer: str


def questions_about(scene: Scene, random: Random) -> list[Question]:
    """Questions about one picture: one of each form that fits it, in any order.

    Args:
        scene: of `make_scene`.
        random: chooses what is asked for.
    """
    asked = list(_FORMS[scene.layout](scene, random))
    random.shuffle(asked)
    return asked


def questions_about_colours(scene: Scene, random: Random) -> list[Question]:
    """The colour of each thing of "objects", in any order; not of things whose name is not unique.

    Args:
        scene: of `make_lesson`, or "objects" of `make_scene`.
        random: chooses the order.
    """
    things = list(scene.items.values())
    named = Counter(item.text for item in things)
    asked = [
        Question("colour", f"Which colour is the {_plain(item)}?", item.colour)
        for item in things
        if named[item.text] == 1
    ]
    random.shuffle(asked)
    return asked


def questions_about_places(scene: Scene, random: Random) -> list[Question]:
    """What is where: one question about each place of "objects", in any order.

    Most ask for what is at a place or where something is, some for a colour. Few of them are about
    empty places.

    Args:
        scene: of `make_lesson`, or "objects" of `make_scene`.
        random: chooses what is asked for.
    """
    asked, nothing, things = [], [], list(scene.items.values())
    for place, name in scene.places().items():
        item, form = scene.items.get(place), random.random()
        if item is None:
            nothing.append(Question("place", f"What is {name}?", "nothing"))
        elif form < 0.4 and _count(things, item) == 1:
            asked.append(Question("place", f"Where is {_the(item)}?", name))
        elif form < 0.55 and sum(thing.text == item.text for thing in things) == 1:
            asked.append(Question("colour", f"Which colour is the {_plain(item)}?", item.colour))
        elif form < 0.65 and item.kind == "shape":
            asked.append(Question("colour", f"Which colour is the shape {name}?", item.colour))
        elif form < 0.65:
            asked.append(Question("detail", f"What is written {name}?", item.text))
        else:
            asked.append(Question("place", f"What is {name}?", item.phrase()))
    asked += random.sample(nothing, min(len(nothing), max(1, len(asked) // 4)))
    random.shuffle(asked)
    return asked


def questions_about_pair(first: Scene, second: Scene, random: Random) -> list[Question]:
    """Questions about two pictures that are shown together.

    Args:
        first, second: of `make_pair`.
        random: chooses what is asked for.
    """
    asked = list(_pair(first, second, random))
    random.shuffle(asked)
    return asked


def _yes_no(random: Random, text: Callable[[bool], str | None]) -> Iterator[Question]:
    """A question whose answer is first chosen; `text` writes one that has it, if there is one."""
    answer = random.random() < 0.5
    for _ in range(20):  # otherwise "yes" would be commoner, where "no" is hard to find
        if (written := text(answer)) is not None:
            yield Question("yes/no", written, "yes" if answer else "no")
            return


def _objects(scene: Scene, random: Random) -> Iterator[Question]:
    places, items = scene.places(), scene.items
    things = list(items.values())
    shapes = [item for item in things if item.kind == "shape"]
    texts = [(place, item) for place, item in items.items() if item.kind != "shape"]

    # Mostly where something is, sometimes where nothing is.
    empty = [place for place in places if place not in items]
    target = random.choice(empty if empty and random.random() < 0.2 else list(items))
    found = items[target].phrase() if target in items else "nothing"
    yield Question("place", f"What is {places[target]}?", found)
    if texts:
        place, item = random.choice(texts)
        yield Question("detail", f"What is written {places[place]}?", item.text)
    for kind in ("word", "number", "letter"):
        own = [item for item in things if item.kind == kind]
        if len(own) == 1:
            yield Question("detail", f"Which {kind} is in the picture?", own[0].text)
        alone = [item for item in own if [o.colour for o in own].count(item.colour) == 1]
        if len(own) > 1 and alone:
            item = random.choice(alone)
            yield Question("detail", f"Which {kind} is {item.colour}?", item.text)
    single = [place for place, item in items.items() if _count(things, item) == 1]
    if single:
        place = random.choice(single)
        yield Question("place", f"Where is {_the(items[place])}?", places[place])
    shape = random.choice(SHAPES)
    own = [item for item in shapes if item.text == shape]
    once = [s for s, count in Counter(item.text for item in shapes).items() if count == 1]
    if once:
        chosen = random.choice(once)
        own = [item for item in shapes if item.text == chosen]
        if len(own) == 1:
            yield Question("colour", f"Which colour is the {own[0].text}?", own[0].colour)
    coloured = [place for place, item in items.items() if item.kind == "shape"]
    if coloured:
        place = random.choice(coloured)
        yield Question("colour", f"Which colour is the shape {places[place]}?", items[place].colour)
    yield Question("count", "How many shapes are there?", str(len(shapes)))
    if shapes and random.random() < 0.7:
        shape = random.choice(shapes).text
    count = sum(item.text == shape for item in shapes)
    yield Question("count", f"How many {plural(shape)} are there?", str(count))
    kind = random.choice(("word", "number", "letter"))
    count = sum(item.kind == kind for item in things)
    yield Question("count", f"How many {kind}s are there?", str(count))

    def is_there(yes: bool) -> str | None:
        item = random.choice(things)
        if not yes:
            kind, text, colour = item.kind, item.text, item.colour
            if kind != "shape":
                text = _other(random, text)
            elif random.random() < 0.5:
                colour = random.choice([c for c in COLOURS if c != colour])
            else:
                text = random.choice([s for s in SHAPES if s != text])
            item = Item(kind, text, colour)
            if _count(things, item):
                return None
        return f"Is there {item.phrase()}?"

    def is_at(yes: bool) -> str | None:
        place, item = random.choice(list(items.items()))
        others = [p for p in places if p not in items or _count([items[p]], item) == 0]
        if yes or others:
            return f"Is {_the(item)} {places[place if yes else random.choice(others)]}?"
        return None

    yield from _yes_no(random, is_there)
    if single:
        yield from _yes_no(random, is_at)
    whole = listed([item.phrase() for item in things])
    if len(items) <= 4:
        yield Question("caption", "Describe the picture.", whole)
    else:
        yield Question("list", "Describe everything in the picture.", whole)


def _the(item: Item) -> str:
    return f"the {item.colour} {item.text}" if item.kind == "shape" else item.phrase()


def _plain(item: Item) -> str:
    """Its name without the colour."""
    return item.text if item.kind == "shape" else f"{item.kind} {item.text}"


def _count(things: list[Item], item: Item) -> int:
    """How many of the things answers name like this one."""
    return sum(thing.phrase() == item.phrase() for thing in things)


def plural(noun: str) -> str:
    """More than one: "stars", "crosses"."""
    return noun + ("es" if noun == "cross" else "s")


def _other(random: Random, text: str) -> str:
    """Another text of the same kind."""
    if text.isdigit():
        digits = [str(random.randint(1, 9)), str(random.randint(0, 9))]
        changed = digits[0] + text[1] if random.random() < 0.5 else text[0] + digits[1]
        return changed if changed != text else _other(random, text)
    pool = [w for w in WORDS if w != text] if len(text) > 1 else [c for c in LETTERS if c != text]
    return random.choice(pool)


def _sign(scene: Scene, random: Random) -> Iterator[Question]:
    word, number = scene.sign["word"], scene.sign["number"]
    colour, arrow = scene.sign["colour"], scene.sign["arrow"]
    yield Question("detail", "Which number is on the sign?", number)
    yield Question("detail", "What does the sign say?", word)
    yield Question("colour", "Which colour is the sign?", colour)
    yield Question("place", "Where does the arrow point?", arrow)
    yield Question(
        "caption", "Describe the picture.", f"{with_article(colour)} sign that says {word}"
    )
    yield from _yes_no(
        random, lambda yes: f"Does the sign say {word if yes else _other(random, word)}?"
    )
    yield from _yes_no(
        random,
        lambda yes: (
            "Does the arrow point "
            f"{arrow if yes else random.choice([way for way in DIRECTIONS if way != arrow])}?"
        ),
    )


def _chart(scene: Scene, random: Random) -> Iterator[Question]:
    bars = scene.bars
    highest, lowest = (find(bars, key=lambda bar: bar.value) for find in (max, min))
    one, two, three = (random.choice(bars) for _ in range(3))
    yield Question("detail", f"What is the value of the {one.colour} bar?", str(one.value))
    yield Question("detail", f"Which letter is under the {two.colour} bar?", two.letter)
    yield Question("colour", f"Which colour is the bar {three.letter}?", three.colour)
    yield Question("colour", "Which colour is the highest bar?", highest.colour)
    yield Question("colour", "Which colour is the lowest bar?", lowest.colour)
    yield Question("count", "How many bars are there?", str(len(bars)))
    text = f"a chart of {len(bars)} bars, the {highest.colour} bar is the highest"
    yield Question("caption", "Describe the picture.", text)
    low, high = sorted(random.sample(bars, 2), key=lambda bar: bar.value)
    yield from _yes_no(
        random,
        lambda yes: (
            f"Is the {(high if yes else low).colour} bar higher than the"
            f" {(low if yes else high).colour} bar?"
        ),
    )


def _form(scene: Scene, random: Random) -> Iterator[Question]:
    for name, item in scene.fields.items():
        yield Question("detail", f"What is the {name}?", item.text)
    listing = listed([f"{name} {item.text}" for name, item in scene.fields.items()])
    yield Question("caption", "Describe the picture.", f"a form with {listing}")
    name, item = random.choice(list(scene.fields.items()))
    yield from _yes_no(
        random, lambda yes: f"Is the {name} {item.text if yes else _other(random, item.text)}?"
    )


def _marks(scene: Scene, random: Random) -> Iterator[Question]:
    places = scene.places()

    (ring,) = (place for place, item in scene.items.items() if item.text == "ring")
    yield Question("place", "Where is the ring?", places[ring])
    target = random.choice(list(places))
    if random.random() < 0.6:
        target = random.choice(list(scene.items))
    found = with_article(scene.items[target].text) if target in scene.items else "nothing"
    yield Question("place", f"What is {places[target]}?", found)
    counts = Counter(item.text for item in scene.items.values())
    yield Question("count", "How many crosses are there?", str(counts["cross"]))
    yield Question("count", "How many dots are there?", str(counts["dot"]))

    def is_marked(yes: bool) -> str | None:
        fitting = [place for place in places if (place in scene.items) == yes]
        return f"Is there a mark {places[random.choice(fitting)]}?" if fitting else None

    yield from _yes_no(random, is_marked)


def _pair(first: Scene, second: Scene, random: Random) -> Iterator[Question]:
    both = list(first.items.values()), list(second.items.values())
    which = random.randrange(2)
    only = [item for item in both[which] if not _count(both[1 - which], item)]
    ordinal = ("first", "second")
    if only:
        item = random.choice(only)
        yield Question("compare", f"Which picture has {item.phrase()}?", f"the {ordinal[which]}")
    if len(both[0]) != len(both[1]):
        more = int(len(both[1]) > len(both[0]))
        yield Question("compare", "Which picture has more things?", f"the {ordinal[more]}")
    for kind in ("word", "number", "letter"):
        own = [item for item in both[which] if item.kind == kind]
        if len(own) == 1:
            text = f"Which {kind} is in the {ordinal[which]} picture?"
            yield Question("compare", text, own[0].text)
    counts = Counter(item.text for item in both[which] if item.kind == "shape")
    once = [shape for shape, count in counts.items() if count == 1]
    if once:
        shape = random.choice(once)
        (colour,) = (item.colour for item in both[which] if item.text == shape)
        text = f"Which colour is the {shape} in the {ordinal[which]} picture?"
        yield Question("compare", text, colour)
    count = str(len(both[which]))
    yield Question("compare", f"How many things are in the {ordinal[which]} picture?", count)
    text = f"Describe the {ordinal[which]} picture."
    yield Question("list", text, listed([item.phrase() for item in both[which]]))


_FORMS: dict[str, Callable[[Scene, Random], Iterator[Question]]] = {
    "objects": _objects,
    "sign": _sign,
    "chart": _chart,
    "form": _form,
    "marks": _marks,
}
