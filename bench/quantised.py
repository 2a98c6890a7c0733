"""Weights of 8 and 4 bits on a CPU: bytes, time to load, memory, and time of each phase.

A checkpoint of random weights in bfloat16 is written once. Ways: `float32` and `bfloat16` load it
as it is, `int8` and `int4` as `comemo.weights.quantising` suits them, in a model of `--dtype`.
Passes: `load`, with the bytes of all weights and of those of linear layers, and the most that the
process has allocated meanwhile; `vision`, one tile; `prefill` and `decode`, of a prompt with one
tile. The ways take turns in each pass. `error` is that of the first
logits, relative to those of float32 (of random weights: trained ones are in docs/quantisation.md).
"""

import argparse
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import measure, progress
from bench.models import SIZES, draw_model, draw_prompts
from bench.ways import Row, relative_error
from comemo import CoMemoForConditionalGeneration
from comemo.weights.quantised import is_quantised, parts_of
from comemo.weights.quantising import BITS, quantisation

WAYS = ("float32", "bfloat16", *BITS)
LAYERS = 4  # a mixin layer is before the fourth
GRID = (1, 1)
ROUNDS = {"vision": 1, "prefill": 3, "decode": 15}
PERIOD = 0.02  # seconds between two looks at the memory of a process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="2B")
    parser.add_argument("--layers", type=int, default=LAYERS, help="decoder layers")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    words = "of the activations of int8 and int4"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=words)


@torch.no_grad()
def run(options: argparse.Namespace) -> Iterator[Row]:
    if measure.default_device() != "cpu":
        raise SystemExit("bench quantised: measures a CPU; hide the GPU: CUDA_VISIBLE_DEVICES=")
    case = {"case": f"{options.size}, {options.layers} layers, {options.dtype}"}
    progress.plan([1.0] * (1 + len(options.ways) + len(ROUNDS)))
    with tempfile.TemporaryDirectory() as folder:
        progress.begin("a checkpoint")
        draw_model(options.size, torch.bfloat16, options.layers).save_pretrained(
            folder, save_original_format=False
        )
        models = {}
        for way in options.ways:
            progress.begin(f"load {way}")
            models[way], row = measure_load(folder, way, options.dtype)
            yield case | {"pass": "load", "way": way} | row
    prompts = {way: Prompt(model) for way, model in models.items()}
    truth = prompts[options.ways[0]].logits
    for name, rounds in ROUNDS.items():
        progress.begin(name)
        calls = {way: getattr(prompt, name) for way, prompt in prompts.items()}
        timings = measure.compare(
            {way: _once(call) for way, call in calls.items()}, 1, "cpu", rounds
        )
        for way, timing in timings.items():
            row = {"pass": name, "way": way, "seconds": timing.us / 1e6}
            row |= {"low": timing.low_us / 1e6, "high": timing.high_us / 1e6}
            row["faster"] = timings[options.ways[0]].us / timing.us
            if name == "prefill":
                row["error"] = relative_error(prompts[way].logits, truth)
            yield case | row


def _once(call: Callable[[], Any]) -> Callable[[int], Any]:
    return lambda _: call()


def load(folder: str, way: str, dtype: str) -> Any:
    """Load a checkpoint.

    Args:
        folder: of the checkpoint.
        way: one of `WAYS`.
        dtype: of the activations of int8 and int4.
    """
    kind: Any = CoMemoForConditionalGeneration
    config = kind.config_class.from_pretrained(folder)
    given = {"quantization_config": quantisation(way, config)} if way in BITS else {}
    name = dtype if way in BITS else way
    return kind.from_pretrained(folder, dtype=getattr(torch, name), **given)


def measure_load(folder: str, way: str, dtype: str) -> tuple[Any, Row]:
    """The model, and seconds, bytes of weights and bytes allocated at the peak of loading it."""
    before, start = _allocated(), time.perf_counter()
    with _watching() as peak:
        model = load(folder, way, dtype)
    seconds = time.perf_counter() - start
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return model, {
        "seconds": seconds,
        "bytes": sum(map(_bytes, model.parameters())),
        "linear_bytes": sum(_bytes(layer.weight) for layer in layers),
        "peak_bytes": peak[0] - before,
    }


def _bytes(weight: Any) -> int:
    if is_quantised(weight):
        return sum(part.nbytes for _, part in parts_of("", weight))
    return int(weight.nbytes)


@contextlib.contextmanager
def _watching() -> Iterator[list[int]]:
    """The most that this process has allocated in the `with` block, looked at by a thread."""
    peak, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(PERIOD):
            peak[0] = max(peak[0], _allocated())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _allocated() -> int:
    """Bytes of this process in memory, without those of files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


class Prompt:
    """One picture of one tile and a few words, read by a model.

    Args:
        model: what `load` returned.

    Attributes:
        logits: [V] of the first new token.
    """

    def __init__(self, model: Any) -> None:
        torch.manual_seed(0)
        self.model = model
        self.pixels = torch.randn(1, 3, 448, 448).to(model.dtype)
        inputs, image, memory = draw_prompts(model, GRID, 1)
        self.memory, self.places = memory, inputs["position_ids"]
        self.embeds = model.model.embed(inputs["input_ids"], image, memory)
        output = self.prefill()
        self.cache, self.logits = output.past_key_values, output.logits[0, -1].float()
        self.token = output.logits[:, -1].argmax(-1, keepdim=True)
        self.last = self.places.max().view(1, 1) + 1
        self.after = torch.full((1, 1), self.places.shape[1])

    def vision(self) -> Any:
        """Image tokens of a tile."""
        return self.model.model.project_images(self.pixels)

    def prefill(self) -> Any:
        """The whole prompt, with a new KV cache; keys of the image memory are built once."""
        return self.model(
            inputs_embeds=self.embeds,
            position_ids=self.places,
            image_memory=self.memory,
            use_cache=True,
            logits_to_keep=1,
        )

    def decode(self) -> None:
        """One token, which does not stay in the cache."""
        self.model(
            input_ids=self.token,
            position_ids=self.last,
            query_position_ids=self.after,
            past_key_values=self.cache,
            image_memory=self.memory,
            use_cache=True,
        )
        self.cache.crop(-1)
