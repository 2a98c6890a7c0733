"""Questions that no training has seen, and what somebody would answer who does not look."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from PIL import Image

from comemo.nano.drawing import draw
from comemo.nano.questions import KINDS, Question, questions_about, questions_about_pair
from comemo.nano.scenes import LAYOUTS, SEEDS, Scene, make_pair, make_scene
from comemo.nano.words import COLOURS, DIRECTIONS, FIELDS, LETTERS, SHAPES, WORDS, place_names

PAIR = "pair"  # in place of a layout
MOST = 10_000  # questions of a call: seconds of work, and far fewer than there are seeds
# Kind -> layouts that can be asked so; they take turns.
LAYOUTS_OF = {
    "detail": ("objects", "sign", "chart", "form"),
    "place": ("objects", "sign", "marks"),
    "count": ("objects", "chart", "marks"),
    "colour": ("objects", "sign", "chart"),
    "yes/no": tuple(LAYOUTS),
    "compare": (PAIR,),
    "caption": ("objects", "sign", "chart", "form"),
}
_LEARNT = 400  # questions of each kind from which the best guesses are learnt


@dataclass(frozen=True)
class Example:
    """A question about one picture, or about two.

    Attributes:
        kind: a key of `KINDS`.
        question, answer: as in a chat; the answer is the right one.
        scenes: the pictures before they are drawn.
    """

    kind: str
    question: str
    answer: str
    scenes: tuple[Scene, ...]

    @property
    def seed(self) -> int:
        """Of the picture; two pictures have one."""
        return self.scenes[0].seed

    @property
    def layout(self) -> str:
        """A key of `LAYOUTS`, or "pair"."""
        return self.scenes[0].layout if len(self.scenes) == 1 else PAIR

    def pictures(self) -> list[Image.Image]:
        """Draw them: RGB images of 1,000 pixels and more."""
        return [draw(scene) for scene in self.scenes]


def held_out(count: int, kinds: Sequence[str] | None = None) -> list[Example]:
    """Questions about pictures of held-out seeds, each about a picture of its own.

    The first questions of a kind are always the same, whatever the count and the other kinds.

    Args:
        count: of questions, at most `MOST`. Kinds take turns, so they are equally common.
        kinds: keys of `KINDS`; None for all.

    Raises:
        ValueError: a count out of range; a kind that is unknown or named twice, or none.
    """
    if not isinstance(count, int) or not 1 <= count <= MOST:
        raise ValueError(f"held_out: the count must be from 1 to {MOST:,}, got {count!r}")
    chosen = list(KINDS) if kinds is None else list(kinds)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= KINDS.keys():
        raise ValueError(f"held_out: kinds must be different ones of {list(KINDS)}, got {chosen}")
    return _examples("held-out", count, chosen)


def _examples(part: str, count: int, kinds: list[str]) -> list[Example]:
    streams = [_of_kind(kind, part) for kind in kinds]
    return [next(streams[index % len(kinds)]) for index in range(count)]


def _of_kind(kind: str, part: str) -> Iterator[Example]:
    """Endless examples of a kind; no two kinds share a seed."""
    seeds = iter(SEEDS[part][list(KINDS).index(kind) :: len(KINDS)])
    while True:
        for layout in LAYOUTS_OF[kind]:
            fitting: list[Question] = []
            while not fitting:  # a picture may have nothing to ask so
                seed = next(seeds)
                random = Random(f"held out {seed}")
                if layout == PAIR:
                    scenes: tuple[Scene, ...] = make_pair(seed)
                    asked = questions_about_pair(scenes[0], scenes[1], random)
                else:
                    scenes = (make_scene(seed, layout),)
                    asked = questions_about(scenes[0], random)
                fitting = [question for question in asked if question.kind == kind]
            one = random.choice(fitting)
            yield Example(kind, one.text, one.answer, scenes)


_PLACES = {
    name
    for rows in range(1, 5)
    for cols in range(1, 5)
    for name in place_names(rows, cols).values()
}
_NAMED = {
    "PLACE": sorted(_PLACES, key=len, reverse=True),
    "COLOUR": COLOURS,
    "SHAPE": SHAPES,
    "TEXT": (*WORDS, *LETTERS, r"\d+"),
    "FIELD": FIELDS,
    "WAY": DIRECTIONS,
    "ORDINAL": ("first", "second"),
}


def form_of(question: str) -> str:
    """What is left of a question without the things that it names: "Which colour is the SHAPE?"."""
    for form, names in _NAMED.items():
        question = re.sub(rf"\b(?:{'|'.join(names)})\b", form, question)
    return re.sub(r"\ban? (?=COLOUR)", "a ", question)


@cache
def best_guesses() -> dict[str, str]:
    """The commonest answer to each form of question, in pictures of training.

    Returns:
        `form_of` a question -> answer.
    """
    answers: dict[str, Counter[str]] = {}
    for one in _examples("train", _LEARNT * len(KINDS), list(KINDS)):
        answers.setdefault(form_of(one.question), Counter())[one.answer] += 1
    return {form: counted.most_common(1)[0][0] for form, counted in answers.items()}
