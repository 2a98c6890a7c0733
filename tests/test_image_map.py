import os
from pathlib import Path

import numpy as np
import pytest
from pictures import COFFEE
from PIL import Image

import comemo.cli.image_map as image_map
from comemo.cli.image_map import cell_letters, draw_map, save_map, token_ids
from comemo.images import load_image
from comemo_kernels import image_position_ids


@pytest.mark.parametrize("grid", [(3, 2), (1, 5), (4, 3), (1, 1), (2, 1), (10, 10)])
@pytest.mark.parametrize("tile_order", ["row", "column"])
def test_ids_are_those_of_the_operation(grid, tile_order):
    for side in (1, 2, 16):
        for bias, thumbnail in ((0, True), (7, False)):
            ids = token_ids(grid, side, tile_order, bias, thumbnail)
            want = image_position_ids(grid, side, tile_order, bias, thumbnail)
            assert ids.dtype == np.int64
            assert ids.tolist() == want.view(-1, side, side).tolist()


def place(grid, side, t, r, c):
    """The thumbnail cell of a token in the geometric order, by the formula."""
    cols, rows = grid

    def cell(k, n, at):
        return max(side * ((side - 1) * k + at) - 1, 0) // ((side - 1) * n)

    return cell(t // cols, rows, r) * side + cell(t % cols, cols, c)


@pytest.mark.parametrize("grid", [(3, 2), (1, 5), (4, 3)])
def test_ids_are_those_of_the_place(grid):
    side, tiles = 16, grid[0] * grid[1]
    want = [
        [[place(grid, side, t, r, c) for c in range(side)] for r in range(side)]
        for t in range(tiles)
    ]
    assert token_ids(grid, side)[:-1].tolist() == want


@pytest.fixture
def painted(monkeypatch):
    """What is drawn where: the id of each stamp and the tokens of each card."""
    stamps, cards = {}, []
    stamp, card = image_map._Map._stamp, image_map._Map._card

    def see_stamp(self, token_id):
        image = stamp(self, token_id)
        stamps[id(image)] = token_id
        return image

    def see_card(self, t, name, corner, stamps_of):
        assert all(stamps[id(image)] == token for token, image in stamps_of.items())
        cards.append((t, name, corner, self.side * self.cell))
        card(self, t, name, corner, stamps_of)

    monkeypatch.setattr(image_map._Map, "_stamp", see_stamp)
    monkeypatch.setattr(image_map._Map, "_card", see_card)
    return cards


@pytest.mark.parametrize("size", [(600, 400), (400, 600), (1600, 200), (200, 1600), (300, 300)])
def test_every_tile_has_its_card(painted, size):
    drawing = draw_map(Image.new("RGB", size, "gray"), input_size=112, max_num=6)
    values, (cols, rows) = load_image(Image.new("RGB", size), 112, 6)
    assert [t for t, *_ in painted] == list(range(len(values)))
    assert "whole image" in painted[-1][1]
    covered = np.zeros((drawing.height, drawing.width), int)
    for _, _, (x, y), length in painted:
        assert x >= 0
        assert y >= 0
        covered[y + 30 : y + 30 + length, x : x + length] += 1
    # no card overlaps another or leaves the paper
    assert covered.max() == 1
    assert covered.sum() == sum(length**2 for *_, length in painted)
    for t, name, (x, y), _ in painted[: cols * rows] if len(values) > 1 else []:
        assert name.endswith(f"column {t % cols}, row {t // cols}")
        assert (x > painted[0][2][0]) == (t % cols > 0)
        assert (y > painted[0][2][1]) == (t // cols > 0)


@pytest.mark.parametrize("tile_order", ["row", "column"])
def test_equal_ids_are_painted_equally(tile_order, painted):
    """On an image of one colour cells of equal ids look the same, others do not."""
    image = Image.new("RGB", (600, 400), "gray")
    drawing = draw_map(image, input_size=224, tile_order=tile_order)
    side, ids = 8, token_ids((3, 2), 8, tile_order)
    looks: dict[int, set[bytes]] = {}
    for t, _, (x, y), length in painted:
        cell = length // side
        for r in range(side):
            for c in range(side):
                left, top = x + c * cell, y + 30 + r * cell
                # inside the lines
                box = (left + 2, top + 2, left + cell - 2, top + cell - 2)
                looks.setdefault(int(ids[t, r, c]), set()).add(drawing.crop(box).tobytes())
    assert sorted(looks) == list(range(64))
    assert all(len(look) == 1 for look in looks.values())
    assert len(set.union(*looks.values())) == 64


def test_colours_do_not_depend_on_the_bias(painted):
    maps = [draw_map(Image.new("RGB", (9, 9)), input_size=112, bias=bias) for bias in (0, 6)]
    (_, _, (x, y), length), cell = painted[0], painted[0][3] // 4
    for top in range(y + 30 + 3, y + 30 + length, cell):
        for left in range(x + 3, x + length, cell):
            assert maps[0].getpixel((left, top)) == maps[1].getpixel((left, top))


def test_the_image_shows_through(painted):
    dark, light = (
        np.asarray(draw_map(Image.new("RGB", (50, 50), colour), input_size=112), int)
        for colour in ("black", "white")
    )
    _, _, (x, y), length = painted[0]
    change = (light - dark)[y + 30 : y + 30 + length, x : x + length]
    assert np.median(change) > 100


def test_same_arguments_same_map():
    maps = [draw_map(COFFEE, input_size=112, tile_order="column", bias=9) for _ in range(2)]
    assert maps[0].mode == "RGB"
    assert maps[0].tobytes() == maps[1].tobytes()
    assert maps[0].tobytes() != draw_map(COFFEE, input_size=112, bias=9).tobytes()


def test_large_ids_get_larger_cells(painted):
    draw_map(Image.new("RGB", (9, 9)))
    draw_map(Image.new("RGB", (9, 9)), bias=10_000_000)
    assert painted[1][3] > painted[0][3]


def test_map_at_full_size(tmp_path):
    path = save_map(COFFEE, tmp_path / "map.png")
    with Image.open(path) as drawing:
        assert drawing.format == "PNG"
        # 3 x 2 tiles of 16 x 16 tokens, each at least 28 pixels wide
        assert drawing.width > 3 * 16 * 28
        assert drawing.height > 2 * 16 * 28
        assert drawing.tobytes() == draw_map(COFFEE).tobytes()
    assert os.listdir(tmp_path) == ["map.png"]


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "é日本.png"])
def test_awkward_names(tmp_path, name):
    source = tmp_path / name[-200:]
    Image.new("RGB", (5, 5)).save(source)
    assert draw_map(source, input_size=28).width < 1000


def test_an_old_map_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "map.png"
    path.write_bytes(b"old")

    def fail(self, target, kind, **_):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        with pytest.raises(OSError, match="No space left"):
            save_map(COFFEE, path, input_size=56)
    assert path.read_bytes() == b"old"
    with pytest.raises(ValueError, match="tile_order"):
        save_map(COFFEE, path, tile_order="spiral")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["map.png"]
    assert save_map(COFFEE, str(path), input_size=56) == path
    with Image.open(path) as drawing:
        drawing.load()
    assert os.listdir(tmp_path) == ["map.png"]


def test_errors_of_paths(tmp_path):
    with pytest.raises(ValueError, match=r"save_map: wanted an existing directory, got .*missing"):
        save_map(COFFEE, tmp_path / "missing" / "map.png")
    with pytest.raises(ValueError, match=r"save_map: path must be a file ending in \.png"):
        save_map(COFFEE, tmp_path / "map.jpg")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"save_map: path must be a file ending in \.png"):
        save_map(COFFEE, tmp_path / "folder.png")
    with pytest.raises(ValueError, match="save_map: path must be a path, got int"):
        save_map(COFFEE, 3)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (5, 5)).save(picture)
    before = picture.read_bytes()
    with pytest.raises(ValueError, match="would overwrite its image"):
        save_map(picture, tmp_path / "folder.png" / ".." / "picture.png")
    assert picture.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "picture.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 450}, "draw_map: input_size must be a multiple of 28, got 450"),
        ({"input_size": 0}, "input_size must be a multiple of 28, got 0"),
        ({"input_size": 448.0}, "input_size must be a multiple of 28"),
        ({"max_num": 0}, "draw_map: max_num must be 1 to 100, got 0"),
        ({"max_num": 101}, "max_num must be 1 to 100, got 101"),
        ({"tile_order": "diagonal"}, "tile_order must be 'row' or 'column', got 'diagonal'"),
        ({"bias": -1}, "bias must be an integer of at least 0, got -1"),
        ({"bias": True}, "bias must be an integer of at least 0, got True"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        draw_map("not even looked for.png", **options)


def test_errors_of_images():
    with pytest.raises(ValueError, match=r"open_image: .* is not an image"):
        draw_map(b"no picture")


def test_letters_are_the_tiles_places():
    assert cell_letters((2, 1), 4, "row") == ["A A B B"] * 4
    assert cell_letters((2, 2), 4, "row") == ["A A B B"] * 2 + ["C C D D"] * 2
    assert cell_letters((2, 2), 4, "column") == ["A A C C"] * 2 + ["B B D D"] * 2
