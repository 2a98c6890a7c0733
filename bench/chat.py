"""End to end: time to the first token and tokens per second of a conversation.

A conversation about one image with random weights: a question about a new image, a second
question, and a question about a known image in another conversation, from a store. The published
way for comparison runs the vision tower and the whole prompt for every question, and builds the
memory for every token. On a GPU also decoding in batches with one image per prompt: the decode
loop, plain calls with a growing KV cache, torch.compile with a static cache, the published way.
`peak_gib` is the peak memory of the process so far, on a GPU of the row; `predicted_gib` is the
formula of `bench.peak`.
"""

import argparse
import gc
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import CompileConfig

import comemo_kernels as ops
from bench import measure, peak
from bench.models import SIZES, draw_model, draw_prompts, give_words
from bench.recompute import RecomputedMemory, recomputing
from comemo import ChatSession, DecodeLoop, MemoryStore
from comemo.chat.streamers import TokenClock

QUESTIONS = ("What is in this picture?", "And who is on the boat?")
WAYS = ("ours", "eager, memory kept", "torch.compile, static cache", "published")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    batches = [1, 8, 32] if torch.cuda.is_available() else []
    parser.add_argument("--size", choices=SIZES, default="2B")
    parser.add_argument("--layers", type=int, help="decoder layers, default: those of the size")
    parser.add_argument("--cols", type=int, default=4)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1, help="images of the first question")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batches", type=int, nargs="*", default=batches)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = 0.0 if torch.cuda.is_available() else measure.peak_gib()  # the interpreter and torch
    model = draw_model(options.size, getattr(torch, options.dtype), options.layers)
    processor = give_words(model)
    grid = (options.cols, options.rows)
    tiles = ops.image_tokens(grid, model.config.side) // model.config.tokens_per_tile
    case = f"{options.size}, {options.pictures * tiles} tiles, {options.dtype}"
    layers = model.config.text_config.num_hidden_layers
    same = {"case": case, "layers": layers}
    for row in _conversation(model, processor, grid, tiles, options):
        if "predicted_gib" in row:
            row["predicted_gib"] += base
        yield same | row
    for batch in options.batches:
        for way in options.ways:
            gc.collect()
            yield (
                same
                | {"pass": f"decode, batch {batch}"}
                | _decode(model, grid, batch, way, options)
            )


def _conversation(
    model: Any, processor: Any, grid: tuple[int, int], tiles: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    images = [(torch.randn(tiles, 3, 448, 448), grid) for _ in range(options.pictures)]
    settings = {"max_new_tokens": options.tokens, "do_sample": False, "eos_token_id": None}
    store = MemoryStore(budget=2**40)
    _warm_up(model, processor, settings | {"memory_store": store})
    loop: dict[str, Any] = {"decode_loop": DecodeLoop(model)} if model.device.type == "cuda" else {}

    def session() -> ChatSession:
        return ChatSession(model, processor, memory_store=store, **settings, **loop)

    first, known = session(), session()
    for name, talk, question, shown in (
        ("new picture", first, QUESTIONS[0], images),
        ("second question", first, QUESTIONS[1], None),
        ("known picture", known, "Look here: <image>" + "<image>" * (len(images) - 1), images),
    ):
        peak.reset()
        talk.ask(question, shown)
        report = talk.report
        assert report is not None
        yield {
            "pass": name,
            "way": "ours",
            "first_s": report.first_s,
            "token_s": report.per_token_s,
            "read_tokens": report.read_tokens,
            "peak_gib": measure.peak_gib(),
            "predicted_gib": peak.predict(model, talk, tiles if shown else 0) / 2**30,
        }
    if "published" in options.ways:
        peak.reset()
        yield {"pass": "second question", "way": "published"} | _published(
            model, processor, images, first.history[:1], settings
        )


def _warm_up(model: Any, processor: Any, settings: dict[str, Any]) -> None:
    """What is done once per process: load kernels, start threads, compute the weights' digest."""
    talk = ChatSession(model, processor, **settings | {"max_new_tokens": 2})
    talk.ask("a", (torch.randn(1, 3, 448, 448), (1, 1)))
    talk.ask("b")


def _published(
    model: Any, processor: Any, images: Any, history: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    """A second question, answered like the published code."""
    tiles = [pixel_values for pixel_values, _ in images]
    _, inputs = model.prepare_chat(
        processor.tokenizer,
        torch.cat(tiles),
        [*history, (QUESTIONS[1], None)],
        [len(t) for t in tiles],
        [grid for _, grid in images],
    )
    inputs["image_memory"] = RecomputedMemory.of(inputs["image_memory"])
    with recomputing(model.model):
        for _ in range(2 if model.device.type == "cuda" else 1):  # cuDNN plans each length once
            clock = TokenClock()
            model.generate(**inputs, **settings, past_key_values=DynamicCache(), streamer=clock)
    return {
        "first_s": clock.first,
        "token_s": clock.per_token,
        "read_tokens": inputs["position_ids"].shape[1],
        "peak_gib": measure.peak_gib(),
    }


def _decode(
    model: Any, grid: tuple[int, int], batch: int, way: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens per second of a batch, after prompts of one image each."""
    inputs, _, memory = draw_prompts(model, grid, batch)
    static = GenerationConfig(cache_implementation="static", compile_config=CompileConfig())
    chosen = {
        "ours": {"decode_loop": DecodeLoop(model)},
        "torch.compile, static cache": {"generation_config": static},
    }.get(way)
    building: AbstractContextManager[None] = nullcontext()
    if way == "published":
        memory, building = RecomputedMemory.of(memory), recomputing(model.model)
    times: list[float] = []
    with building:
        most = max(options.tokens, 16)
        # The first run captures and compiles; on a GPU cuDNN plans each length of the cache.
        for tokens in (most if model.device.type == "cuda" else 8, most):
            peak.reset()
            clock = TokenClock()
            model.generate(
                **inputs,
                image_memory=memory,
                prefill_chunk_size=4096,
                max_new_tokens=tokens,
                streamer=clock,
                **{"do_sample": False, "eos_token_id": None, "pad_token_id": 2},
                **(chosen or {"past_key_values": DynamicCache()}),
            )
            times = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
    token_s = sorted(times)[len(times) // 2] if times else math.nan
    return {
        "way": way,
        "token_s": token_s,
        "tokens_per_s": batch / token_s,
        "peak_gib": measure.peak_gib(),
    }
