"""Photographs of 12 megapixels to normalised tiles: one, its parts, and a folder of 100.

Ways: `plain Pillow`, the published steps one after another; `ours`, `load_image` and, for the
folder, `load_images`. Every way has the same bits, or it is not timed. The photographs are
enlarged ones with grain as of a camera, made with a fixed seed, JPEG of quality 90. `share` is the
part of the time to a first token: of --first-token, or of `ours` in a file of `bench chat`.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import comemo.nano
from bench import measure, progress
from comemo.images import load_image, load_images, normalise, open_image, split_tiles

SIZE, SIDE, GRID = (4000, 3000), 448, (4, 3)
PHOTOGRAPHS = Path(comemo.nano.__file__).parent / "photographs"
CHAT = measure.ROOT / "bench" / "results" / "epyc-2core-float32" / "chat.csv"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--pictures", type=int, default=100, help="in the folder")
    parser.add_argument("--size", nargs=2, type=int, default=SIZE, metavar=("W", "H"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--first-token", type=float, metavar="S", help="seconds to a first token")
    parser.add_argument("--chat", type=Path, default=CHAT, help="file with that time: %(default)s")


def run(options: argparse.Namespace) -> Iterator[Row]:
    first = options.first_token or first_token(options.chat)
    progress.plan([1, 4])
    with tempfile.TemporaryDirectory() as name:
        paths = make_folder(Path(name), options.pictures, tuple(options.size))
        progress.begin("one picture")
        yield from time_one(paths[0], options, first)
        progress.begin(f"{options.pictures} pictures")
        yield from time_folder(paths, options, first)


def first_token(file: Path) -> float:
    """Seconds to the first token of an answer about a new picture, as `bench chat` measured."""
    with file.open(newline="") as lines:
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            if (row["pass"], row["way"]) == ("new picture", "ours"):
                return float(row["first_s"])
    raise SystemExit(f"python -m bench images: {file} has no row of a new picture: --first-token")


def make_folder(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Files of photographs; every fourth one shows the same."""
    rng = np.random.default_rng(0)
    width, height = size
    grain = rng.normal(0, 5, (height + 8, width, 1)).astype(np.int16)
    files = []
    for i, path in enumerate(sorted(PHOTOGRAPHS.glob("*.jpg"))[:4]):
        with Image.open(path) as image:
            large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        seen = np.asarray(large) + grain[i : i + height]
        files.append(folder / f"photograph-{i}.jpg")
        Image.fromarray(seen.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    paths = []
    for i in range(count):
        paths.append(folder / f"{i:03}.jpg")
        paths[-1].hardlink_to(files[i % len(files)])
    return paths


def load_plainly(path: Path) -> torch.Tensor:
    """The published steps: Pillow alone, then each tile by itself."""
    image = Image.open(path).convert("RGB")
    cols, rows = GRID
    resized = image.resize((SIDE * cols, SIDE * rows))
    tiles = [
        resized.crop((SIDE * col, SIDE * row, SIDE * (col + 1), SIDE * (row + 1)))
        for row in range(rows)
        for col in range(cols)
    ]
    tiles.append(image.resize((SIDE, SIDE)))
    return torch.stack([_normalise_plainly(tile) for tile in tiles])


def _normalise_plainly(tile: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous().float().div(255)
    return pixels.sub_(MEAN[:, None, None]).div_(STD[:, None, None])


def time_one(path: Path, options: argparse.Namespace, first: float) -> Iterator[Row]:
    """A picture and the parts of its way, all interleaved."""
    wanted = load_plainly(path)
    if not all(
        torch.equal(load_image(path, threads=threads)[0], wanted) for threads in options.threads
    ):
        raise SystemExit("python -m bench images: ours are not the pixels of plain Pillow")
    image = open_image(path)
    tiles, _ = split_tiles(image)
    counts = [(f"ours, {_threads(threads)}", threads) for threads in options.threads]
    ways: dict[tuple[str, str], Callable[[int], Any]] = {
        ("all", "plain Pillow"): lambda _: load_plainly(path)
    }
    for way, threads in counts:
        ways["all", way] = functools.partial(_load, path, threads)
    ways["decode", "ours"] = lambda _: open_image(path)
    for way, threads in counts:
        ways["resize and cut", way] = functools.partial(_split, image, threads)
    ways["normalise", "ours"] = lambda _: normalise(tiles)
    named = {" | ".join(key): way for key, way in ways.items()}
    timings = measure.compare(named, 1, "cpu", options.rounds)
    case = f"{image.width} x {image.height}, {len(tiles)} tiles, {path.stat().st_size / 1e6:.1f} MB"
    for step, way in ways:
        found = timings[f"{step} | {way}"]
        row: Row = {"case": case, "pass": step, "way": way, "us": found.us}
        row |= {"low_us": found.low_us, "high_us": found.high_us}
        if step == "all":
            row |= {"pictures_s": 1e6 / found.us, "share": found.us / 1e6 / first}
        yield row


def _load(path: Path, threads: int, _: int) -> Any:
    return load_image(path, threads=threads)


def _split(image: Image.Image, threads: int, _: int) -> Any:
    return split_tiles(image, threads=threads)


def time_folder(paths: list[Path], options: argparse.Namespace, first: float) -> Iterator[Row]:
    """All pictures once by each way; the peak is beside what the process had before."""
    most = max(options.threads)
    ways: dict[str, Callable[[], Iterator[Any]]] = {
        "plain Pillow": lambda: (load_plainly(path) for path in paths),
        f"ours, {_threads(most)}": lambda: load_images(paths, threads=most),
    }
    for way, load in ways.items():
        progress.tell(way)
        before = reset_peak()
        start = time.perf_counter()
        for _ in load():
            pass
        took = time.perf_counter() - start
        row: Row = {"case": f"folder of {len(paths)}", "pass": "all", "way": way}
        row |= {"us": 1e6 * took / len(paths), "pictures_s": len(paths) / took}
        if before is not None:
            row["peak_mib"] = (_status("VmHWM") - before) / 2**20
        yield row | {"share": took / len(paths) / first}


def reset_peak() -> int | None:
    """Bytes that the process has; its peak counts from here. None where the system cannot.

    Memory that was freed but kept by the allocator is given back first: it would hide a peak.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return None


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")
