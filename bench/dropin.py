"""Models that people already run, as shipped and with `comemo_kernels.patched`.

Random weights, one image, greedy tokens. `first_s` is the time to the first token, `token_s` of
each later one (median), `same_tokens` whether the tokens are those of the model as shipped,
`patch_s` what patching took. `peak_gib` is the peak memory of the process so far, so the way that
should need least runs first; on a GPU it is that of the row. The published model is the stand-in
of `bench/published_model`; it also runs with a simple cache of the image's keys and values added,
because its worst cost is that it has none. `bench chat --published` times the published code.
"""

import argparse
import gc
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from bench import measure, peak, progress
from bench.dropin_models import SUBJECTS, Subject
from comemo.chat.streamers import TokenClock

OURS, AS_SHIPPED = "ours, patched", "as shipped"
WAYS_OF = {"published": 3}  # of other models two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=SUBJECTS)
    parser.add_argument("--layers", type=int, default=None if gpu else 4, help="0: all")
    parser.add_argument("--vision-layers", type=int, help="of the tower, which is in all ways")
    parser.add_argument("--tokens", type=int, default=32 if gpu else 5, help="to generate")
    dtype = "bfloat16" if gpu else "float32"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=dtype)
    measure.add_all(parser)


def models_of(options: argparse.Namespace) -> list[str]:
    """The models that are given, or on a CPU without --all the published one alone."""
    return options.models or (list(SUBJECTS)[:1] if measure.few(options) else list(SUBJECTS))


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    models = models_of(options)
    progress.plan([1.0] * sum(WAYS_OF.get(name, 2) for name in models))
    for name in models:
        torch.manual_seed(0)
        print(f"drawing random weights of {name}")
        subject = SUBJECTS[name](
            getattr(torch, options.dtype), options.layers or None, options.vision_layers
        )
        yield from _rows(subject, options)
        del subject
        gc.collect()


@torch.no_grad()
def _rows(subject: Subject, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The patched model first: the peak memory of a process only grows."""
    rows: list[dict[str, Any]] = []
    answers: dict[str, Tensor] = {}
    try:
        for way in (OURS, *subject.ways, AS_SHIPPED):
            progress.begin(f"{subject.case}, {way}")
            row, answers[way] = _time_way(subject, way, options)
            rows.append(row)
    except KeyboardInterrupt:
        yield from rows  # their tokens were not compared yet
        raise
    for row in rows:
        row["same_tokens"] = torch.equal(answers[row["way"]], answers[AS_SHIPPED])
        yield row


def _time_way(
    subject: Subject, way: str, options: argparse.Namespace
) -> tuple[dict[str, Any], Tensor]:
    """A row, and the tokens."""
    gc.collect()
    peak.reset()
    with ExitStack() as stack:
        start = measure.now()
        if way == OURS:
            stack.enter_context(ops.patched(subject.model))
        elif way in subject.ways:
            put, back = subject.ways[way]
            put(subject.model)
            stack.callback(back, subject.model)
        patch_s = measure.now() - start
        if torch.cuda.is_available():  # compiles kernels; cuDNN plans each length of the cache
            _answer(subject, options.tokens)
        clock, answer = _answer(subject, options.tokens)
    times = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
    token_s = statistics.median(times or [clock.per_token])
    row = {
        "case": f"{subject.case}, {options.dtype}",
        "pass": "generate",
        "way": way,
        "first_s": clock.first,
        "token_s": token_s,
        "tokens_per_s": 1 / token_s,
        "peak_gib": measure.peak_gib(),
    }
    return row | ({"patch_s": patch_s} if way == OURS else {}), answer


def _answer(subject: Subject, tokens: int) -> tuple[TokenClock, Tensor]:
    clock = TokenClock()
    answer = subject.generate(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
    )
    return clock, answer
