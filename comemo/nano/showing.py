"""Pictures and questions for people who try comemo-nano: of seeds that no training has seen."""

from random import Random

from comemo.nano.questions import KINDS, Question, questions_about
from comemo.nano.scenes import LAYOUTS, SEEDS, Scene, make_scene

PICTURES = len(SEEDS["demo"])


def shown_scene(number: int, layout: str | None = None) -> Scene:
    """Think of a picture to show.

    Args:
        number: of the picture, from 0; the same number and layout give the same scene.
        layout: a key of `LAYOUTS`; None for mostly "objects", which has most to ask about.

    Raises:
        ValueError: no such number, or an unknown layout.
    """
    if not 0 <= number < PICTURES:
        raise ValueError(f"shown_scene: wanted a number from 0 to {PICTURES - 1:,}, got {number!r}")
    seed = SEEDS["demo"][number]
    if layout is None:
        weights = [8 if name == "objects" else 1 for name in LAYOUTS]
        layout = Random(f"shown {seed}").choices(list(LAYOUTS), weights)[0]
    return make_scene(seed, layout)


def shown_questions(scene: Scene) -> list[Question]:
    """Questions about a picture to show: one of each form that fits, kinds in the order of `KINDS`.

    The description of a crowded picture is left out: it is long, and not asked in tests either.
    """
    asked = questions_about(scene, Random(f"shown {scene.seed}"))
    kinds = list(KINDS)
    return sorted(
        (question for question in asked if question.kind in KINDS),
        key=lambda question: kinds.index(question.kind),
    )


def one_of_each_kind(questions: list[Question]) -> list[Question]:
    """The first question of each kind."""
    return list({question.kind: question for question in reversed(questions)}.values())[::-1]
