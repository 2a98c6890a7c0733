"""JSON lines, images and settings for tests of training data; fixtures to import."""

import json
import multiprocessing

import numpy as np
import pytest
from PIL import Image

from comemo import CoMemoConfig, InternLM2Tokenizer
from comemo.train.data.loader import make_loader
from comemo.train.data.meta import Collection
from comemo.train.data.samples import SampleReader
from comemo.train.settings import DataSettings

SYSTEM = {"from": "system", "value": "short."}  # the template's own is long


def talk(*texts, **more):
    """A line's object: texts of questions and answers in turn."""
    roles = ("human", "gpt")
    turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": [SYSTEM, *turns], **more}


def write_lines(path, items):
    """A JSONL file; items are objects, or bytes as they are."""
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in items]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def write_picture(path, width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path.name


def write_meta(folder, sizes, texts=None, **more):
    """A meta file of text-only datasets: name -> number of lines. Sample j of A says "A j"."""
    meta = {}
    for name, count in sizes.items():
        lines = [talk(f"{name} {j}", texts or "x" * (j % 7 + 1)) for j in range(count)]
        path = write_lines(folder / f"{name}.jsonl", lines)
        meta[name] = {"root": "", "annotation": path, **more.get(name, {})}
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder / "meta.json")


def small_config(**more):
    """Tiles of 56 pixels with 4 tokens each."""
    vision = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    vision |= {"num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    return CoMemoConfig(vision_config=vision, **more)


def settings_for(train, **more):
    few = {"max_tokens": 400, "max_sample_tokens": 400, "max_tiles": 12, "buffer": 3, "workers": 0}
    return DataSettings(**{"train": train, **few, **more})


def loader_of(tokenizer, settings, streams=(0,), total=1, config=None, **more):
    more = {"seed": 1, **more}
    config = config or small_config()
    return make_loader(settings, tokenizer, config, streams=streams, total=total, **more)


def lines_of(batches):
    """(dataset, line number) of each sample of batches, in order."""
    return [(name, line) for batch in batches for name, _, line in batch["samples"]]


def same(first, second):
    """Whether two batches are equal, bit by bit."""
    return first.keys() == second.keys() and all(
        first[key].equal(second[key]) if hasattr(first[key], "equal") else first[key] == second[key]
        for key in first
    )


@pytest.fixture(scope="module")
def words(demo_checkpoint):
    return InternLM2Tokenizer.from_pretrained(demo_checkpoint)


@pytest.fixture
def pictures(tmp_path):
    """A wide, a tall and a square picture in a folder."""
    for name, size in {"w.png": (120, 56), "t.png": (50, 110), "s.png": (56, 56)}.items():
        write_picture(tmp_path / name, *size)
    return tmp_path


def reader_of(words, config=None, **settings):
    return SampleReader(settings_for("", **settings), words, config or small_config())


def read(words, folder, line, rng=None, config=None, patch=None, augment=False, **settings):
    """The sample of a line, which is measured too."""
    collection = Collection("data", "data.jsonl", str(folder), max_tiles=patch)
    reader = reader_of(words, config, **settings)
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    seed = None if rng is None else np.random.default_rng(rng)
    sample = reader.read(collection, line, seed, augment)
    size = reader.measure(collection, line, None if rng is None else np.random.default_rng(rng))
    assert (size.tokens, size.tiles) == sample.size
    assert size.labels == (sample.labels != -100).sum()
    return sample


def workers_alive():
    return [child for child in multiprocessing.active_children() if child.is_alive()]


@pytest.fixture
def mixed(tmp_path):
    """Two datasets with images, augmentation and a video, and a few bad lines."""
    wide, tall = (
        write_picture(tmp_path / name, *size)
        for name, size in [("w.png", (120, 56)), ("t.png", (50, 110))]
    )
    write_lines(
        tmp_path / "a.jsonl",
        [talk(f"what {j}?", "a boat", image=[wide, tall][j % 2]) for j in range(7)]
        + [b"{", talk("<image><image>which?", "none", image=[wide, tall])]
        + [talk("<video>\nwhat?", "a film", video=[wide, tall] * 4)],
    )
    write_lines(tmp_path / "b.jsonl", [talk(f"say {j}", "y" * (j + 1)) for j in range(9)] + [b"7"])
    meta = {
        "a": {"root": "", "annotation": "a.jsonl", "data_augment": True, "max_dynamic_patch": 4},
        "b": {"root": "", "annotation": "b.jsonl", "repeat_time": 1.5},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return str(tmp_path / "meta.json")
