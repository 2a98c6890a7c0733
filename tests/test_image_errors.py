"""Bad images and impossible limits: one clear error, and no file left open."""

import gc
import io
import os
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import COFFEE, ROCKET, encode
from PIL import Image

from comemo.images import (
    candidate_grids,
    choose_grid,
    load_image,
    normalise,
    open_image,
    split_tiles,
)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "open_image: a file of 0 bytes is not an image"),
        (b"no picture" * 100, "is not an image"),
        (png(0, 5), "is not an image"),
        (png(2, 2), "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "PostScript"),
        ("https://example.org/cat.jpg", "reads no URL"),
        ("file:///tmp/cat.jpg", "reads no URL, pass the path alone"),
        (
            "data:image/png;base64,iVBORw0KGgo=",
            "a file of 8 bytes, given as base64, is not an imag",
        ),
        ("data:image/png;base64,", "wanted the base64 of an image, got an empty text"),
        ("data:image/svg+xml,%3Csvg/%3E", "got a data URL of 29 characters without ;base64"),
        ("a" * 300, "wanted the path of an image file, got 'aaa.* of 300 characters"),
        ("a\0b.png", "wanted the path of an image file"),
        (os.curdir, r"wanted the path of an image file, got '\.'"),
        (Path(os.curdir), "wanted the path of an image file"),
        (None, "must be a path, bytes, .* got NoneType"),
        (3, "got int"),
        ([COFFEE], "got list"),
        (torch.zeros(3, 4, 4), r"the tensor must be uint8 .* got float32 \[3, 4, 4\]"),
        (torch.zeros(4, 4, 4, dtype=torch.uint8), r"got uint8 \[4, 4, 4\]"),
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
def test_errors_of_images(source, message):
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
    with pytest.raises(ValueError, match=r"open_image: .*cut\.bin.*(cannot be|not an image)"):
        open_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_an_image_or_an_error(photograph, kind):
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
    # an image in memory is accepted, and the limit may be raised
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
        ({"input_size": 10**7}, "load_image: input_size must make 1 tiles of at most 205520896"),
        (
            {"input_size": 10**4, "min_num": 3},
            "load_image: input_size must make 3 tiles of at most",
        ),
        ({"input_size": 2**64}, "input_size must be an integer of at least 1 and below"),
    ],
)
def test_errors_of_limits(options, message):
    with pytest.raises(ValueError, match=message):
        load_image("not even looked for.png", **options)


def test_errors_of_parts(photograph):
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
    with pytest.raises(ValueError, match="split_tiles: input_size must make 6 tiles of at most"):
        split_tiles(photograph, 7000, min_num=6)
    with pytest.raises(ValueError, match=r"choose_grid: width must be .* below 2"):
        choose_grid(10**400, 5)


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("scale", ["x", [1.0], np.nan, np.inf, 10**400], "scale must be a finite number or None"),
        ("mean", ["x", [0.5, None, 0.5], [0.1, 0.2], np.nan], "mean must be one or three numbers"),
        ("std", [[[1.0], [2.0, 3.0]], object(), np.inf], "std must be one or three numbers"),
        ("std", [0, [0.2, 0.0, 0.2]], "std must not be 0"),
    ],
)
def test_errors_of_numbers(option, values, message):
    square = Image.new("RGB", (4, 4))
    for value in values:
        for call in (lambda **o: normalise([square], **o), lambda **o: load_image(square, 4, **o)):
            with pytest.raises(ValueError, match=f"normalise: {message}"):
                call(**{option: value})


def test_numpy_integers_are_integers():
    assert choose_grid(np.int64(640), np.int32(480), max_num=np.int64(12)) == (4, 3)


def test_threads_give_the_same_as_one():
    alone = [load_image(path, 56)[0] for path in (COFFEE, ROCKET)]
    found = {}

    def work(n):
        found[n] = load_image((COFFEE, ROCKET)[n % 2], 56)[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], alone[n % 2]) for n in range(8))
