import gc
import hashlib
import importlib.util
import io
import json
import os
import struct
import sys
import threading
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn.datasets
import torch
from hypothesis import example, given
from hypothesis import strategies as st
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

CHINA, FLOWER = (
    Path(sklearn.datasets.__path__[0]) / "images" / name for name in ("china.jpg", "flower.jpg")
)
SKIMAGE = Path(skimage.__file__).parent / "data"
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


@pytest.fixture(scope="module")
def inputs(golden):
    spec = importlib.util.spec_from_file_location("golden_inputs", golden / "inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photograph():
    return Image.open(CHINA).convert("RGB").crop((100, 50, 400, 250)).copy()


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(image.convert("RGB"))


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


def test_every_recorded_picture(recorded, golden, inputs):
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


def test_orientation_of_a_pillow_picture(photograph):
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
def test_broken_metadata_does_not_hide_a_picture(photograph, exif):
    image = open_image(encode(photograph, "JPEG", exif=exif))
    np.testing.assert_array_equal(np.asarray(image), pixels(open_image(encode(photograph, "JPEG"))))


@pytest.mark.parametrize("path", [CHINA, FLOWER, SKIMAGE / "rocket.jpg", SKIMAGE / "coffee.png"])
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


def test_ways_to_hand_over_a_picture(tmp_path, photograph):
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


def test_16_bit_grey_looks_like_its_8_bit_picture(photograph):
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
def test_scaling_a_picture_keeps_the_distance(width, height, factor, max_num):
    small = choose_grid(width, height, max_num=max_num)
    large = choose_grid(width * factor, height * factor, max_num=max_num)
    distance = [abs(width / height - cols / rows) for cols, rows in (small, large)]
    assert distance[0] == distance[1]
    # only a tie can go another way, and then to more tiles
    assert large == small or large[0] * large[1] >= small[0] * small[1]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 400), st.integers(1, 12))
def test_transposing_a_picture_of_a_grids_shape_transposes_its_grid(cols, rows, scale, max_num):
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


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "open_image: a file of 0 bytes is not a picture"),
        (b"no picture" * 100, "is not a picture"),
        (png(0, 5), "is not a picture"),
        (png(2, 2), "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "PostScript"),
        ("https://example.org/cat.jpg", "reads no URL"),
        ("data:image/png;base64,iVBORw0KGgo=", "reads no URL"),
        ("a\0b.png", "wanted the path of a picture file"),
        (os.curdir, r"wanted the path of a picture file, got '\.'"),
        (Path(os.curdir), "wanted the path of a picture file"),
        (None, "must be a path, bytes, .* got NoneType"),
        (3, "got int"),
        ([CHINA], "got list"),
        (torch.zeros(3, 4, 4), "got Tensor"),
        (io.StringIO("text"), "got StringIO"),
        (np.zeros((4, 5, 3), np.float32), r"uint8 \[height, width\] .* got float32 \[4, 5, 3\]"),
        (np.zeros((4, 5, 4), np.uint8), r"got uint8 \[4, 5, 4\]"),
        (np.zeros((3,), np.uint8), r"got uint8 \[3\]"),
        (np.zeros((0, 5, 3), np.uint8), r"with pixels, got uint8 \[0, 5, 3\]"),
        (Image.new("RGB", (0, 5)), "has no pixels: 0 x 5"),
        (Image.new("F", (2, 2)), "floating-point"),
        (Image.new("I", (2, 2), 70_000), "grey 70000 to 70000, wanted 0 to 65535"),
        (Image.new("I", (2, 2), -1), "grey -1 to -1, wanted 0 to 65535"),
        (Image.new("La", (2, 2)), "cannot be decoded"),
    ],
)
def test_says_what_is_wrong_with_a_picture(source, message):
    for function in (open_image, load_image):
        with pytest.raises(ValueError, match=message) as caught:
            function(source)
        assert str(caught.value).startswith("open_image: ")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png")


def test_closed_sources(photograph):
    stream = io.BytesIO(encode(photograph, "PNG"))
    lazy = Image.open(stream)
    stream.close()
    for source in (stream, lazy):
        with pytest.raises(ValueError, match=r"open_image: .* cannot be decoded.*closed file"):
            open_image(source)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
def test_cut_off_file(tmp_path, photograph, kind, share):
    data = encode(photograph, kind)
    path = tmp_path / "cut.bin"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"open_image: .*cut\.bin.*(cannot be|not a picture)"):
        open_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_a_picture_or_an_error(photograph, kind):
    data = encode(photograph.resize((32, 24)), kind)
    draw = np.random.default_rng(0)
    for _ in range(150):
        damaged = np.frombuffer(data, np.uint8).copy()
        reach = draw.choice([30, 200, len(data)])
        places = draw.integers(0, min(reach, len(data)), 4)
        damaged[places] = draw.integers(0, 256, 4)
        try:
            said = f"open_image: {open_image(damaged.tobytes()).mode}"
        except ValueError as error:
            said = str(error)
        assert said.startswith("open_image: ")


def test_disk_errors_are_not_called_damage():
    class Disk(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error") as caught:
        open_image(Disk(b"x"))
    assert caught.value.errno == 5


@pytest.mark.parametrize("factor", [1.5, 40])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_too_many_pixels(monkeypatch, photograph, factor, action):
    many = photograph.width * photograph.height
    data = encode(photograph, "PNG")
    lazy = Image.open(io.BytesIO(data))
    decoded = []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(many / factor))
    monkeypatch.setattr(type(lazy), "load", lambda self: decoded.append(self))
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        for source in (data, io.BytesIO(data), lazy):
            with pytest.raises(ValueError, match=r"open_image: .* is too large"):
                open_image(source)
    assert decoded == []
    # what is in memory already is taken, and a limit may be lifted
    assert open_image(photograph) is photograph
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", many)
    assert open_image(data).size == photograph.size


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_no_file_stays_open(tmp_path, photograph, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    data = encode(photograph, "PNG")
    sources = {"good.png": data, "cut.png": data[: len(data) // 2], "none.png": b"nothing"}
    sources["bomb.png"], sources["gif.gif"] = png(40_000, 40_000), encode(photograph, "GIF")
    animation = [photograph, photograph.rotate(90)]
    sources["moving.tif"] = encode(animation[0], "TIFF", save_all=True, append_images=animation[1:])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    kept = []
    for name, content in sources.items():
        (tmp_path / name).write_bytes(content)
        try:
            kept.append(open_image(tmp_path / name))
        except ValueError:
            assert name in ("cut.png", "none.png", "bomb.png")
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
    for image in kept:
        assert image.resize((3, 3)).mode == "RGB"
    del kept, image
    gc.collect()
    assert unraisable == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num": 0}, "load_image: max_num must be an integer of at least 1, got 0"),
        ({"max_num": 2.0}, "max_num must be an integer of at least 1, got 2.0"),
        ({"max_num": True}, "max_num must be an integer of at least 1, got True"),
        ({"max_num": 5000}, "min_num <= max_num <= 1024, got min_num 1, max_num 5000"),
        ({"min_num": 0}, "min_num must be an integer of at least 1"),
        ({"min_num": 5, "max_num": 4}, "got min_num 5, max_num 4"),
        ({"input_size": -448}, "input_size must be an integer of at least 1, got -448"),
        ({"input_size": "448"}, "input_size must be an integer of at least 1, got '448'"),
        ({"input_size": None}, "got None"),
    ],
)
def test_says_what_is_wrong_with_a_limit(options, message):
    with pytest.raises(ValueError, match=message):
        load_image("not even looked for.png", **options)


def test_says_what_is_wrong_with_parts(photograph):
    with pytest.raises(ValueError, match="choose_grid: width must be an integer of at least 1"):
        choose_grid(0, 5)
    with pytest.raises(ValueError, match="candidate_grids: wanted min_num <= max_num"):
        candidate_grids(3, 2)
    for image, got in ((photograph.convert("L"), "L"), (3, "int"), (Image.new("RGB", (0, 1)), "")):
        with pytest.raises(ValueError, match=f"split_tiles: image must be .* got {got}"):
            split_tiles(image)
    square = Image.new("RGB", (4, 4))
    for tiles in ([], [photograph], [square, square.resize((5, 5))], [square.convert("L")], [3]):
        with pytest.raises(ValueError, match="normalise: tiles must be square RGB"):
            normalise(tiles)


def test_numpy_integers_are_integers():
    assert choose_grid(np.int64(640), np.int32(480), max_num=np.int64(12)) == (4, 3)


def test_threads_see_what_one_sees():
    alone = [load_image(path, 56)[0] for path in (CHINA, FLOWER)]
    found = {}

    def work(n):
        found[n] = load_image((CHINA, FLOWER)[n % 2], 56)[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], alone[n % 2]) for n in range(8))
