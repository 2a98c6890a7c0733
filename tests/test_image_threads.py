"""Images in threads: the bits of plain Pillow, errors in order, and no thread that is left."""

import io
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import COFFEE, ROCKET, encode
from PIL import ExifTags, Image

from comemo.image_processor import CoMemoImageProcessor
from comemo.images import (
    choose_grid,
    load_image,
    load_images,
    normalise_pixels,
    stack_tiles,
)
from comemo.processing import resizing
from comemo.processing.read_ahead import AT_ONCE, ReadAhead, read_each

FORMATS = {"RGB": "JPEG", "L": "JPEG", "CMYK": "JPEG", "RGBA": "PNG", "P": "PNG", "1": "PNG"}


def plain(data, side, most, orientation=None):
    """Tiles as the published code makes them, normalised by torchvision's formula."""
    image = Image.open(io.BytesIO(data))
    if orientation is not None:
        image = image.transpose(orientation)
    image = image.convert("RGB")
    cols, rows = choose_grid(*image.size, max_num=most, input_size=side)
    resized = image.resize((side * cols, side * rows))
    tiles = []
    for i in range(cols * rows):
        left, top = side * (i % cols), side * (i // cols)
        tiles.append(resized.crop((left, top, left + side, top + side)))
    if len(tiles) != 1:
        tiles.append(image.resize((side, side)))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for i, tile in enumerate(tiles):
        pixels = torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous().float().div(255)
        tiles[i] = pixels.sub(mean[:, None, None]).div(std[:, None, None])
    return torch.stack(tiles), (cols, rows)


def noise(mode, width, height, seed):
    """A smooth picture with noise, of any mode."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(base).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(-30, 31, (height, width, 3))
    image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return image.convert(mode)


@given(
    mode=st.sampled_from(list(FORMATS)),
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    side=st.sampled_from([16, 28, 33]),
    most=st.integers(1, 12),
    threads=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_pixels_of_plain_pillow(mode, width, height, side, most, threads, seed):
    data = encode(noise(mode, width, height, seed), FORMATS[mode])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resizing, "WORTH_THREADS", 0)
        found, grid = load_image(data, side, most, threads=threads)
    wanted, wanted_grid = plain(data, side, most)
    assert grid == wanted_grid
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_pixels_of_a_large_photograph(threads):
    photograph = Image.open(COFFEE).convert("RGB").resize((1500, 1100))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encode(photograph, "JPEG", exif=exif)
    found, grid = load_image(data, threads=threads)
    wanted, wanted_grid = plain(data, 448, 12, Image.Transpose.ROTATE_270)
    assert grid == wanted_grid == (3, 4)
    assert torch.equal(found, wanted)


def test_draft_and_reducing_gap_change_pixels():
    """Why neither is used: both give other pixels than the published resize."""
    photograph = encode(Image.open(ROCKET).resize((1800, 1200)), "JPEG")
    whole = Image.open(io.BytesIO(photograph))
    wanted = np.asarray(whole.resize((448, 448)), np.int16)
    smaller = Image.open(io.BytesIO(photograph))
    smaller.draft("RGB", (448, 448))
    assert smaller.size == (900, 600)
    assert abs(np.asarray(smaller.resize((448, 448))) - wanted).max() > 0
    gap = whole.resize((448, 448), reducing_gap=1.0)
    assert abs(np.asarray(gap) - wanted).max() > 0


def test_pixels_normalised_on_a_device(device):
    """All 256 values of every channel: a GPU divides, too."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    tile = Image.fromarray(values[0].permute(1, 2, 0).contiguous().numpy())
    assert (stack_tiles([tile]) == values.numpy()).all()
    wanted = plain(encode(tile, "PNG"), 16, 1)[0]
    assert torch.equal(normalise_pixels(values.to(device)).cpu(), wanted)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_images_in_order(photograph, tmp_path, threads):
    path = tmp_path / "turned.png"
    photograph.rotate(90, expand=True).save(path)
    with path.open("rb") as file:
        sources = [str(COFFEE), path, photograph, file, encode(photograph, "PNG"), ROCKET]
        wanted = [load_image(source, 64, threads=1) for source in sources]
        file.seek(0)
        found = list(load_images(sources, 64, threads=threads))
        file.seek(0)
        processed = CoMemoImageProcessor(input_size=64)(sources)
    for (tiles, grid), (same, same_grid) in zip(found, wanted, strict=True):
        assert torch.equal(tiles, same)
        assert grid == same_grid
    assert torch.equal(processed["pixel_values"], torch.cat([tiles for tiles, _ in wanted]))
    assert list(load_images([], 64, threads=threads)) == []


@pytest.mark.parametrize("threads", [1, 4])
def test_errors_come_in_order_and_name_the_file(tmp_path, threads):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture" * 100)
    loaded = load_images([ROCKET, bad, tmp_path / "missing.png"], 64, threads=threads)
    assert torch.equal(next(loaded)[0], load_image(ROCKET, 64)[0])
    with pytest.raises(ValueError, match=r"bad\.jpg' is not an image"):
        next(loaded)
    assert not ours()
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        next(load_images([tmp_path / "missing.png", ROCKET], 64, threads=threads))
    assert not ours()
    for wrong in ({"threads": 0}, {"threads": 1.5}, {"max_num": 0}, {"input_size": 0}):
        with pytest.raises(ValueError, match="load_images: "):
            load_images([ROCKET], **wrong)


def test_few_are_read_ahead():
    started, lock = [], threading.Lock()

    def read(source, threads):
        with lock:
            started.append(source)
        assert threads == 2
        return source

    reading = read_each(read, [str(i) for i in range(50)], 8)
    assert next(reading) == "0"
    time.sleep(0.05)
    assert sorted(started, key=int) == [str(i) for i in range(AT_ONCE + 1)]
    reading.close()
    assert len(started) == AT_ONCE + 1
    assert not ours()


def test_what_is_expected_is_read_once_and_what_is_kept_not_again():
    read = []
    with ReadAhead(lambda key: read.append(key) or key.upper(), 1, ahead=2, keep=2) as reader:
        reader.expect("abc")
        assert [reader.take(key) for key in "aba"] == ["A", "B", "A"]
        reader.expect("bac")
        assert reader.take("c") == "C"
        assert reader.take("b") == "B"
    assert read == ["a", "b", "c", "b"]
    assert not ours()


def test_what_is_no_longer_expected_is_forgotten():
    read, go = [], threading.Event()

    def slow(key):
        read.append(key)
        assert go.wait(10)
        return key

    with ReadAhead(slow, 1, ahead=3) as reader:
        reader.expect("abc")
        reader.expect("c")
        go.set()
        assert reader.take("c") == "c"
    assert "b" not in read


def test_ctrl_c_ends_reading():
    def read(source, threads):
        if source == "2":
            signal.raise_signal(signal.SIGINT)  # seen by the main thread, which waits
        time.sleep(0.2)
        return source

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(read_each(read, [str(i) for i in range(100)], 2))
    assert time.monotonic() - start < 5
    assert not ours()


def ours():
    """Threads of this project that are alive."""
    return [t.name for t in threading.enumerate() if t.name.startswith("comemo-")]
