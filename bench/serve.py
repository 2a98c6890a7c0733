"""A server's engine: many clients at once, as one ragged batch and one after another.

`clients` ask at the same time, each about a picture of its own, all about one picture, or about
none. `first_s` is the median time to a first token, everything included, `token_s` the median time
from one token to the next, `tokens_per_s` of all clients together, `found` the pictures that were
not computed. The way "over HTTP" sends the same requests to a server of this process, pictures as
PNG in base64. The pass "long prompt" is one answer while another client's long prompt is read:
`token_s` is then the longest time between two tokens of the answer, with parts of prompts as long
as `stall_s` allows and with whole ones.
"""

import argparse
import base64
import io
import itertools
import json
import queue
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

import comemo.nano
from bench import progress
from bench.models import SIZES, draw_model, give_words
from comemo import prompts
from comemo.cli.checkpoints import load_checkpoint
from comemo.images import load_image
from comemo.serve.engine.continuous import ContinuousEngine
from comemo.serve.engine.reader import OpenedPicture, PromptReader
from comemo.serve.engine.settings import EngineSettings
from comemo.serve.work import Begun, Failed, Finished, Piece, Sampling, Work

PICTURES = ("own", "same", "none")
WAYS = ("one after another", "ragged batch", "over HTTP")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=(*SIZES, "nano"), default="nano")
    parser.add_argument("--layers", type=int, help="decoder layers, default: those of the size")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--width", type=int, default=640, help="of the pictures, in pixels")
    parser.add_argument("--height", type=int, default=448)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--pictures", choices=PICTURES, nargs="+", default=list(PICTURES))
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer, at most")
    parser.add_argument("--prompt", type=int, default=2000, help="words of the long prompt")


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model, processor = _load(options)
    case = f"{options.size}, {options.dtype}"
    chosen = list(itertools.product(options.pictures, options.clients, options.ways))
    progress.plan([*(clients for _, clients, _ in chosen), 2.0, 2.0])
    for pictures, clients, way in chosen:
        progress.begin(f"{pictures} picture, {clients} clients, {way}", clients)
        answers = 1 if way == "one after another" else clients
        engine = _engine(model, processor, answers)
        try:
            asked = _requests(model, processor, clients, pictures, options)
            _warm_up(engine, asked)
            ask = _over_http if way == "over HTTP" else _directly
            found = ask(engine, model, processor, asked, options)
        finally:
            engine.close(0)
        yield {"case": case, "pass": f"{pictures} picture", "clients": clients, "way": way} | found
    for way, stall in (("in parts", EngineSettings.stall_s), ("whole", 1e9)):
        progress.begin(f"long prompt, {way}", 2.0)
        engine = _engine(model, processor, 2, stall)
        try:
            found = _interrupted(engine, model, processor, options)
        finally:
            engine.close(0)
        yield {"case": case, "pass": "long prompt", "clients": 2, "way": way} | found


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    dtype = getattr(torch, options.dtype)
    if options.size == "nano":
        model, processor = load_checkpoint(str(comemo.nano.checkpoint()))
        return model.to(dtype), processor
    model = draw_model(options.size, dtype, options.layers)
    return model, give_words(model)


def _engine(model: Any, processor: Any, answers: int, stall_s: float = 0.25) -> ContinuousEngine:
    settings = EngineSettings(answers=answers, waiting=256, waiting_each=256, stall_s=stall_s)
    stop = prompts.stop_text(model.config.template)
    return ContinuousEngine(model, processor.tokenizer, stop, settings)


class _Asked:
    """A request in the forms of both ways."""

    def __init__(
        self, reader: PromptReader, words: str, name: str, picture: Image.Image | None, tokens: int
    ) -> None:
        side = reader.config.vision_config.image_size[0]
        opened: list[OpenedPicture] = []
        content: list[dict[str, Any]] = [{"type": "text", "text": words}]
        shown = list(content)
        if picture is not None:
            pixels, grid = load_image(picture, side)
            opened = [OpenedPicture(name, grid, lambda: pixels)]
            content = [{"type": "image"}, *content]
            file = io.BytesIO()
            picture.save(file, "png")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            shown = [{"type": "image_url", "image_url": {"url": url}}, *shown]
        read = reader.read([{"role": "user", "content": content}], opened)
        sampling = Sampling(max_tokens=tokens, min_tokens=tokens)
        self.work = Work("bench", read.prompt, read.transcript, read.pictures, sampling)
        messages = [{"role": "user", "content": shown}]
        body = {"model": "bench", "messages": messages, "stream": True, "max_tokens": tokens}
        body["min_tokens"] = tokens
        self.body = json.dumps(body | {"comemo": {"report": True}}).encode()


def _requests(
    model: Any, processor: Any, clients: int, pictures: str, options: argparse.Namespace
) -> list[_Asked]:
    reader = PromptReader(model, processor)
    found = []
    for number in range(clients):
        name = f"{number if pictures == 'own' else 0}"
        picture = None
        if pictures != "none":
            torch.manual_seed(int(name))
            noise = torch.randint(0, 256, (options.height, options.width, 3), dtype=torch.uint8)
            picture = Image.fromarray(noise.numpy())
        words = f"Question {number}: what is in this picture, and where is it?"
        found.append(_Asked(reader, words, name, picture, options.tokens))
    return found


def _warm_up(engine: ContinuousEngine, asked: list[_Asked]) -> None:
    """What is done once per engine; in a namespace that the measured requests do not see."""
    work = replace(asked[0].work, namespace="warm-up", sampling=Sampling(max_tokens=2))
    _follow(engine, work)


def _follow(engine: ContinuousEngine, work: Work) -> tuple[Begun, list[float]]:
    """What a request tells, and when its tokens came."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engine.submit(work, events.put)
    begun, times = None, []
    while True:
        event = events.get()
        if isinstance(event, Begun):
            begun = event
        elif isinstance(event, Piece):
            times.append(time.perf_counter())
        elif isinstance(event, Failed):
            raise event.error
        elif isinstance(event, Finished):
            assert begun is not None
            return begun, times


def _all_at_once(
    calls: list[Callable[[], tuple[int, list[float]]]],
) -> dict[str, Any]:
    """Call all at the same time, each in a thread: pictures found, and when tokens came."""
    results: list[tuple[int, list[float]]] = []
    threads = [threading.Thread(target=lambda c=call: results.append(c())) for call in calls]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    gaps = [b - a for _, times in results for a, b in itertools.pairwise(times)]
    return {
        "first_s": statistics.median(times[0] - start for _, times in results),
        "token_s": statistics.median(gaps) if gaps else float("nan"),
        "tokens_per_s": sum(len(times) for _, times in results) / seconds,
        "whole_s": seconds,
        "found": sum(found for found, _ in results),
    }


def _directly(
    engine: ContinuousEngine, model: Any, processor: Any, asked: list[_Asked], options: Any
) -> dict[str, Any]:
    def call(one: _Asked) -> tuple[int, list[float]]:
        begun, times = _follow(engine, one.work)
        return begun.found_pictures, times

    return _all_at_once([lambda one=one: call(one) for one in asked])  # type: ignore[misc]


def _over_http(
    engine: ContinuousEngine, model: Any, processor: Any, asked: list[_Asked], options: Any
) -> dict[str, Any]:
    from comemo.serve.http.app import make_app
    from comemo.serve.http.run import listen, run_app
    from comemo.serve.http.settings import ServerSettings

    reader = PromptReader(model, processor)
    app = make_app(
        engine, reader, model.config, processor.tokenizer, ServerSettings("bench", concurrent=512)
    )
    sock, started, stop = listen("127.0.0.1", 0), threading.Event(), list[Any]()
    thread = threading.Thread(
        target=run_app, args=(app, engine, sock, 5, started.set, stop.append), daemon=True
    )
    thread.start()
    started.wait()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1/chat/completions"

    def call(one: _Asked) -> tuple[int, list[float]]:
        times, found = [], 0
        with urllib.request.urlopen(urllib.request.Request(url, one.body)) as response:
            for line in response:
                if b'"begun"' in line:
                    part = json.loads(line.removeprefix(b"data: "))
                    found = part["comemo"]["begun"]["found_pictures"]
                elif b'"content"' in line:
                    times.append(time.perf_counter())
        return found, times

    try:
        return _all_at_once([lambda one=one: call(one) for one in asked])  # type: ignore[misc]
    finally:
        stop[0]()
        thread.join()


def _interrupted(
    engine: ContinuousEngine, model: Any, processor: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """The longest gap between tokens of an answer while a long prompt is read."""
    reader = PromptReader(model, processor)
    words = " ".join(f"word{number}" for number in range(options.prompt))
    long = _Asked(reader, words, "", None, 3).work
    short = _Asked(reader, "a question", "", None, 1).work
    most = engine.longest // 2
    short = replace(short, sampling=Sampling(max_tokens=most, min_tokens=most))
    _follow(engine, replace(long, namespace="warm-up"))  # the pace of reading is known then
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ticket = engine.submit(short, events.put)
    while not isinstance(events.get(), Piece):
        pass
    start = time.perf_counter()
    _follow(engine, long)
    seconds = time.perf_counter() - start
    engine.cancel(ticket)
    gaps, ends = [], False
    while not ends:
        try:
            event = events.get(timeout=0.1)
        except queue.Empty:
            break
        ends = isinstance(event, (Failed, Finished))
        if isinstance(event, Piece) and event.step_s is not None:
            gaps.append(event.step_s)
    return {"first_s": seconds, "token_s": max(gaps), "read_tokens": long.tokens}
