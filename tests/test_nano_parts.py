"""What image tokens of whole pictures are said to show."""

import pytest
import torch

from comemo.nano import tower
from comemo.nano.drawing import Part, draw, draw_parts
from comemo.nano.parts import GRID, words_of_tiles
from comemo.nano.scenes import LAYOUTS, make_scene

LAST = -1  # the thumbnail


def cut(seed, layout):
    """A scene, its parts, and the words for the tokens of its tiles."""
    scene = make_scene(seed, layout)
    image, parts = draw_parts(scene)
    rows, cols = scene.extent[2:]
    return scene, parts, words_of_tiles(parts, image.size, (cols, rows))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_parts_are_within_the_picture_that_draw_draws(layout):
    for seed in range(3):
        scene = make_scene(seed, layout)
        image, parts = draw_parts(scene)
        assert image.tobytes() == draw(scene).tobytes()
        assert parts
        for part in parts:
            left, top, right, bottom = part.box
            assert 0 <= left < right <= image.width
            assert 0 <= top < bottom <= image.height
            assert bool(part.text) == (part.line != (0, 0, 0, 0))


def test_all_tokens_of_a_tile_name_the_only_thing_in_it():
    for seed in range(12):
        scene, _, tiles = cut(seed, "objects")
        cols = scene.shape[1]
        for (row, col), item in scene.items.items():
            for words in tiles[row * cols + col]:
                assert item.colour in words
                assert (item.text if item.kind == "shape" else item.kind) in words
                assert item.kind != "word" or item.text in words
        for row, col in set(scene.places()) - set(scene.items):
            assert tiles[row * cols + col] == [["nothing"]] * GRID**2


def test_digits_are_in_order_and_small_text_is_not_read():
    for seed in range(12):
        scene, _, tiles = cut(seed, "objects")
        rows, cols = scene.shape
        for (row, col), item in scene.items.items():
            if item.kind == "number":
                first, *_, last = tiles[row * cols + col][:GRID]
                assert first[-2:] == [item.text[0], "first"]
                assert last[-2:] == [item.text[1], "second"]
                shown = {word for words in tiles[LAST] for word in words}
                assert rows < 3 or "first" not in shown


def test_a_sign_names_its_word_in_every_tile_that_has_some_of_it():
    scene, parts, tiles = cut(7, "sign")
    (written,) = (part for part in parts if part.names == ("word",))
    rows, cols = scene.extent[2:]
    width = scene.extent[0]
    letters = {}
    for tile in range(rows * cols):
        for token, words in enumerate(tiles[tile]):
            if scene.sign["word"] in words:
                x = (tile % cols + token % GRID / GRID) * width / cols
                assert written.box[0] - width / cols / GRID < x < written.box[2]
                letters |= dict.fromkeys(w for w in words if len(w) == 1)
    assert set(letters) == set(scene.sign["word"])
    (arrow,) = {tuple(w[w.index("arrow") :]) for words in tiles for w in words if "arrow" in w}
    assert arrow == ("arrow", scene.sign["arrow"])


def test_bars_have_their_colours_and_values_their_digits():
    scene, _, tiles = cut(3, "chart")
    cols = scene.extent[3]
    for index, bar in enumerate(scene.bars):
        column = [words for tile in tiles[index:-1:cols] for words in tile]
        assert {words[1] for words in column if "bar" in words} == {bar.colour}
        digits = [w[w.index("number") + 1 :] for w in column if "number" in w]
        assert [bar.value // 10, bar.value % 10] == [
            int(next(w for w, at in zip(d[::2], d[1::2], strict=True) if at == which))
            for which in ("first", "second")
            for d in [[x for own in digits for x in own]]
        ]
        assert any(words[-2:] == ["letter", bar.letter] for words in column)


def test_a_token_names_what_fills_some_of_it():
    parts = [Part((0, 0, 70, 70), ("red", "star")), Part((100, 0, 200, 30), ("blue", "ring"))]
    (words,) = words_of_tiles(parts, (400, 400), (1, 1))
    assert words[0] == ["red", "star"]
    assert words[1] == ["blue", "ring"]
    assert words[2:] == [["nothing"]] * 14


class Tokenizer:
    """Every word is one token, after a space another one."""

    def __call__(self, text, add_special_tokens):
        if text.startswith("a "):
            return {"input_ids": [1, 1000 + sum(map(ord, text))]}
        return {"input_ids": [sum(map(ord, text))]}


def test_words_are_numbered_as_they_come():
    vocabulary = tower.Vocabulary(Tokenizer())
    numbers = vocabulary.number([["red", "star"], ["star"], ["red"] * 20])
    assert numbers.shape == (3, tower.MOST)
    assert numbers[0, :5].tolist() == [0, 1, 2, 3, -1]
    assert numbers[1, :3].tolist() == [2, 3, -1]
    assert set(numbers[2].tolist()) == {0, 1}
    assert len(vocabulary.places) == 4
    assert torch.equal(vocabulary.number([["star"]])[0, :2], torch.tensor([2, 3]))
