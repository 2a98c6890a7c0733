"""Drawn pictures and questions about them: the same for a seed, right for the scene, all inside."""

import itertools
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from comemo.images import choose_grid
from comemo.nano import dataset, drawing, words
from comemo.nano.drawing import draw, draw_item
from comemo.nano.questions import questions_about
from comemo.nano.scenes import LAYOUTS, SEEDS, SIZES, make_item, make_lesson, make_pair, make_scene

TILE = 64
LAYOUT = st.sampled_from([None, *LAYOUTS])
SEED = st.one_of(*(st.integers(seeds[0], seeds[-1]) for seeds in SEEDS.values()))


# --- the same for a seed ---


@given(seed=SEED, layout=LAYOUT)
def test_a_seed_gives_one_scene_and_its_questions(seed, layout):
    scene, again = (make_scene(seed, layout) for _ in range(2))
    assert scene == again
    assert questions_about(scene, Random(seed)) == questions_about(again, Random(seed))
    assert make_pair(seed) == make_pair(seed)
    assert make_lesson(seed) == make_lesson(seed)
    assert layout in (None, make_scene(seed, layout).layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_seed_gives_the_same_pixels(layout):
    first, again, other = (draw(make_scene(seed, layout)) for seed in (7, 7, 8))
    assert first.mode == "RGB"
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_items_alone_are_squares_of_the_same_pixels():
    item = make_item(Random(1))
    first, again, other = (draw_item(item, seed) for seed in (3, 3, 4))
    assert (first.size, first.mode) == ((320, 320), "RGB")
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_no_seed_is_in_two_ranges():
    ranges = sorted(SEEDS.values(), key=lambda seeds: seeds.start)
    assert all(low.stop <= high.start for low, high in pairwise(ranges))
    assert SEEDS.keys() == {"train", "held-out", "demo"}
    assert all(len(seeds) > 10**9 for seeds in ranges)


# --- sizes ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("most", [12, 6])
def test_a_place_is_about_a_tile(size, most):
    """Of every size with 12 tiles, of the sizes of pairs with 6; reduced pictures as well."""
    width, height, rows, cols = SIZES[size]
    assert max(width, height) >= 1000
    assert rows * cols <= 12
    if most == 12 or size in {half.size for seed in range(50) for half in make_pair(seed)}:
        assert choose_grid(width, height, 1, most, TILE) == (cols, rows)
        small = dataset.reduce(Image.new("RGB", (width, height)))
        assert choose_grid(*small.size, 1, most, TILE) == (cols, rows)
        assert min(small.width / cols, small.height / rows) >= TILE


def test_pictures_have_the_size_of_their_scene():
    drawn = {}
    for seed in range(60):
        for scene in (make_scene(seed), *make_pair(seed)):
            if scene.size not in drawn:
                drawn[scene.size] = draw(scene).size
    assert drawn == {name: (width, height) for name, (width, height, _, _) in SIZES.items()}


# --- what is drawn ---


class Spy:
    """Notes what text is written where, in place of a method of Pillow."""

    def __init__(self, monkeypatch):
        self.written = []
        original = ImageDraw.ImageDraw.text

        def text(pen, at, words, *rest, **options):
            self.written.append((words, pen.textbbox(at, words, *rest[1:], **options)))
            return original(pen, at, words, *rest, **options)

        monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)


def texts_of(scene):
    if scene.layout == "sign":
        return [scene.sign["word"], scene.sign["number"]]
    if scene.layout == "chart":
        return [part for bar in scene.bars for part in (str(bar.value), bar.letter)]
    if scene.layout == "form":
        return [part for name, item in scene.fields.items() for part in (name, item.text)]
    return [item.text for item in scene.items.values() if item.kind in ("word", "number", "letter")]


@pytest.mark.parametrize("layout", ["objects", "sign", "chart", "form", "lesson"])
def test_texts_are_whole_and_do_not_touch(layout, monkeypatch):
    spy = Spy(monkeypatch)
    for seed in range(20):
        scene = make_lesson(seed) if layout == "lesson" else make_scene(seed, layout)
        spy.written.clear()
        width, height = draw(scene).size
        assert [text for text, _ in spy.written] == texts_of(scene)
        for text, (left, top, right, bottom) in spy.written:
            assert 0 <= left < right <= width, (seed, text)
            assert 0 <= top < bottom <= height, (seed, text)
        for index, (one, a) in enumerate(spy.written):
            for two, b in spy.written[:index]:
                apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
                assert apart, (seed, one, two)


@pytest.mark.parametrize("seed", range(12))
def test_things_stay_in_their_places(seed):
    """Where nothing is, the picture is that of the scene without any thing."""
    scene = make_scene(seed, "objects")
    ground = drawing.draw_ground(
        Random(f"pixels {seed} {scene.size} {len(scene.items)}"),
        scene.ground,
        SIZES[scene.size][:2],
    )
    image = draw(scene)
    rows, cols = scene.shape
    wide, high = image.width / cols, image.height / rows
    for row, col in scene.places():
        corners = (col * wide, row * high, (col + 1) * wide, (row + 1) * high)
        box = tuple(map(round, corners))
        same = image.crop(box).tobytes() == ground.crop(box).tobytes()
        assert same == ((row, col) not in scene.items), (row, col)


def test_lessons_have_four_places_and_never_none_filled():
    for seed in range(60):
        lesson = make_lesson(seed)
        assert lesson.shape == (2, 2)
        assert lesson.items
        assert lesson.items.keys() <= lesson.places().keys()
        width, height, rows, cols = lesson.extent
        assert choose_grid(width, height, 1, 4, TILE) == (cols, rows)


# --- places ---


@pytest.mark.parametrize("rows", range(1, 5))
@pytest.mark.parametrize("cols", range(1, 5))
def test_names_of_places_name_one(rows, cols):
    names = words.place_names(rows, cols)
    assert len(names) == rows * cols
    assert len(set(names.values())) == len(names)
    assert set(names) == {(row, col) for row in range(rows) for col in range(cols)}


def test_names_of_places_in_words():
    named = words.place_names(3, 3)
    assert named[0, 0] == "at the top left"
    assert named[0, 1] == "at the top centre"
    assert named[1, 1] == "at the middle centre"
    assert named[2, 2] == "at the bottom right"
    assert words.place_names(2, 4)[1, 1] == "at the bottom centre-left"
    assert words.place_names(4, 3)[1, 2] == "at the upper right"


def test_a_name_tells_how_far_down_and_right_in_every_grid():
    found = {}
    for rows in range(1, 5):
        for cols in range(1, 5):
            for (row, col), name in words.place_names(rows, cols).items():
                *_, down, right = name.split()
                found.setdefault(down, set()).add((row + 0.5) / rows)
                found.setdefault(right, set()).add((col + 0.5) / cols)
    for names in (words.ROWS, words.COLUMNS):
        ends = [(min(found[name]), max(found[name])) for name in names]
        assert all(one[1] < other[0] for one, other in itertools.pairwise(ends))


def test_phrases():
    assert [words.with_article(word) for word in ("orange star", "red star")] == [
        "an orange star",
        "a red star",
    ]
    assert [words.listed(list("abc"[:count])) for count in range(4)] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


@pytest.mark.parametrize("make", [make_scene, make_pair, make_lesson])
def test_other_seeds_are_refused(make):
    for seed in (-1, 2**42, 1.5, "7", None):
        with pytest.raises(
            ValueError, match=rf"{make.__name__}: the seed must be in one of .*, got"
        ):
            make(seed)


def test_an_unknown_layout_is_refused():
    with pytest.raises(
        ValueError, match=r"make_scene: the layout must be of .*'sign'.*, got 'map'"
    ):
        make_scene(1, "map")
