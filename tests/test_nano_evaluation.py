"""Held-out questions, scores, and how often the checkpoint that comes with the package is right."""

import itertools
import json
from collections import Counter

import pytest

from comemo.chat.session import ChatSession
from comemo.cli.arguments import shipped_checkpoint
from comemo.cli.checkpoints import load_checkpoint
from comemo.images import load_image
from comemo.nano import evaluation, held_out
from comemo.nano.evaluation import evaluate, wilson
from comemo.nano.questions import KINDS
from comemo.nano.scenes import LAYOUTS, SEEDS

pytestmark = pytest.mark.usefixtures("one_thread")

ACCURACY = 0.930  # of 1,000 questions, as README.md says
NOT_YET: tuple[str, ...] = ()  # kinds that it answers no better than chance


@pytest.fixture(scope="module")
def loaded():
    return load_checkpoint(shipped_checkpoint())


@pytest.fixture(scope="module")
def result(loaded):
    """42 answers of the checkpoint."""
    return evaluate(*loaded, 42)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # the roots p of (right / n - p)^2 = Z^2 p (1 - p) / n
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (8, 10, 0.490162, 0.943318),
        (50, 100, 0.403832, 0.596168),
        (900, 1000, 0.879848, 0.917091),
        (1, 1, 0.206549, 1.0),
    ],
)
def test_the_interval_is_wilsons(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (2, 1), (-1, 5)])
def test_an_interval_of_nothing(right, n):
    with pytest.raises(ValueError, match=r"^wilson: wanted 0 <= right <= n"):
        wilson(right, n)


def test_no_seed_is_shared():
    """Neither by two purposes, nor by two questions."""
    parts = sorted(SEEDS.values(), key=lambda seeds: seeds.start)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(parts))
    examples = held_out.held_out(1000)
    seeds = [scene.seed for one in examples for scene in one.scenes[:1]]
    assert len(set(seeds)) == 1000
    assert all(scene.seed in SEEDS["held-out"] for one in examples for scene in one.scenes)
    assert all(one.seed not in SEEDS["train"] for one in examples)


def test_kinds_are_equally_common_and_layouts_take_turns():
    examples = held_out.held_out(1000)
    counts = Counter(one.kind for one in examples)
    assert counts.keys() == KINDS.keys()
    assert set(counts.values()) == {142, 143}
    for kind, layouts in held_out.LAYOUTS_OF.items():
        shown = Counter(one.layout for one in examples if one.kind == kind)
        assert shown.keys() == set(layouts)
        assert max(shown.values()) - min(shown.values()) <= 1
    assert {one.layout for one in examples} == {*LAYOUTS, "pair"}
    assert all(len(one.scenes) == 1 + (one.kind == "compare") for one in examples)


def test_questions_are_always_the_same():
    few, many = held_out.held_out(30), held_out.held_out(70)
    assert few == many[:30] == held_out.held_out(30)
    places = held_out.held_out(6, ["place", "yes/no"])
    assert places[::2] == [one for one in many if one.kind == "place"][:3]
    first = few[0].pictures()[0]
    assert first.tobytes() == held_out.held_out(1)[0].pictures()[0].tobytes()
    assert len(many[5].pictures()) == 2


@pytest.mark.parametrize(
    ("count", "kinds", "said"),
    [
        (0, None, "count must be from 1 to 10,000, got 0"),
        (10_001, None, "got 10001"),
        (1.5, None, "got 1.5"),
        (5, [], "kinds must be different ones of"),
        (5, ["place", "place"], "kinds must be different"),
        (5, ["smell"], "'smell'"),
    ],
)
def test_questions_that_cannot_be_asked(count, kinds, said):
    with pytest.raises(ValueError, match=f"^held_out: .*{said}"):
        held_out.held_out(count, kinds)


@pytest.mark.parametrize(
    ("question", "form"),
    [
        ("Which colour is the star?", "Which colour is the SHAPE?"),
        ("Is the red star at the top left?", "Is the COLOUR SHAPE PLACE?"),
        ("Is there an orange ring?", "Is there a COLOUR SHAPE?"),
        ("What is at the upper centre-left?", "What is PLACE?"),
        ("What is the value of the white bar?", "What is the value of the COLOUR bar?"),
        ("Does the arrow point left?", "Does the arrow point WAY?"),
        ("Is the CODE 47?", "Is the FIELD TEXT?"),
        ("Which picture has the word TEA?", "Which picture has the word TEXT?"),
        ("Which word is in the first picture?", "Which word is in the ORDINAL picture?"),
    ],
)
def test_forms_are_questions_without_their_things(question, form):
    assert held_out.form_of(question) == form


def test_chance_is_that_of_the_commonest_answer(monkeypatch):
    """Scores of made-up answers: every third one is right."""
    examples = held_out.held_out(700)
    guesses = held_out.best_guesses()
    answers = iter([f" {one.answer}\n" if i % 3 == 0 else "?" for i, one in enumerate(examples)])
    monkeypatch.setattr(
        evaluation, "_answer", lambda model, processor, some, tiles: [next(answers) for _ in some]
    )
    done = []
    result = evaluate(None, None, 700, tiles=12, batch=64, done=done.append)
    assert (done[:2], done[-1]) == ([64, 128], 700)
    assert (result.overall.n, result.overall.right) == (700, 234)
    assert (result.overall.low, result.overall.high) == wilson(234, 700)
    assert list(result.kinds) == list(KINDS)
    assert len(result.wrong()) == 700 - 234
    guessed = {
        kind: [guesses[held_out.form_of(one.question)] == one.answer for one in of_kind]
        for kind in KINDS
        if (of_kind := [one for one in examples if one.kind == kind])
    }
    for kind, score in result.kinds.items():
        assert (score.n, score.chance) == (100, sum(guessed[kind]) / 100)
        assert score.accuracy == score.right / 100
    assert 0.4 < result.kinds["yes/no"].chance < 0.6, "answers are balanced"
    assert result.kinds["detail"].chance < 0.15
    facts = json.loads(json.dumps(result.facts()))
    assert facts["overall"]["right"] == sum(one["right"] for one in facts["answers"]) == 234
    assert (facts["questions"], facts["tiles"]) == (700, 12)
    assert facts["answers"][1]["truth"] == examples[1].answer
    assert facts["answers"][1]["seed"] == examples[1].seed


@pytest.mark.parametrize(
    ("options", "said"),
    [({"batch": 0}, "batch"), ({"tiles": 0}, "tiles"), ({"tiles": 5000}, "tiles")],
)
def test_evaluations_that_cannot_be_done(loaded, options, said):
    with pytest.raises(ValueError, match=f"^evaluate: {said} must be"):
        evaluate(*loaded, 1, **options)


def test_a_batch_answers_as_a_session_does(loaded, result):
    model, processor = loaded
    for one, answer in zip(result.examples[:7], result.answers, strict=False):
        session = ChatSession(model, processor, max_new_tokens=64, do_sample=False)
        most = model.config.max_dynamic_patch
        shown = [load_image(picture, 64, most) for picture in one.pictures()]
        assert session.ask(one.question, shown) == answer
    assert evaluate(*loaded, 5, batch=2).answers == result.answers[:5]


def test_the_checkpoint_is_above_chance(result):
    assert result.overall.accuracy > max(result.overall.chance, ACCURACY - 0.15)


@pytest.mark.slow
def test_the_checkpoint_is_as_good_as_we_say(loaded):
    whole = evaluate(*loaded, 1000)
    low, _ = wilson(round(1000 * ACCURACY), 1000)
    assert whole.overall.accuracy >= low
    for kind, score in whole.kinds.items():
        assert (score.low > score.chance) == (kind not in NOT_YET), kind
    blind = evaluate(*loaded, 100, ["detail"], tiles=1)
    assert blind.overall.high < whole.kinds["detail"].low, "details need tiles"
