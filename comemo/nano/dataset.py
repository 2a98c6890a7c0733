"""Write pictures and questions as training data: images and a JSONL file of conversations."""

import json
import os
import re
from multiprocessing import get_context
from pathlib import Path
from random import Random

from PIL import Image

from comemo.nano.drawing import draw, draw_item
from comemo.nano.questions import (
    Question,
    questions_about,
    questions_about_colours,
    questions_about_pair,
    questions_about_places,
)
from comemo.nano.scenes import (
    SEEDS,
    TEXTS,
    Item,
    Scene,
    make_item,
    make_lesson,
    make_pair,
    make_scene,
    make_shapes,
)
from comemo.nano.words import SHAPES

ROUND = 256  # pictures that a process draws before it takes others
ALBUM = 12  # pictures of an album
# Shapes, also many of them; words, letters and numbers of two digits.
_NAMES = re.compile(rf"\b(?:{'|'.join(SHAPES)})(?=(?:e?s)?\b)|\b(?:[A-Z]+|\d\d)\b")
ALONE = 0.25  # share of pictures that are described and nothing else
# How many times questions are made, so that most things of a picture are asked for.
TIMES = {"objects": 3, "marks": 2}
AGAIN = {
    "shapes": 2,
    "colours": 2,
    "lessons": 3,
    "talks": 2,
    "places": 2,
    "layouts": 2,
}  # conversations about a picture
PAIRS = 6  # every so manyth sample is a pair

Conversations = dict[str, list[list[Question]]]  # of a picture or two, by the file they are for


def write_items(folder: str | Path, count: int, first: int = 0) -> None:
    """Write pictures of one item each, with what they show: items.jsonl and its images.

    Args:
        folder: is created.
        count: of pictures.
        first: the first seed, in `SEEDS["train"]`.
    """
    _write(Path(folder), "items", count, first)


def write_albums(folder: str | Path, count: int, first: int = 0) -> None:
    """Write conversations in which each turn shows another single thing: albums.jsonl.

    Most of the things are text: reading is the hardest to learn, and here it is all there is to
    learn, since a question is right behind its picture.

    Args:
        folder: is created.
        count: of conversations, of `ALBUM` pictures each.
        first: the first seed, in `SEEDS["train"]`.
    """
    _write(Path(folder), "albums", count, first)


def write_shapes(folder: str | Path, count: int, first: int = 0) -> None:
    """Write pictures of four shapes, with conversations about their colours: shapes.jsonl.

    Args:
        folder: is created.
        count: of pictures.
        first: the first seed, in `SEEDS["train"]`.
    """
    _write(Path(folder), "shapes", count, first)


def write_lessons(folder: str | Path, count: int, first: int = 0) -> None:
    """Write pictures of four places, with conversations: lessons/ and three files about them.

    colours.jsonl asks for colours of things, lessons.jsonl for what is where, talks.jsonl for
    everything.

    Args:
        folder: is created.
        count: of pictures.
        first: the first seed, in `SEEDS["train"]`.
    """
    _write(Path(folder), "lessons", count, first)


def write_pictures(folder: str | Path, count: int, first: int = 0) -> None:
    """Write whole pictures, some in pairs, with conversations: pictures/ and files about them.

    pictures.jsonl asks for everything; places.jsonl for what is where among objects, and
    layouts.jsonl again for everything in pictures of other layouts.

    Args:
        folder: is created.
        count: of samples, pairs among them.
        first: the first seed, in `SEEDS["train"]`.
    """
    _write(Path(folder), "pictures", count, first)


def _write(folder: Path, name: str, count: int, first: int) -> None:
    seeds = range(first, first + count)
    each = ALBUM if name == "albums" else 1  # seeds that a line uses up
    ends = (first * each, (first + count) * each - 1)
    if count < 1 or any(seed not in SEEDS["train"] for seed in ends):
        raise ValueError(
            f"write_{name}: the seeds must be in {SEEDS['train']}, got {count} from {first}"
        )
    (folder / name).mkdir(parents=True, exist_ok=True)
    rounds = [(folder, name, seeds[start : start + ROUND]) for start in range(0, count, ROUND)]
    if len(rounds) == 1:  # starting processes takes longer
        written = [_write_round(rounds[0])]
    else:
        with get_context("spawn").Pool(os.cpu_count()) as pool:
            written = pool.map(_write_round, rounds, chunksize=1)
    for file in written[0]:
        lines = [line for own in written for line in own[file]]
        (folder / f"{file}.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_round(task: tuple[Path, str, range]) -> dict[str, list[str]]:
    """Draw some pictures; the lines of the files about them."""
    folder, name, seeds = task
    sample = {
        "items": _item_sample,
        "albums": _album_sample,
        "shapes": _shapes_sample,
        "lessons": _lesson_sample,
        "pictures": _picture_sample,
    }[name]
    lines: dict[str, list[str]] = {}
    for seed in seeds:
        images, conversations = sample(seed)
        paths = []
        for index, image in enumerate(images):
            path = f"{name}/{seed}{'abcdefghijkl'[index] if len(images) > 1 else ''}.jpg"
            image.save(folder / path, quality=92, subsampling=0)
            paths.append(path)
        for file, asked in conversations.items():
            own = lines.setdefault(file, [])
            own += [json.dumps(_line(paths, one, name == "albums")) + "\n" for one in asked if one]
    return lines


def _line(paths: list[str], asked: list[Question], one_each: bool) -> dict:
    """A line of the data; the pictures come all with the first question, or one with each."""
    turns = []
    for index, question in enumerate(asked):
        marks = "<image>\n" * (1 if one_each else len(paths) if index == 0 else 0)
        turns.append({"from": "human", "value": marks + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return {"image": paths[0] if len(paths) == 1 else paths, "conversations": turns}


def _item_sample(seed: int) -> tuple[list[Image.Image], Conversations]:
    random = Random(f"item sample {seed}")
    item = make_item(random)
    image = draw_item(item, seed).resize((128, 128), Image.Resampling.LANCZOS)
    return [image], {"items": [[_about_item(item, random)]]}


def _album_sample(seed: int) -> tuple[list[Image.Image], Conversations]:
    images, asked = [], []
    for own in range(seed * ALBUM, (seed + 1) * ALBUM):
        item, random = album_item(own)
        images.append(draw_item(item, own).resize((128, 128), Image.Resampling.LANCZOS))
        asked.append(_about_item(item, random))
    return images, {"albums": [asked]}


def album_item(seed: int) -> tuple[Item, Random]:
    """The thing of one picture of an album, and what chooses the question about it.

    Args:
        seed: of the picture: albums have `ALBUM` each, one after the other.
    """
    random = Random(f"album sample {seed}")
    return make_item(random, TEXTS), random


def _about_item(item: Item, random: Random) -> Question:
    form = random.random()
    if item.kind == "shape" and form < 0.2:
        return Question("colour", f"Which colour is the {item.text}?", item.colour)
    if form < 0.2:
        return Question("detail", f"Which {item.kind} is in the picture?", item.text)
    return Question("caption", "Describe the picture.", item.phrase())


def _shapes_sample(seed: int) -> tuple[list[Image.Image], Conversations]:
    random = Random(f"shapes sample {seed}")
    scene = make_shapes(seed)
    times = range(AGAIN["shapes"])
    asked = [questions_about_colours(scene, random) for _ in times]
    return [reduce(draw(scene))], {"shapes": asked}


def _lesson_sample(seed: int) -> tuple[list[Image.Image], Conversations]:
    random = Random(f"lesson sample {seed}")
    scene = make_lesson(seed)
    return [reduce(draw(scene))], {
        "colours": [questions_about_colours(scene, random) for _ in range(AGAIN["colours"])],
        "lessons": [questions_about_places(scene, random) for _ in range(AGAIN["lessons"])],
        "talks": [
            _in_turn(_asked(scene, random), random, scene.places()) for _ in range(AGAIN["talks"])
        ],
    }


def _picture_sample(seed: int) -> tuple[list[Image.Image], Conversations]:
    random = Random(f"picture sample {seed}")
    if seed % PAIRS == 0:
        scenes: tuple[Scene, ...] = make_pair(seed)
        asked = [
            question
            for _ in range(TIMES["objects"])
            for question in questions_about_pair(scenes[0], scenes[1], random)
        ]
    else:
        scenes = (make_scene(seed),)
        asked = _asked(scenes[0], random)
    places = {} if len(scenes) > 1 else scenes[0].places()
    conversations: Conversations = {"pictures": [_in_turn(asked, random, places)]}
    conversations |= {"places": [], "layouts": []}
    if len(scenes) == 1 and scenes[0].layout == "objects":
        times = range(AGAIN["places"])
        conversations["places"] = [questions_about_places(scenes[0], random) for _ in times]
    elif len(scenes) == 1:
        again = [_asked(scenes[0], random) for _ in range(AGAIN["layouts"])]
        conversations["layouts"] = [_in_turn(one, random, places) for one in again]
    return [reduce(draw(scene)) for scene in scenes], conversations


def _asked(scene: Scene, random: Random) -> list[Question]:
    times = range(TIMES.get(scene.layout, 1))
    return [question for _ in times for question in questions_about(scene, random)]


def _in_turn(asked: list[Question], random: Random, places: dict) -> list[Question]:
    """Questions of which none answers another: looking back at text is easier than seeing.

    What names everything comes last, or alone.
    """
    asked = list(dict.fromkeys(asked))
    random.shuffle(asked)
    whole = [question for question in asked if question.kind in ("list", "caption")][:1]
    if whole and random.random() < ALONE:
        return whole
    chosen, named = [], set[object]()
    for question in asked:
        own = _names(question, places)
        if question.kind not in ("list", "caption") and not own & named:
            chosen.append(question)
            named |= own
    return chosen + whole


def _names(question: Question, places: dict) -> set[object]:
    """The shapes, texts and places that a question or its answer names."""
    text = f"{question.text} {question.answer}"
    found: set[object] = set(_NAMES.findall(text))
    found |= {place for place, name in places.items() if _has(text, name)}
    if "arrow" in text:
        found.add("arrow")
    if question.kind == "count":  # one is enough
        found.add("count")
    return found


def _has(text: str, name: str) -> bool:
    return re.search(rf"{name}(?![\w-])", text) is not None


def reduce(image: Image.Image) -> Image.Image:
    """At two fifths, still twice as wide as the tiles that nano sees, so that reading is quick."""
    return image.resize((image.width * 2 // 5, image.height * 2 // 5), Image.Resampling.LANCZOS)
