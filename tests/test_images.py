"""Images to tiles: every recorded pixel, real photographs in every file format."""

import hashlib
import io
import json
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pictures import CAT, COFFEE, ROCKET, encode, pixels
from PIL import ExifTags, Image
from safetensors.torch import load_file

from comemo.images import (
    candidate_grids,
    choose_grid,
    load_image,
    normalise,
    open_image,
    split_tiles,
)

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "preprocess.json").read_text())


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def golden_picture(record, golden, inputs):
    if record["source"].startswith("images/"):
        return golden / record["source"]
    seed = int(record["source"].split("(")[1].split(",")[0])
    return Image.fromarray(inputs.picture(seed, *record["size_wh"]))


def test_order_of_grids(recorded):
    for max_num, order in recorded["target_ratio_order"].items():
        assert [list(grid) for grid in candidate_grids(1, int(max_num))] == order


@pytest.mark.parametrize("low", [2, 7, 12, 20])
def test_order_of_grids_with_a_minimum(low):
    for high in range(low, 49, 3):
        filled = set()
        for ring in range(low, high + 1):
            for cols in range(1, ring + 1):
                for rows in range(1, ring + 1):
                    if low <= cols * rows <= high:
                        filled.add((cols, rows))
        assert candidate_grids(low, high) == tuple(sorted(filled, key=lambda g: g[0] * g[1]))


def test_every_recorded_grid(recorded):
    assert len(recorded["ratios"]) == 1580
    for width, height, max_num, cols, rows, count in recorded["ratios"]:
        assert choose_grid(width, height, max_num=max_num) == (cols, rows), (width, height, max_num)
        assert count == cols * rows + (cols * rows > 1)


def test_every_recorded_image(recorded, golden, inputs):
    saved = load_file(golden / "preprocess.safetensors")
    for name, record in recorded["images"].items():
        source = golden_picture(record, golden, inputs)
        values, grid = load_image(source, max_num=record["max_num"], published=True)
        tiles, _ = split_tiles(open_image(source, published=True), max_num=record["max_num"])
        assert list(grid) == record["ratio"], name
        assert list(values.shape) == record["shape"], name
        assert values.dtype == torch.float32
        for value, tile, want in zip(values, tiles, record["tiles"], strict=True):
            assert sha256(np.asarray(tile)) == want["u8_sha256"], name
            assert sha256(value.numpy()) == want["f32_sha256"], name
        points = [tuple(map(int, at.split(","))) for at in record["tiles"][0]["u8_pixels_rgb"]]
        for t, tile in enumerate(record["tiles"]):
            for at, colour in tile["u8_pixels_rgb"].items():
                y, x = map(int, at.split(","))
                assert list(tiles[t].getpixel((x, y))) == colour
        picked = torch.stack([values[:, :, y, x] for y, x in points], dim=1)
        assert torch.equal(picked, saved[f"{name}/pixels"]), name


def test_default_differs_from_published_only_where_it_says(recorded, golden):
    for name, record in recorded["images"].items():
        if record["source"].startswith("images/"):
            ours, published = (
                load_image(golden / record["source"], published=flag)[0] for flag in (False, True)
            )
            assert torch.equal(ours, published) == (name != "mode_I16"), name


def test_recorded_crop_boxes(recorded, inputs):
    record = recorded["crop_boxes_example"]
    image = Image.fromarray(inputs.picture(5, *record["size"]))
    tiles, grid = split_tiles(image, use_thumbnail=False)
    assert list(grid) == record["ratio"]
    stretched = image.resize((448 * grid[0], 448 * grid[1]))
    assert len(tiles) == len(record["boxes"])
    for tile, box in zip(tiles, record["boxes"], strict=True):
        assert tile.tobytes() == stretched.crop(box).tobytes()


def test_recorded_orientation(recorded, golden):
    record, path = recorded["exif_orientation_6"], golden / "images" / "exif6.png"
    assert list(open_image(path, published=True).size) == record["size"]
    values, grid = load_image(path, published=True)
    assert (list(grid), len(values)) == (record["ratio"], record["n"])
    assert load_image(path)[1] == tuple(reversed(record["ratio"]))
    upright = np.rot90(pixels(open_image(path, published=True)), -1)
    np.testing.assert_array_equal(pixels(open_image(path)), upright)


def test_tiles_are_normalised_as_recorded(inputs):
    stack = np.stack([inputs.picture(seed, 448, 448) for seed in range(3)])
    assert torch.equal(normalise([Image.fromarray(x) for x in stack]), inputs.normalise(stack))


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_followed_once(photograph, kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(photograph, kind, exif=exif)
    stored = pixels(open_image(encode(photograph, kind)))
    image = open_image(data)
    np.testing.assert_array_equal(np.asarray(image), TURNS[orientation](stored))
    again = open_image(image)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(image))
    reread = open_image(encode(image, kind))
    assert reread.size == image.size
    published = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(open_image(data, published=True)), published)


def test_orientation_of_a_pillow_image(photograph):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    with Image.open(io.BytesIO(encode(photograph, "PNG", exif=exif))) as lazy:
        image = open_image(lazy)
        assert lazy.size == photograph.size
        assert lazy.getexif()[ExifTags.Base.Orientation] == 8
    np.testing.assert_array_equal(np.asarray(image), TURNS[8](np.asarray(photograph)))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage garbage",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02A\0\0\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_metadata_does_not_hide_an_image(photograph, exif):
    image = open_image(encode(photograph, "JPEG", exif=exif))
    np.testing.assert_array_equal(np.asarray(image), pixels(open_image(encode(photograph, "JPEG"))))


@pytest.mark.parametrize("path", [COFFEE, ROCKET, CAT])
def test_photographs_as_they_are(path):
    with Image.open(path) as image:
        want = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(open_image(path)), want)
    assert open_image(path).mode == "RGB"
    tiles, grid = split_tiles(open_image(path))
    values, same = load_image(str(path))
    assert same == grid
    assert values.shape == (grid[0] * grid[1] + 1, 3, 448, 448)
    assert torch.equal(values, normalise(tiles))


def test_all_kinds_of_sources(tmp_path, photograph):
    path = tmp_path / "picture with a space é.png"
    photograph.save(path)
    want = np.asarray(photograph)
    with open(path, "rb") as stream:
        stream.seek(7)
        ways = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), stream]
        ways += [io.BytesIO(path.read_bytes()), photograph, want, want[:, :, ::-1][:, :, ::-1]]
        for way in ways:
            np.testing.assert_array_equal(np.asarray(open_image(way)), want)
        assert not stream.closed
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    np.testing.assert_array_equal(np.asarray(open_image(grey)), np.stack([grey] * 3, -1))
    assert open_image(photograph) is photograph


def test_an_array_may_change_afterwards():
    array = np.zeros((4, 5, 3), np.uint8)
    image = open_image(array)
    array += 9
    assert image.getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_dropped(photograph, kind):
    alpha = Image.linear_gradient("L").resize(photograph.size)
    image = photograph.copy()
    image.putalpha(alpha)
    data = encode(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(photograph))
    grey = Image.merge("LA", (photograph.convert("L"), alpha))
    if kind != "WEBP":
        want = np.stack([np.asarray(photograph.convert("L"))] * 3, -1)
        np.testing.assert_array_equal(np.asarray(open_image(encode(grey, kind))), want)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 256, 4))])
def test_palette(photograph, transparency):
    image = photograph.quantize(64)
    palette = np.array(image.getpalette()[: 3 * 64], np.uint8).reshape(-1, 3)
    want = palette[np.asarray(image)]
    options = {} if transparency is None else {"transparency": transparency}
    data = encode(image, "PNG", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for published in (False, True):
            got = open_image(data, published=published)
            np.testing.assert_array_equal(np.asarray(got), want)


def test_one_bit(photograph):
    image = photograph.convert("1")
    want = np.stack([np.asarray(image).astype(np.uint8) * 255] * 3, -1)
    np.testing.assert_array_equal(np.asarray(open_image(encode(image, "PNG"))), want)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(photograph, kind):
    data = encode(photograph.convert("CMYK"), kind, **({"quality": 95} if kind == "JPEG" else {}))
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
        published = np.asarray(image.convert("RGB"))
    got = np.asarray(open_image(data))
    np.testing.assert_array_equal(got, published)
    # upright colours, not their negative
    assert np.abs(got.astype(int) - np.asarray(photograph)).mean() < 4


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_16_bit_grey_is_scaled(mode):
    values = np.linspace(0, 65535, 4096).round().astype(np.int64).reshape(64, 64)
    values[0, :4] = 128, 129, 65535 - 128, 65535 - 129
    kind = {"I;16B": ">u2", "I": "<i4"}.get(mode, "<u2")
    image = Image.frombytes(mode, (64, 64), values.astype(kind).tobytes())
    want = np.rint(values * (255 / 65535)).astype(np.uint8)
    want = np.stack([want] * 3, -1)
    np.testing.assert_array_equal(np.asarray(open_image(image)), want)
    clipped = np.stack([values.clip(max=255).astype(np.uint8)] * 3, -1)
    np.testing.assert_array_equal(np.asarray(open_image(image, published=True)), clipped)
    if mode == "I;16":
        for file_kind in ("PNG", "TIFF"):
            got = open_image(encode(image, file_kind))
            np.testing.assert_array_equal(np.asarray(got), want)
        header = b"P5 64 64 65535\n"
        got = open_image(header + values.astype(">u2").tobytes())
        np.testing.assert_array_equal(np.asarray(got), want)


def test_16_bit_grey_looks_like_its_8_bit_image(photograph):
    grey = np.asarray(photograph.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(
        np.asarray(open_image(encode(deep, "PNG"))), np.stack([grey] * 3, -1)
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert open_image(data).getextrema() == ((255, 255), (0, 0), (0, 0))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 40), st.integers(1, 40))
@example(1, 100_000, 1, 12)
def test_grid_is_the_nearest_within_the_limits(width, height, one, two):
    low, high = sorted((one, two))
    cols, rows = choose_grid(width, height, low, high)
    assert low <= cols * rows <= high
    shape = Fraction(width, height)
    grids = candidate_grids(low, high)
    assert len(set(grids)) == len(grids)
    assert {(r, c) for c, r in grids} == set(grids)
    nearest = min(abs(shape - Fraction(c, r)) for c, r in grids)
    # the published arithmetic is float64
    assert float(abs(shape - Fraction(cols, rows)) - nearest) <= 1e-12 * max(1, float(shape))


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(2, 50), st.integers(1, 12))
def test_scaling_an_image_keeps_the_distance(width, height, factor, max_num):
    small = choose_grid(width, height, max_num=max_num)
    large = choose_grid(width * factor, height * factor, max_num=max_num)
    distance = [abs(width / height - cols / rows) for cols, rows in (small, large)]
    assert distance[0] == distance[1]
    # only a tie can go another way, and then to more tiles
    assert large == small or large[0] * large[1] >= small[0] * small[1]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 400), st.integers(1, 12))
def test_transposing_an_image_of_a_grids_shape_transposes_its_grid(cols, rows, scale, max_num):
    width, height = cols * scale, rows * scale
    grid = choose_grid(width, height, max_num=max_num)
    if grid[0] * height == grid[1] * width:
        assert choose_grid(height, width, max_num=max_num) == grid[::-1]


@given(st.integers(1, 3000), st.integers(1, 12), st.integers(1, 12))
def test_a_square_gets_a_square(side, one, two):
    low, high = sorted((one, two))
    cols, rows = choose_grid(side, side, low, high)
    if any(c == r for c, r in candidate_grids(low, high)):
        assert cols == rows


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 4000), (4000, 1), (700, 500)])
@pytest.mark.parametrize("use_thumbnail", [False, True])
def test_sizes_of_tiles(width, height, use_thumbnail):
    image = Image.new("RGB", (width, height))
    values, (cols, rows) = load_image(image, 28, 6, min_num=2, use_thumbnail=use_thumbnail)
    assert 2 <= cols * rows <= 6
    assert values.shape == (cols * rows + use_thumbnail, 3, 28, 28)
    alone, grid = load_image(image, 28, 1, use_thumbnail=use_thumbnail)
    assert (alone.shape, grid) == ((1, 3, 28, 28), (1, 1))
