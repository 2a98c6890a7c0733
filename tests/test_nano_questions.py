"""Questions about drawn pictures: each has one answer, the right one, and no answer is common."""

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nano_truth import answers_about_pair, answers_to, form_of

from comemo.nano.questions import KINDS, questions_about, questions_about_pair
from comemo.nano.scenes import LAYOUTS, SEEDS, make_pair, make_scene
from comemo.nano.words import COLOURS

SEED = st.one_of(*(st.integers(seeds[0], seeds[-1]) for seeds in SEEDS.values()))
NUMBER = st.integers(0, 2**32)
MANY = 1500  # questions of a form


@given(seed=SEED, asking=NUMBER, layout=st.sampled_from(list(LAYOUTS)))
def test_every_question_has_one_answer_and_it_is_given(seed, asking, layout):
    scene = make_scene(seed, layout)
    asked = questions_about(scene, Random(asking))
    assert asked
    for question in asked:
        assert answers_to(scene, question.text) == [question.answer], question
        assert question.kind in {*KINDS, "list"}


@given(seed=SEED, asking=NUMBER)
def test_every_question_about_a_pair_has_one_answer_and_it_is_given(seed, asking):
    pair = make_pair(seed)
    asked = questions_about_pair(*pair, Random(asking))
    assert asked
    for question in asked:
        assert answers_about_pair(pair, question.text) == [question.answer], question
        assert question.kind in ("compare", "list")


@pytest.fixture(scope="module")
def many():
    """Many questions about every layout, with the form of each."""
    found = []
    for layout in LAYOUTS:
        for seed in range(MANY):
            scene = make_scene(seed, layout)
            for question in questions_about(scene, Random(f"{layout} {seed}")):
                found.append((form_of(scene, question.text), scene, question))
    return found


@pytest.mark.slow
def test_a_few_thousand_are_right_as_well(many):
    for _, scene, question in many:
        assert answers_to(scene, question.text) == [question.answer], (scene, question)
    for seed in range(MANY):
        pair = make_pair(seed)
        for question in questions_about_pair(*pair, Random(seed)):
            assert answers_about_pair(pair, question.text) == [question.answer], question


def test_half_of_the_answers_to_each_form_of_yes_or_no_are_yes(many):
    """Within an interval that a fair coin leaves in one of 15,000 trials."""
    answers = {}
    for form, _, question in many:
        if question.kind == "yes/no":
            answers.setdefault(form, []).append(question.answer)
    assert len(answers) == 7
    for form, given_ in answers.items():
        count = Counter(given_)
        assert set(count) == {"yes", "no"}
        assert len(given_) > 0.8 * MANY, form
        assert abs(count["yes"] - len(given_) / 2) < 4 * math.sqrt(len(given_)) / 2, (form, count)


def test_what_is_asked_for_does_not_tell_yes_from_no(many):
    """A colour, a kind of thing or a place in the question is as common with both answers."""
    counts = {}
    for form, _, question in many:
        if question.kind == "yes/no":
            for word in question.text.strip("?").split():
                if word in COLOURS or word in ("word", "number", "letter") or word.isdigit():
                    counts.setdefault((*form, word), Counter())[question.answer] += 1
    assert len(counts) > 20
    for key, count in counts.items():
        total = count.total()
        assert abs(count["yes"] - total / 2) < 4.5 * math.sqrt(total) / 2, (key, count)


def test_every_kind_and_every_form_occur(many):
    by_kind = Counter(question.kind for _, _, question in many)
    pairs = [q for seed in range(100) for q in questions_about_pair(*make_pair(seed), Random(seed))]
    by_kind.update(question.kind for question in pairs)
    assert set(by_kind) == {*KINDS, "list"}
    assert min(by_kind.values()) > 100
    assert {"the first", "the second"} <= {question.answer for question in pairs}
    forms = Counter(form for form, _, _ in many)
    assert min(forms.values()) > 100, forms


def test_captions_are_of_few_things(many):
    """What a picture of more shows is learnt as "list", and not asked in tests."""
    objects = [(q.kind, len(s.items)) for (layout, _), s, q in many if layout == "objects"]
    assert {count for kind, count in objects if kind == "caption"} == {1, 2, 3, 4}
    assert {count for kind, count in objects if kind == "list"} == {5, 6, 7, 8, 9}
