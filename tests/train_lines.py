"""JSON lines, images and settings for tests of training data."""

import json

import numpy as np
from PIL import Image

from comemo import CoMemoConfig
from comemo.train.data.loader import make_loader
from comemo.train.settings import DataSettings

SYSTEM = {"from": "system", "value": "short."}  # the template's own is long


def talk(*texts, **more):
    """A line's object: texts of questions and answers in turn."""
    roles = ("human", "gpt")
    turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": [SYSTEM, *turns], **more}


def write_lines(path, items):
    """A JSONL file; items are objects, or bytes as they are."""
    lines = [
        item if isinstance(item, bytes) else json.dumps(item, ensure_ascii=False).encode()
        for item in items
    ]
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
