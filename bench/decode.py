"""Time per generated token, with the image memory and without it, alone and in batches.

One model with random weights takes decode steps on one prompt and KV cache, alternating between two
ways: read the image memory of the prefill (ours), or build keys and values of all image tokens
again in every mixin layer (the published code, for every token). On a GPU there is a sync after
each part, which a real step does not have.

The limit is the time that reading what a step needs (weights, KV cache, image memory) takes at the
rate that the same run measured, or on a CPU its FLOPs at the rate of a large GEMM if that is
longer; `floor_s` on a GPU. In batches (`--batches`) rows are copies of the prompt: with one picture
for all, whose memory is read once, or with their own.
"""

import argparse
import copy
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from bench import limits, measure, progress
from bench.model_work import step_work
from bench.models import SIZES, copies_of, draw_model, draw_prompts, layers_of
from bench.recompute import RecomputedMemory, recomputing
from bench.ways import Limits, Row, Work
from comemo import CoMemoForConditionalGeneration
from comemo.decode.cache import ROOM, RoomyCache
from comemo.mixin import MixinLayer
from comemo_kernels import ImageMemory

PICTURES = ("same", "own")
BATCHES = (1, 4, 8, 32)
FEW_LAYERS, FEW_BATCHES = 4, (1, 4, 8)  # what a CPU takes by default
WARM_UPS = 1  # steps of each way


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="2B")
    parser.add_argument("--layers", type=int, help="decoder layers; 0: those of the size")
    parser.add_argument("--cols", type=int, default=4)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8, help="decode steps of each way")
    parser.add_argument("--vision-tiles", type=int, default=2, help="tiles to time the tower")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_batch_arguments(parser)
    measure.add_all(parser)


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, nargs="*", help="rows that decode at once")
    words = "of the rows of a batch: one for all, or their own"
    parser.add_argument("--batch-pictures", nargs="+", choices=PICTURES, help=words)


def batches_of(options: argparse.Namespace) -> list[tuple[int, str]]:
    """Rows and whose pictures of each batch. A row alone has its own."""
    chosen = options.batches
    if chosen is None:
        chosen = BATCHES if measure.default_device() == "cpu" else ()
        chosen = FEW_BATCHES if measure.few(options) else chosen
    kinds = options.batch_pictures or PICTURES
    return [(n, kind) for n in chosen for kind in (kinds if n > 1 else ("own",))]


def run(options: argparse.Namespace) -> Iterator[Row]:
    layers = layers_of(options, FEW_LAYERS)
    model = draw_model(options.size, getattr(torch, options.dtype), layers)
    with torch.no_grad():
        decoding = Decoding(model, (options.cols, options.rows), options)
        rows = decoding.alone()
    yield from rows
    for batch, pictures in decoding.batches:
        row = decoding.in_batch(batch, pictures)
        if row is not None:
            yield row


class Decoding:
    """A prompt of one image in the KV cache of a model, whose next token is computed repeatedly."""

    def __init__(
        self,
        model: CoMemoForConditionalGeneration,
        grid: tuple[int, int],
        options: argparse.Namespace,
    ) -> None:
        self.model, self.tokens, self.device = model, options.tokens, model.device
        self.batches = batches_of(options)
        config = model.config
        self.M = ops.image_tokens(grid, config.side)
        tiles, layers = self.M // config.tokens_per_tile, config.text_config.num_hidden_layers
        case = f"{options.size}, {tiles} tiles, {options.dtype}"
        self.same: Row = {"case": case, "pass": "decode", "layers": layers}
        steps = 2 * (options.tokens + WARM_UPS)
        progress.plan([2 * options.vision_tiles, 8, steps / 4, *(2.0 for _ in self.batches)])
        progress.begin("vision tower", 2 * options.vision_tiles)
        pixels = torch.randn(
            options.vision_tiles, 3, 448, 448, dtype=model.dtype, device=self.device
        )
        self.vision = measure.seconds(lambda: model.model.project_images(pixels)) / len(pixels)
        print(f"vision tower and projector: {self.vision:.2f} s a tile")
        progress.begin("prefill", 8)
        self.memory, self.cache, self.token, self.position = self._prefill(grid)
        self._reading = 0.0  # bytes per second, on a GPU
        self.limits: Limits | None = None
        if self.device.type == "cpu":
            self.limits = Limits.of("cpu", model.dtype)

    def _prefill(self, grid: tuple[int, int]) -> tuple[ImageMemory, Any, Tensor, int]:
        inputs, image, memory = draw_prompts(self.model, grid, 1)
        input_ids, position_ids = inputs["input_ids"], inputs["position_ids"]
        start = measure.now()
        out = self.model(
            inputs_embeds=self.model.model.embed(input_ids, image, memory),
            position_ids=position_ids,
            cache=RoomyCache(self.model.config.text_config.num_hidden_layers, self.M + 96 + ROOM),
            image_memory=memory,
            use_cache=True,
            logits_to_keep=1,
        )
        self.prefill = measure.now() - start
        print(f"prefill of {self.M + 96} tokens: {self.prefill:.1f} s")
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        return memory, out.past_key_values, token, int(position_ids.max()) + 1

    def _step(self, cache: Any, memory: ImageMemory, batch: int = 1) -> Tensor:
        """Logits [B, 1, V] of the next token, which does not stay in the cache."""
        logits = self.model(
            input_ids=self.token.expand(batch, 1),
            position_ids=torch.full((batch, 1), self.position, device=self.device),
            query_position_ids=torch.full((batch, 1), self.M + 96, device=self.device),
            past_key_values=cache,
            image_memory=memory,
            use_cache=True,
        ).logits
        cache.crop(-1)  # the next step is the same
        return logits

    def alone(self) -> list[Row]:
        """Rows of both ways, whose steps alternate."""
        ways = {"memory": self.memory, "recomputed": RecomputedMemory.of(self.memory)}
        whole: dict[str, list[float]] = {name: [] for name in ways}
        mixin: dict[str, list[float]] = {name: [] for name in ways}
        progress.begin("one row", 2 * (self.tokens + WARM_UPS) / 4)
        with recomputing(self.model.model), MixinClock(self.model) as clock:
            for step in range(self.tokens + WARM_UPS):
                logits: list[Tensor] = []
                for name, way in ways.items():
                    progress.tell(f"{name}, step {step} of {self.tokens}")
                    clock.seconds = 0.0
                    start = measure.now()
                    logits.append(self._step(self.cache, way))
                    if step >= WARM_UPS:
                        whole[name].append(measure.now() - start)
                        mixin[name].append(clock.seconds)
                if not torch.allclose(*logits, rtol=1e-3, atol=1e-3):
                    raise RuntimeError("decode is not timed: logits of both ways must be equal")
        self.logits = logits[0]
        work = step_work(self.model, [self.M + 96], [self.M], self.M)
        rows = []
        for name in ways:
            row = self.same | {
                "way": name,
                "token_s": statistics.median(whole[name]),
                "mixin_s": statistics.median(mixin[name]),
            }
            rows.append(
                row
                | self._limit(work, row["token_s"])
                | {
                    "prefill_s": self.prefill,
                    "vision_s_per_tile": self.vision,
                    "memory_mib": self.memory.nbytes / 2**20 if name == "memory" else 0.0,
                    "peak_gib": measure.peak_gib(),
                }
            )
        ours, theirs = rows
        floor = ours.get("limit_s", ours.get("floor_s", 0.0))
        print(
            f"\nwhole step {theirs['token_s'] / ours['token_s']:.1f}x, mixin layers"
            f" {theirs['mixin_s'] / ours['mixin_s']:.1f}x faster with the memory;"
            f" {floor / ours['token_s']:.0%} of the limit of {work.moved / 2**30:.2f} GiB\n"
        )
        return rows

    def _limit(self, work: Work, token_s: float) -> Row:
        """The least time of a step by the rates of this run, and its share of the time measured."""
        if self.limits is None:
            self._reading = self._reading or limits.read_rate(self.device)
            return {"floor_s": work.moved / self._reading}
        least = self.limits.us(work) / 1e6
        return {"limit_s": least, "of_limit": least / token_s}

    @torch.no_grad()
    def in_batch(self, batch: int, pictures: str) -> Row | None:
        """A row of so many copies of the prompt; None, with a message, if they do not fit."""
        name = f"decode, batch {batch}, {'one picture' if pictures == 'same' else 'own pictures'}"
        progress.begin(name, 2.0)
        held = sum(t.nbytes for layer in self.cache.layers for t in (layer.keys, layer.values))
        # The first step moves the cache of one layer after the other into buffers with room.
        needed = batch * held * (1 + 1 / len(self.cache.layers))
        needed += batch * self.memory.nbytes if pictures == "own" else 0
        if self.device.type == "cpu" and needed > limits.free_bytes():
            print(f"{name} is not timed: needs {needed / 2**30:.1f} GiB of memory")
            return None
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(batch)
        memory = self.memory.repeat_interleave(batch)
        if pictures == "own":
            memory = copies_of(self.memory, batch)
        times = []
        for step in range(self.tokens + WARM_UPS):
            progress.tell(f"step {step} of {self.tokens}")
            start = measure.now()
            logits = self._step(cache, memory, batch)
            if step >= WARM_UPS:
                times.append(measure.now() - start)
        near = 1e-3 if self.model.dtype == torch.float32 else 5e-2  # other kernels for more rows
        if not torch.allclose(logits, self.logits.expand_as(logits), rtol=near, atol=near):
            raise RuntimeError(f"{name} is not timed: logits of all rows must be those of one")
        token_s = statistics.median(times)
        work = step_work(self.model, [self.M + 96] * batch, [self.M] * batch, len(memory))
        row = self.same | {"pass": name, "way": "memory", "token_s": token_s}
        return (
            row
            | {"tokens_per_s": batch / token_s}
            | self._limit(work, token_s)
            | {"memory_mib": memory.nbytes / 2**20, "peak_gib": measure.peak_gib()}
        )


class MixinClock:
    """Seconds in mixin layers inside a `with` block, including the build of keys and values."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, MixinLayer)]
        self.seconds, self._inside = 0.0, False

    def _timed(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # a layer may build within its forward
                return function(*args, **kwargs)
            start, self._inside = measure.now(), True
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds, self._inside = self.seconds + measure.now() - start, False

        return call

    def __enter__(self) -> "MixinClock":
        for layer in self.layers:
            layer.build = self._timed(layer.build)  # type: ignore[method-assign]
            layer.forward = self._timed(layer.forward)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.build, layer.forward
