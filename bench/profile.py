"""Where the time of a tile, a prompt and a decode step goes, by PyTorch's operators, on a CPU.

One profiled run of each part (the prompt is about a known picture), after a run that is not
profiled, whose time is `seconds`. Operators with less than 1 % of a part are added up as "others".
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import measure, progress
from bench.models import draw_model, draw_prompts
from comemo.decode.cache import RoomyCache

LEAST = 0.01  # share of a part that an operator is named from
TILES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, help="decoder layers, default 4, with --all 24")
    parser.add_argument("--cols", type=int, default=4)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    measure.add_all(parser)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if torch.cuda.is_available():
        raise ValueError("profile: wanted a machine without a GPU, whose kernels are not seen here")
    layers = options.layers or (4 if measure.few(options) else 24)
    model = draw_model("2B", getattr(torch, options.dtype), layers)
    case = f"2B, {options.dtype}, {options.batch} rows"
    parts = _parts(model, options)
    for part in progress.each(parts):
        for row in _profiled(parts[part]):
            yield {"case": case, "layers": layers, "pass": part} | row


def _parts(model: Any, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    grid, batch = (options.cols, options.rows), options.batch
    inputs, image, memory = draw_prompts(model, grid, batch)
    pixels = torch.randn(TILES, 3, 448, 448, dtype=model.dtype, device=model.device)
    length = inputs["input_ids"].shape[1]
    cache = RoomyCache(model.config.text_config.num_hidden_layers, length + 8)
    position = int(inputs["position_ids"].max()) + 1
    token = inputs["input_ids"][:, -1:]

    def prefill() -> None:
        cache.crop_to(0)
        model(
            inputs_embeds=model.model.embed(inputs["input_ids"], image, memory),
            position_ids=inputs["position_ids"],
            cache=cache,
            image_memory=memory,
            use_cache=True,
            logits_to_keep=1,
        )

    def decode() -> None:
        cache.crop_to(length)
        model(
            input_ids=token,
            position_ids=torch.full((batch, 1), position, device=model.device),
            query_position_ids=torch.full((batch, 1), length, device=model.device),
            cache=cache,
            image_memory=memory,
            use_cache=True,
        )

    found = {"vision": lambda: model.model.project_images(pixels)}
    return found | {"prefill": prefill, "decode": decode}


@torch.no_grad()
def _profiled(call: Callable[[], object]) -> Iterator[dict[str, Any]]:
    call()
    seconds = measure.seconds(call)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    events = [event for event in found.key_averages() if event.self_cpu_time_total > 0]
    total = sum(event.self_cpu_time_total for event in events)
    events.sort(key=lambda event: -event.self_cpu_time_total)
    named = [event for event in events if event.self_cpu_time_total >= LEAST * total]
    rest = events[len(named) :]
    rows = [(event.key, event.self_cpu_time_total, event.count) for event in named]
    rows.append(("others", sum(e.self_cpu_time_total for e in rest), sum(e.count for e in rest)))
    for name, spent, count in rows:
        yield {
            "operator": name,
            "ms": spent / 1e3,
            "share": spent / total,
            "calls": count,
            "seconds": seconds,
        }
