"""A model that ranks divide, beside the whole: loading, its peak memory, prefill and decoding.

On a machine with GPUs there is a rank for each; without any the ranks share the cores. Rows have
the seconds of loading, the peak of private memory in GiB while loading and the size of the weights,
all of the largest rank, and the milliseconds of a prefill and of a decode step. On a CPU a whole
model is not copied while loading: its weights are pages of the file. Tokens must be equal.
"""

import argparse
import gc
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import multiprocessing

from bench import measure, progress
from bench.models import draw_model, draw_prompts, layers_of
from bench.ways import Row
from comemo import CoMemoForConditionalGeneration

DIVISIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "tensor": {"tp_plan": "auto"},
    "stages": {"distributed_config": {"pp_size": None}},
}
FEW_LAYERS = 4  # what a CPU takes by default
STEPS = 8  # decode steps that are timed, after as many that warm up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=("2B", "9B"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, help="of the language model; 0: all")
    measure.add_all(parser)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tiles", type=int, default=1, choices=(1, 13))


def run(options: argparse.Namespace) -> Iterator[Row]:
    grid = {1: (1, 1), 13: (3, 4)}[options.tiles]
    layers = layers_of(options, FEW_LAYERS)
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        _apart(_write, options.size, dtype, layers, folder)
        answers: dict[str, Any] = {}
        for way in progress.each(DIVISIONS):
            division = DIVISIONS[way]
            ranks = 1 if way == "whole" else options.ranks
            given = {
                name: {"pp_size": ranks} if isinstance(value, dict) else value
                for name, value in division.items()
            }
            found = _on_ranks(ranks, folder, dtype, given, grid)
            answers[way] = found[0].pop("tokens")
            if answers[way] != answers["whole"]:
                options.failed = True
                print(f"{way}: the tokens differ from those of the whole model")
            case = f"{options.size}, {options.dtype}, {options.tiles} tiles"
            case += f", {layers} layers" if layers else ""
            row: Row = {"case": case, "pass": "divided", "way": f"{way}, {ranks} ranks"}
            for name in found[0]:
                row[name] = max(each[name] for each in found)
            yield row


def _write(size: str, dtype: torch.dtype, layers: int | None, folder: str) -> None:
    model = draw_model(size, dtype, layers)
    model.config.image_token_id = 92546
    model.save_pretrained(folder, save_original_format=True)


def _on_ranks(count: int, folder: str, dtype: torch.dtype, given: Any, grid: Any) -> list[Any]:
    """What each rank measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    arguments = (count, port, threads, folder, dtype, given, grid, results)
    ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    try:
        found = dict(results.get(timeout=1800) for _ in ranks)
        for rank in ranks:
            rank.join(60)
    finally:
        for rank in ranks:
            rank.kill()
    return [found[rank] for rank in range(count)]


def _rank(rank: int, count: int, port: int, threads: int, *rest: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(threads)
    *arguments, results = rest
    results.put((rank, _measure(*arguments)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@torch.no_grad()
def _measure(folder: str, dtype: torch.dtype, given: Any, grid: Any) -> dict[str, Any]:
    start, watch = measure.now(), _Peak()
    with watch:
        model = CoMemoForConditionalGeneration.from_pretrained(folder, dtype=dtype, **given)
        if not given:
            model.to(measure.default_device())
    seconds = measure.now() - start
    torch.manual_seed(0)
    inputs, image, memory = draw_prompts(model, grid, 1)

    def read() -> Any:
        memory.keys.clear()
        memory.values.clear()
        embeds = model.model.embed(inputs["input_ids"], image, memory)
        return model(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            image_memory=memory,
            use_cache=True,
            logits_to_keep=1,
        )

    read()
    prefill = measure.seconds(read)
    out, tokens = read(), []
    place, token = inputs["position_ids"][:, -1:] + 1, None
    for step in range(2 * STEPS):
        token = out.logits[:, -1:].argmax(-1)
        tokens.append(int(token))
        if step == STEPS:
            start = measure.now()
        out = model(
            input_ids=token,
            position_ids=place + step,
            image_memory=memory,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    int(out.logits.argmax())
    decode = (measure.now() - start) / STEPS
    return {
        "load_s": seconds,
        "load_peak_gib": watch.gib,
        "weights_gib": sum(p.nbytes for p in model.parameters()) / 2**30,
        "prefill_ms": 1e3 * prefill,
        "decode_ms": 1e3 * decode,
        "tokens": tokens,
    }


class _Peak:
    """The most memory of this process within a `with` block, above that before, in GiB.

    On a GPU it is the allocated one. On a CPU pages of files do not count, which all processes
    share and the system may drop.
    """

    def __enter__(self) -> None:
        gc.collect()
        self._before, self.gib, self._ended = self._private(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(0.01)
            self.gib = max(self.gib, (self._private() - self._before) / 2**30)

    @staticmethod
    def _private() -> int:
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated()
        with open("/proc/self/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _apart(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own, whose memory is free afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} ended with status {process.exitcode}")
