"""End to end: time to the first token and tokens per second of a conversation.

A conversation about one image with random weights: a question about a new image, a second
question, and a question about a known image in another conversation, from a store. The published
way for comparison, a stand-in made of this library's modules, runs the vision tower and the whole
prompt for every question, and builds the memory for every token; with `--published` the published
code itself does (`bench/published_run.py`). Also decoding in batches of prompts with their own
images, or with one for all (`--batches`, `--batch-pictures`): the decode loop, plain calls with a
growing KV cache, torch.compile with a static cache, the stand-in.

`peak_gib` is the peak memory of the process so far, on a GPU of the row; `predicted_gib` is the
formula of `bench.peak`. On a CPU `first_limit_s` and `limit_s` are the least times of the first
token and of later ones, by `bench/model_work.py` at the rates of the same run, and `of_limit` is
the share of the latter.
"""

import argparse
import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import CompileConfig

import comemo_kernels as ops
from bench import measure, peak, progress, published_run
from bench.decode import PICTURES, add_batch_arguments
from bench.model_work import prompt_work, step_work
from bench.models import SIZES, draw_model, draw_prompts, give_words, layers_of
from bench.recompute import RecomputedMemory, recomputing
from bench.ways import Limits, Row
from comemo import ChatSession, DecodeLoop, MemoryStore
from comemo.chat.streamers import TokenClock

QUESTIONS = ("What is in this picture?", "And who is on the boat?")
WAYS = ("ours", "eager, memory kept", "torch.compile, static cache", "published")
STAND_IN = "published, as reimplemented here"
FEW_LAYERS, FEW_TILES = 4, (2, 1)  # what a CPU takes by default
FEW_BATCHES = (1, 4)
TILES = (4, 3)  # columns and rows
BATCHES = {"cpu": (1, 4, 8, 32), "cuda": (1, 8, 32)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="2B")
    parser.add_argument("--layers", type=int, help="decoder layers; 0: those of the size")
    parser.add_argument("--cols", type=int, help="of tiles in an image")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--pictures", type=int, default=1, help="images of the first question")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    add_batch_arguments(parser)
    measure.add_all(parser)
    published_run.add_arguments(parser)


def grid_of(options: argparse.Namespace) -> tuple[int, int]:
    """Columns and rows of tiles: those that are given, of the others the default."""
    cols, rows = FEW_TILES if measure.few(options) else TILES
    return options.cols or cols, options.rows or rows


def steps_of(options: argparse.Namespace) -> tuple[list[str], list[tuple[int, str, str]]]:
    """Ways of a conversation; rows, whose pictures and way of each batch."""
    few = measure.few(options)
    ways = list(options.ways or WAYS)
    batches, device = options.batches, measure.default_device()
    if batches is None:
        batches = FEW_BATCHES if few else BATCHES[device]
    # A row alone has its own; on a GPU all have.
    kinds = options.batch_pictures or (PICTURES if device == "cpu" else ("own",))
    timed = options.ways or (WAYS[:1] if few else WAYS)
    chosen = [(n, kind) for n in batches for kind in (kinds if n > 1 else ("own",))]
    return ways, [(n, kind, way) for n, kind in chosen for way in timed]


def run(options: argparse.Namespace) -> Iterator[Row]:
    if options.published:
        published_run.check(options)
    base = 0.0 if torch.cuda.is_available() else measure.peak_gib()  # the interpreter and torch
    model = draw_model(options.size, getattr(torch, options.dtype), layers_of(options, FEW_LAYERS))
    chat = Chat(model, options)
    ways, batches = steps_of(options)
    again = [chat.tiles + 3] * (("published" in ways) + options.published)
    progress.plan([chat.tiles + 2, 1, 2, *again, *(n for n, _, _ in batches)])
    for row in chat.conversation(ways):
        if "predicted_gib" in row:
            row["predicted_gib"] += base
        yield row
    for batch, pictures, way in batches:
        gc.collect()
        yield chat.decode(batch, pictures, way)


class Chat:
    """A model, its images and what all rows share."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        self.model, self.options, self.device = model, options, model.device.type
        self.processor = give_words(model)
        config, self.grid = model.config, grid_of(options)
        self.tiles = ops.image_tokens(self.grid, config.side) // config.tokens_per_tile
        layers = config.text_config.num_hidden_layers
        case = f"{options.size}, {options.pictures * self.tiles} tiles, {options.dtype}"
        self.same: Row = {"case": case, "layers": layers}
        self.settings = {
            "max_new_tokens": options.tokens,
            "do_sample": False,
            "eos_token_id": None,
        }
        self.limits = Limits.of("cpu", model.dtype) if self.device == "cpu" else None
        self.answer: list[int] = []  # of the stand-in

    def conversation(self, ways: Sequence[str]) -> Iterator[Row]:
        """Three questions, and the second once more as published."""
        options, model, tiles = self.options, self.model, self.tiles
        images = [(torch.randn(tiles, 3, 448, 448), self.grid) for _ in range(options.pictures)]
        store = MemoryStore(budget=2**40)
        _warm_up(model, self.processor, self.settings | {"memory_store": store})
        loop: dict[str, Any] = {"decode_loop": DecodeLoop(model)} if self.device == "cuda" else {}

        def session() -> ChatSession:
            return ChatSession(model, self.processor, memory_store=store, **self.settings, **loop)

        first, known = session(), session()
        for name, talk, question, shown, new, cost in (
            ("new picture", first, QUESTIONS[0], images, tiles * len(images), tiles + 2),
            ("second question", first, QUESTIONS[1], None, 0, 1),
            (
                "known picture",
                known,
                "Look here: <image>" + "<image>" * (len(images) - 1),
                images,
                0,
                2,
            ),
        ):
            progress.begin(f"{name}, ours", cost)
            peak.reset()
            talk.ask(question, shown)
            report = talk.report
            assert report is not None
            row: Row = self.same | {
                "pass": name,
                "way": "ours",
                "first_s": report.first_s,
                "token_s": report.per_token_s,
                "read_tokens": report.read_tokens,
                "peak_gib": measure.peak_gib(),
                "predicted_gib": peak.predict(model, talk, tiles if shown else 0) / 2**30,
            }
            yield row | self._limit(row, report.prompt_tokens, new)
        if "published" in ways:
            progress.begin(f"second question, {STAND_IN}", tiles + 3)
            yield self._published(images, first.history[:1])
        if options.published:
            progress.begin("second question, published code", tiles + 3)
            found, answer = published_run.time_published(
                model, self.processor, images, first.history[:1], QUESTIONS[1], options
            )
            row = self.same | {"pass": "second question"} | found
            row |= self._limit(row, row["read_tokens"], tiles * len(images))
            yield row | ({"same_tokens": answer == self.answer} if self.answer else {})

    def _limit(self, row: Row, prompt: int, tiles: int) -> Row:
        """Least times of the first token and of later ones by the rates of this run, on a CPU."""
        if self.limits is None:
            return {}
        read = row["read_tokens"]
        keys = self.tiles * self.options.pictures * self.model.config.tokens_per_tile
        first = self.limits.us(prompt_work(self.model, read, prompt - read, keys, tiles)) / 1e6
        # Halfway through the answer.
        step = step_work(self.model, [prompt + self.options.tokens // 2], [keys], keys)
        least = self.limits.us(step) / 1e6
        found = {"first_limit_s": first, "first_of_limit": first / row["first_s"]}
        return found | {"limit_s": least, "of_limit": least / row["token_s"]}

    def _published(self, images: Any, history: Any) -> Row:
        """A second question, answered like the published code."""
        model, tiles = self.model, [pixel_values for pixel_values, _ in images]
        for _ in range(2 if self.device == "cuda" else 1):  # cuDNN plans each length once
            peak.reset()
            clock = TokenClock()
            _, inputs = model.prepare_chat(
                self.processor.tokenizer,
                torch.cat(tiles),
                [*history, (QUESTIONS[1], None)],
                [len(t) for t in tiles],
                [grid for _, grid in images],
            )
            inputs["image_memory"] = RecomputedMemory.of(inputs["image_memory"])
            with recomputing(model.model):
                out = model.generate(
                    **inputs, **self.settings, past_key_values=DynamicCache(), streamer=clock
                )
        self.answer = out[0, 1:].tolist()  # after the start token
        prompt = inputs["position_ids"].shape[1]
        row: Row = self.same | {
            "pass": "second question",
            "way": STAND_IN,
            "first_s": clock.first,
            "token_s": clock.per_token,
            "read_tokens": prompt,
            "peak_gib": measure.peak_gib(),
        }
        return row | self._limit(row, prompt, self.tiles * len(images))

    def decode(self, batch: int, pictures: str, way: str) -> Row:
        """Tokens per second of a batch, after prompts of one image each, or of the same image."""
        name = f"decode, batch {batch}"
        if self.device == "cpu" and batch > 1:
            name += ", one picture" if pictures == "same" else ", own pictures"
        progress.begin(f"{name}, {way}", batch)
        model, inputs, memory = self.model, *self._prompts(batch, pictures)
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
            most = max(self.options.tokens, 16)
            # The first run captures and compiles; on a GPU cuDNN plans each length of the cache.
            runs = [most if self.device == "cuda" else 8, most]
            if self.device == "cpu" and "compile" not in way:
                runs = [most]
            for tokens in runs:
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
        row: Row = self.same | {
            "pass": name,
            "way": STAND_IN if way == "published" else way,
            "token_s": token_s,
            "tokens_per_s": batch / token_s,
        }
        if self.limits is not None:
            prompt = inputs["position_ids"].shape[1]
            keys = ops.image_tokens(self.grid, model.config.side)
            contexts = [prompt + most // 2] * batch
            work = step_work(model, contexts, [keys] * batch, len(memory))
            least = self.limits.us(work) / 1e6
            row |= {"limit_s": least, "of_limit": least / token_s}
        return row | {"peak_gib": measure.peak_gib()}

    def _prompts(self, batch: int, pictures: str) -> tuple[dict[str, Any], Any]:
        """Inputs of `generate` and the image memory, one for all prompts or of each."""
        if pictures == "own" or batch == 1:
            inputs, _, memory = draw_prompts(self.model, self.grid, batch)
            return inputs, memory
        inputs, image, memory = draw_prompts(self.model, self.grid, 1)
        with torch.no_grad():
            embeds = self.model.model.embed(inputs.pop("input_ids"), image, memory)
        inputs = {n: t.repeat(batch, 1) for n, t in inputs.items()}
        inputs["inputs_embeds"] = embeds.repeat(batch, 1, 1)
        return inputs, memory.repeat_interleave(batch)


def _warm_up(model: Any, processor: Any, settings: dict[str, Any]) -> None:
    """What is done once per process: load kernels, start threads, compute the weights' digest."""
    talk = ChatSession(model, processor, **settings | {"max_new_tokens": 2})
    talk.ask("a", (torch.randn(1, 3, 448, 448), (1, 1)))
    talk.ask("b")
