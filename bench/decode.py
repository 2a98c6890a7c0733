"""Time per generated token, with the image memory and without it.

One model with random weights takes decode steps on one prompt and KV cache, alternating between two
ways: read the image memory of the prefill (ours), or build keys and values of all image tokens
again in every mixin layer (the published code, for every token). On a GPU there is a sync after
each part, which a real step does not have. The floor is the bytes that a step has to read (weights,
KV cache, image memory) divided by the read bandwidth measured in the same run.
"""

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from bench import measure
from bench.models import SIZES, draw_model, draw_prompts
from bench.recompute import RecomputedMemory, recomputing
from comemo import CoMemoForConditionalGeneration
from comemo.mixin import MixinLayer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="2B")
    parser.add_argument("--layers", type=int, help="decoder layers, default: those of the size")
    parser.add_argument("--cols", type=int, default=4)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8, help="decode steps of each way")
    parser.add_argument("--vision-tiles", type=int, default=2, help="tiles to time the tower")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = draw_model(options.size, getattr(torch, options.dtype), options.layers)
    with torch.no_grad():
        return _measure(model, (options.cols, options.rows), options)


def _measure(
    model: CoMemoForConditionalGeneration, grid: tuple[int, int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    config, tokens, device = model.config, options.tokens, model.device
    M = ops.image_tokens(grid, config.side)
    tiles = M // config.tokens_per_tile
    pixels = torch.randn(options.vision_tiles, 3, 448, 448, dtype=model.dtype, device=device)
    vision = measure.seconds(lambda: model.model.project_images(pixels))
    print(f"vision tower and projector: {vision / len(pixels):.2f} s a tile")

    inputs, image, memory = draw_prompts(model, grid, 1)
    input_ids, position_ids = inputs["input_ids"], inputs["position_ids"]
    start = measure.now()
    out = model(
        inputs_embeds=model.model.embed(input_ids, image, memory),
        position_ids=position_ids,
        image_memory=memory,
        use_cache=True,
        logits_to_keep=1,
    )
    prefill = measure.now() - start
    cache = out.past_key_values
    print(f"prefill of {M + 96} tokens: {prefill:.1f} s")

    ways = {"memory": memory, "recomputed": RecomputedMemory.of(memory)}
    whole: dict[str, list[float]] = {name: [] for name in ways}
    mixin: dict[str, list[float]] = {name: [] for name in ways}
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    position = int(position_ids.max()) + 1
    with recomputing(model.model), MixinClock(model) as clock:
        for step in range(tokens + 1):  # the first is a warm-up
            logits: list[Tensor] = []
            for name, way in ways.items():
                clock.seconds = 0.0
                start = measure.now()
                result = model(
                    input_ids=token,
                    position_ids=torch.tensor([[position]], device=device),
                    query_position_ids=torch.tensor([[M + 96]], device=device),
                    past_key_values=cache,
                    image_memory=way,
                    use_cache=True,
                )
                if step:
                    whole[name].append(measure.now() - start)
                    mixin[name].append(clock.seconds)
                logits.append(result.logits)
                cache.crop(-1)  # the other way takes the same step
            if not torch.allclose(*logits, rtol=1e-3, atol=1e-3):
                raise RuntimeError("decode is not timed: logits of both ways must be equal")

    read = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
    read += [p for layer in cache.layers for p in (layer.keys, layer.values)]
    unread = [m.kv_proj.weight for m in model.modules() if isinstance(m, MixinLayer)]
    step_bytes = sum(t.nbytes for t in read) + memory.nbytes - sum(t.nbytes for t in unread)
    floor = step_bytes / measure.read_bandwidth(device)
    rows = []
    for name in ways:
        rows.append(
            {
                "case": f"{options.size}, {tiles} tiles, {options.dtype}",
                "pass": "decode",
                "layers": config.text_config.num_hidden_layers,
                "way": name,
                "token_s": statistics.median(whole[name]),
                "mixin_s": statistics.median(mixin[name]),
                "floor_s": floor,
                "prefill_s": prefill,
                "vision_s_per_tile": vision / len(pixels),
                "memory_mib": memory.nbytes / 2**20 if name == "memory" else 0.0,
                "peak_gib": measure.peak_gib(),
            }
        )
    ours, theirs = rows
    print(
        f"\nwhole step {theirs['token_s'] / ours['token_s']:.1f}x, mixin layers"
        f" {theirs['mixin_s'] / ours['mixin_s']:.1f}x faster with the memory;"
        f" {floor / ours['token_s']:.0%} of the bandwidth limit of {step_bytes / 2**30:.2f} GiB\n"
    )
    return rows


class MixinClock:
    """Seconds in mixin layers inside a `with` block, including the build of keys and values."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, MixinLayer)]
        self.seconds = 0.0

    def _timed(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = measure.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += measure.now() - start

        return call

    def __enter__(self) -> "MixinClock":
        for layer in self.layers:
            layer.build = self._timed(layer.build)  # type: ignore[method-assign]
            layer.forward = self._timed(layer.forward)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.build, layer.forward
