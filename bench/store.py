"""`MemoryStore`, the cache of image memories: digests of model and image, hits, misses and files.

The vision tower does not run, its output is random; add its time from `bench vision` to a miss.
Rows have the bytes that a way processes, `mib`, and those per second, `gb_s`.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import comemo_kernels as ops
from bench import measure, progress
from bench.models import draw_model
from bench.ways import Row
from comemo import MemoryStore
from comemo.memory.parts import memory_settings, memory_weights
from comemo.store.keys import identify_image, identify_model, stamp_model

GRIDS = {1: (1, 1), 13: (3, 4)}  # by tiles, thumbnail included


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=("2B", "9B"))
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--tiles", type=int, default=13, choices=GRIDS)
    parser.add_argument("--layers", type=int, help="of the language model, default: all")


@torch.inference_mode()
def run(options: argparse.Namespace) -> Iterator[Row]:
    for name in progress.each(options.dtype):
        model = draw_model(options.size, getattr(torch, name), options.layers).model
        case = f"{options.size}, {options.tiles} tiles, {name}"
        with tempfile.TemporaryDirectory() as folder:
            for way, took, nbytes in _measure(model, GRIDS[options.tiles], folder):
                row: Row = {"case": case, "pass": "store", "way": way, "us": 1e6 * took}
                yield row | {"mib": nbytes / 2**20, "gb_s": nbytes / took / 1e9}
        del model


def _measure(model: Any, grid: tuple[int, int], folder: str) -> Iterator[tuple[str, float, int]]:
    """Ways, their seconds, and the bytes that they process."""
    config, device = model.config, model.device
    tokens = ops.image_tokens(grid, config.side, config.use_thumbnail)
    side = config.vision_config.image_size[0]
    pixels = torch.randn(tokens // config.tokens_per_tile, 3, side, side).to(model.dtype)
    pixels = pixels.to(device)
    image_mask = torch.ones(1, tokens, dtype=torch.bool, device=device)
    places = model.prompt_position_ids(image_mask, image_mask.long(), [grid])
    media = torch.randn(1, tokens, config.text_config.hidden_size, device=device).to(model.dtype)
    weights = sum(weight.nbytes for _, weight in memory_weights(model))

    def build(store: MemoryStore) -> Any:
        with mock.patch.object(type(model), "project_images", return_value=media):
            return model.build_image_memory(pixels, image_mask, places, [grid], store)

    def timed(call: Callable[[], Any], repeats: int = 3) -> float:
        call()
        return measure.seconds(call, repeats)

    def parts() -> tuple[dict[str, Any], list[tuple[str, torch.Tensor]]]:
        return memory_settings(model), memory_weights(model)

    yield "weights summed, for every call", timed(lambda: stamp_model(*parts())), weights
    yield "weights digested, once", measure.seconds(lambda: identify_model(*parts())), weights
    identity, ids = identify_model(*parts()), places[0].int().cpu()
    digest = timed(lambda: identify_image(identity, pixels, ids))
    yield "picture digested", digest, pixels.nbytes

    def miss(store: MemoryStore) -> None:
        store.clear(disk=True)
        build(store)

    held, filed, read = (MemoryStore(), MemoryStore(directory=folder), MemoryStore(0, folder))
    missed, written = timed(lambda: miss(held)), timed(lambda: miss(filed))
    nbytes = held.stats.bytes
    yield "miss, without the tower", missed, nbytes
    yield "miss, and written to a file", written, nbytes
    yield "hit in memory", timed(lambda: build(held)), nbytes
    yield "hit in a file", timed(lambda: build(read)), nbytes
    assert (read.stats.disk_hits, read.stats.misses) == (4, 0)
