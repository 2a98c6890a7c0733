"""Position ids of whole prompts: one launch, compared with the published loops on the host.

Ways: `eager`, loops over tiles with torch.linspace on the CPU and a copy to the device, like the
published code; `reference`, this library's vectorised PyTorch on the device; `ours`; and `ours, not
validated`, which has no sync.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from bench import measure, progress
from bench.cases import PROMPTS, Prompt
from comemo_kernels import reference

SIZES = {
    "one_image_3k": PROMPTS["one_image_3k"],
    "eight_of_3k": Prompt([(60, [(4, 3)], 36)], batch=8),
    "long_16k": Prompt([(64, [(4, 3), (4, 3), (3, 4), (4, 3)], 688)]),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=15)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = measure.default_device()
    for case in progress.each(options.cases):
        prompt = SIZES[case]
        image, attention = prompt.masks(device)
        grids = prompt.grids * prompt.batch
        arguments = (image, attention, grids, 16, "column")
        ways: dict[str, Callable[[], Tensor]] = {
            "eager": functools.partial(number_as_published, prompt, device),
            "reference": functools.partial(reference.rope_dhr_positions, *arguments),
            "ours": functools.partial(ops.rope_dhr_positions, *arguments),
            "ours, not validated": functools.partial(
                ops.rope_dhr_positions, *arguments, validate=False
            ),
        }
        wanted = ways["reference"]()
        for name, way in ways.items():
            if not torch.equal(way(), wanted):
                raise RuntimeError(f"positions: {name} is not timed: other ids for {case}")
        calls = {name: _of_any_set(way) for name, way in ways.items()}
        for name, timing in measure.compare(calls, 4, device, options.rounds).items():
            row: dict[str, Any] = {"case": case, "pass": "forward", "way": name}
            row |= {"us": timing.us, "low_us": timing.low_us, "high_us": timing.high_us}
            if device == "cuda":
                row["host_us"] = measure.host_us(ways[name], calls=20)
            yield row


def _of_any_set(call: Callable[[], Tensor]) -> Callable[[int], Tensor]:
    return lambda _: call()


def number_as_published(prompt: Prompt, device: str, side: int = 16) -> Tensor:
    """Ids [B, N]: tile by tile, column by column, by rounding down a float64 linspace."""
    rows = []
    for _ in range(prompt.batch):
        parts, count = [], 0
        for before, grids, after in prompt.samples:
            parts.append(count + torch.arange(before))
            count += before
            for cols, tiles_down in grids:
                raster = torch.arange(side * side).view(side, side)
                for i in range(cols if cols * tiles_down > 1 else 0):
                    for j in range(tiles_down):
                        y, x = (
                            torch.linspace(k * side / n, (k + 1) * side / n, side, dtype=float)
                            for k, n in ((j, tiles_down), (i, cols))
                        )
                        y, x = ((t - 1e-6).clamp(min=0) for t in (y, x))
                        parts.append(count + raster[y.long()][:, x.long()].flatten())
                parts.append(count + raster.flatten())
                count += side * side
                parts.append(count + torch.arange(after))
                count += after
        rows.append(torch.cat(parts))
    return torch.stack(rows).to(device)
