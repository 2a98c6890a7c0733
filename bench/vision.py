"""The vision tower and the projector, from pixels to media: images per second, and memory.

Ways: `N at once`, the tower's batch size in tiles (`config.tiles_at_once`). FLOPs are those of the
GEMMs and of the attention; the limit is the rate of a large GEMM. Images have 13 tiles.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from bench import limits, measure, progress
from bench.models import draw_model
from bench.ways import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--size", default="2B", choices=("2B", "9B"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--tiles", type=int, default=208 if gpu else 4)
    parser.add_argument(
        "--at-once", nargs="+", type=int, default=[4, 16, 64, 208] if gpu else [1, 4]
    )


@torch.inference_mode()
def run(options: argparse.Namespace) -> Iterator[Row]:
    device, dtype = measure.default_device(), getattr(torch, options.dtype)
    # Few layers: the language model does not run.
    model = draw_model(options.size, dtype, layers=4).model
    config, vision = model.config, model.config.vision_config
    side = vision.image_size[0]
    rate = limits.gemm_rate(device, dtype)
    pixels = torch.randn(options.tiles, 3, side, side, dtype=dtype, device=device)
    flops = flops_of_tile(vision, config.text_config.hidden_size, config.tokens_per_tile)

    def see() -> torch.Tensor:
        return model.project_images(pixels)

    for at_once in progress.each(options.at_once, lambda count: f"{count} at once"):
        config.tiles_at_once = at_once
        once = measure.seconds(see)  # the result on a CPU, a warm-up on a GPU
        best = once if device == "cpu" else measure.seconds(see, 5)
        row: Row = {"case": f"{options.size}, {options.tiles} tiles, {options.dtype}"}
        row |= {"pass": "vision", "way": f"ours, {at_once} at once", "us": 1e6 * best}
        row |= {"tiles_s": options.tiles / best, "pictures_s": options.tiles / best / 13}
        row |= {"tflop_s": flops * options.tiles / best / 1e12}
        row["of_limit"] = flops * options.tiles / best / rate
        if device == "cuda":
            row["extra_mib"] = measure.extra_mib(see)
        yield row


def flops_of_tile(vision: Any, width: int, tokens: int) -> float:
    """FLOPs of one tile, from patches to image tokens."""
    C, wide, layers = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
    patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
    n = patches + 1
    layer = 2 * n * (4 * C * C + 2 * C * wide) + 4 * n * n * C
    embedding = 2 * patches * C * 3 * vision.patch_size[0] ** 2
    folded = patches // tokens * C
    return layers * layer + embedding + 2 * tokens * width * (folded + width)
