"""`comemo batch`: answer a file of questions, in one process or several."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from comemo import images
from comemo.batch.options import LONGEST, NUMBERS
from comemo.batch.ranks import Rank, read_rank, share_threads
from comemo.batch.run import Summary, answer_file
from comemo.batch.settings import ROPES, BatchSettings, identify_checkpoint
from comemo.cli.arguments import add_model, add_published_pixels, find_checkpoint, number
from comemo.cli.chat import check_text
from comemo.cli.info import read_config
from comemo.cli.progress import hushed
from comemo.cli.store import add_store_options, open_store, show_store_warnings
from comemo.cli.terminal import note, plain, tell
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.device import DTYPES, device_of_rank, parse_dtype
from comemo.memory.parts import check_storable
from comemo.parallel.environment import complete_environment
from comemo.processor import CoMemoProcessor
from comemo.safety.regular import check_settings_files
from comemo.safety.settings import GENERATION, check_settings
from comemo.store.store import MemoryStore

SUMMARY = "answer a file of questions, in one process or several"
FORMS = """\
A line of REQUESTS is a JSON object: {"question": "What is it?", "image": "a.jpg"}. At will it has
"id" (anything), "history" ([[question, answer], ...]), "system", and options of generate, which go
before those of the command line; "image" may be a list. Or {"messages": [...]}, as clients send
them. The output has a line for each, in their order: "line", "id", "answer" and "tokens", or
"error".

  comemo batch MODEL requests.jsonl -o answers.jsonl
  torchrun --nproc-per-node 8 -m comemo batch MODEL requests.jsonl -o answers.jsonl

The same command resumes a run that was stopped, on any number of processes, and later answers only
lines that are new, changed or failed.

Exit status: 0 if all lines have an answer; 1 if some have an error, or none yet because a process
failed; 2 for wrong arguments and files; 130 for Ctrl-C.
"""
HELP = {
    "max_new_tokens": f"default: {LONGEST}",
    "temperature": "implies --sample",
    "top_p": "implies --sample",
    "top_k": "implies --sample",
    "min_p": "implies --sample",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = FORMS
    add_model(parser)
    parser.add_argument("requests", metavar="REQUESTS", help="file of JSON lines")
    parser.add_argument("-o", "--output", required=True, metavar="ANSWERS", help="file to write")
    parser.add_argument("--force", action="store_true", help="replace ANSWERS of other settings")
    parser.add_argument("--root", metavar="DIR", help="of image paths; default: that of REQUESTS")
    parser.add_argument(
        "--batch",
        type=number(int, 1, 4096),
        default=BatchSettings.batch,
        metavar="N",
        help="questions that a process answers together (%(default)s); drawn ones come alone",
    )
    tiles = number(int, 1, images.MAX_TILES)
    parser.add_argument("--max-tiles", type=tiles, metavar="N", help="per image (as trained: 12)")
    parser.add_argument(
        "--rope", choices=ROPES, default="dhr", help="original: better for text in images"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps; default: each process its own GPU"
    )
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="auto on a CPU: float32"
    )
    threads = number(int, 1, 1024)  # PyTorch crashes with many more
    parser.add_argument(
        "--threads", type=threads, metavar="N", help="of each process; default: its part of the CPU"
    )
    parser.add_argument(
        "--patience",
        type=number(float, 0, 10**6),
        default=BatchSettings.patience,
        metavar="S",
        help="seconds that processes wait for others to begin (%(default)g)",
    )
    add_store_options(parser)
    words = parser.add_argument_group("generation, for requests that do not say it themselves")
    for name, rule in NUMBERS.items():
        words.add_argument(
            f"--{name.replace('_', '-')}",
            type=number(rule.kind, rule.low, rule.high, rule.above),
            metavar="N" if rule.kind is int else "X",
            help=HELP.get(name),
        )
    words.add_argument("--sample", action="store_true", help="draw tokens; default: greedy")
    words.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        metavar="N",
        help="of drawn answers, each of which depends on it and on the number of its line alone",
    )
    add_published_pixels(parser)


def run(args: argparse.Namespace) -> int:
    """Answer what is not answered yet; returns the exit status.

    Raises:
        ValueError, OSError: a checkpoint, file or option that is wrong.
        KeyboardInterrupt: Ctrl-C, after a line that says how to go on.
    """
    check_text("system message", args.system or "")
    complete_environment()
    rank, directory = read_rank(), find_checkpoint(args.model)
    if args.root is not None and not Path(args.root).is_dir():
        raise ValueError(f"--root: there is no directory {args.root!r}")
    read_config(directory)
    check_settings_files(directory)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    else:
        share_threads(rank)
    device = device_of_rank(rank.local, args.device)
    # `auto` of a CPU is measured: ranks could come to different results.
    measured = args.dtype == "auto" and device.type == "cpu"
    dtype = torch.float32 if measured else parse_dtype(args.dtype, device)
    store = open_store(args)
    settings = _settings(args, f"{identify_checkpoint(directory)} {dtype}")

    def load() -> tuple[Any, Any, Any]:
        model, processor = _load(directory, device, dtype)
        return model, processor, _store_for(model, store)

    quiet = contextlib.nullcontext() if rank.is_first or args.debug else hushed(progress=False)
    watched = rank.is_first and sys.stderr.isatty()
    shape: dict[str, Any] = {"unit": " lines", "ncols": 80, "disable": not watched}
    try:
        with quiet, show_store_warnings(), tqdm(file=sys.stderr, leave=False, **shape) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            summary = answer_file(
                args.requests, args.output, load, settings, rank, tell=_warn, progress=show
            )
    except KeyboardInterrupt:
        if rank.is_first:
            note(f"\nstopped: the same command resumes {plain(args.output)}")
        raise
    return _report(args, rank, summary)


def _settings(args: argparse.Namespace, model: str) -> BatchSettings:
    options = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    return BatchSettings(
        model,
        options | ({"do_sample": True} if args.sample else {}),
        seed=args.seed,
        system=args.system,
        rope=args.rope,
        max_tiles=args.max_tiles,
        published=args.published_pixels,
        root=None if args.root is None else Path(args.root),
        batch=args.batch,
        force=args.force,
        patience=args.patience,
    )


def _load(directory: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        processor = CoMemoProcessor.from_pretrained(directory)
        model: Any = CoMemoForConditionalGeneration.from_pretrained(directory, dtype=dtype)
        check_settings("generation_config", GENERATION, vars(model.generation_config))
        return model.to(device), processor
    except (AttributeError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        # raised by transformers for files with contents that it does not expect
        kind = type(error).__name__
        raise ValueError(f"{directory!r} cannot be loaded: {kind}: {error}") from error


def _store_for(model: Any, chosen: MemoryStore | None) -> MemoryStore | None:
    """The chosen store, or one in memory alone if the model's image memories can be stored."""
    try:
        check_storable("batch", model.model)
    except ValueError:
        if chosen is not None:
            raise
        return None
    return MemoryStore() if chosen is None else chosen


def _warn(text: str) -> None:
    with tqdm.external_write_mode(file=sys.stderr):  # beside a bar
        note(f"comemo: warning: {plain(text)}")


def _report(args: argparse.Namespace, rank: Rank, summary: Summary) -> int:
    """Say how it went, on the first rank; returns the exit status.

    That of another rank is 0: torchrun ends all processes when one fails.
    """
    if not rank.is_first:
        return 0
    if summary.missing:
        note(
            f"comemo: error: {summary.missing:,} of {summary.lines:,} lines have no answer yet: the"
            " same command answers them"
        )
        return 1
    errors = f", {_count(summary.failed, 'error')}" if summary.failed else ""
    tell(f"{plain(args.output)}: {_count(summary.answered, 'answer')}{errors}")
    return 1 if summary.failed else 0


def _count(total: int, noun: str) -> str:
    return f"{total:,} {noun}{'' if total == 1 else 's'}"
