"""`comemo batch`: answer a file of questions, in one process or several."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from comemo.batch.options import NUMBERS
from comemo.batch.ranks import Rank, read_rank, share_threads
from comemo.batch.run import Summary, answer_file
from comemo.batch.settings import BatchSettings, identify_checkpoint
from comemo.cli.arguments import find_checkpoint
from comemo.cli.chat import check_text
from comemo.cli.hushing import hushed
from comemo.cli.info import read_config
from comemo.cli.stores import open_store, show_store_warnings
from comemo.cli.terminal import note, plain, tell
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.device import device_of_rank, parse_dtype
from comemo.memory.parts import check_storable
from comemo.parallel.environment import complete_environment
from comemo.processor import CoMemoProcessor
from comemo.safety.regular import check_settings_files
from comemo.safety.settings import GENERATION, check_settings
from comemo.store.store import MemoryStore
from comemo.weights.quantising import chosen_weights


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
    bits = f" {args.quantize}" if args.quantize else ""  # answers in other bits are other answers
    settings = _settings(args, f"{identify_checkpoint(directory)} {dtype}{bits}")

    def load() -> tuple[Any, Any, Any]:
        model, processor = _load(directory, device, dtype, args.quantize)
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


def _load(
    directory: str, device: torch.device, dtype: torch.dtype, bits: str | None
) -> tuple[Any, Any]:
    try:
        processor = CoMemoProcessor.from_pretrained(directory)
        model: Any = CoMemoForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, **chosen_weights(bits, directory)
        )
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
