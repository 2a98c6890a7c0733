"""`comemo train`: train a model by the settings of a YAML file and of the command line."""

import argparse
import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from comemo.cli.hushing import hushed
from comemo.cli.terminal import note, plain, tell
from comemo.parallel.environment import complete_environment
from comemo.train import config, ranks
from comemo.train.accelerated import take_accelerate


def run(args: argparse.Namespace) -> int:
    """Train, check or print; returns the exit status.

    Raises:
        ValueError, OSError: settings, data or a checkpoint that is wrong.
        KeyboardInterrupt: Ctrl-C, after a line that says how to go on.
    """
    complete_environment()
    file, words = split_file(args.words)
    if file is None and not words:
        raise ValueError("wanted CONFIG.yaml or settings, got nothing (see comemo train --help)")
    words = [*take_accelerate(os.environ, _noted), *words]
    try:
        with shown_notes():
            settings = config.read_settings(file, words)
    except config.SettingsError as error:
        if not is_first():
            return 2
        if len(error.faults) == 1:
            raise
        note(f"comemo: error: {plain(error.source)} has {len(error.faults)} faults:")
        for fault in error.faults:
            note(f"  {plain(fault)}")
        return 2
    if args.print:
        tell(config.as_yaml(settings), end="")
        return 0
    adapted = any(
        (lora := settings.stages[name].lora).vision or lora.language or lora.mixin
        for name in settings.run
    )
    config.require("accelerate", *(["peft"] if adapted else []))
    from comemo.cli.train_plan import describe_plan
    from comemo.train.monitor.scalars import summary_writer
    from comemo.train.recipe import check, train
    from comemo.train.watch_ranks import is_told

    if args.check:
        with noted_logs():
            plan = check(settings)
        if is_first():
            tell(describe_plan(settings, plan))
        return 0
    if settings.tensorboard:
        summary_writer()  # or an error before minutes of loading
    # A bar of transformers for each checkpoint would run into that of the stage.
    quiet = contextlib.nullcontext() if args.debug else hushed(progress=False)
    try:
        with noted_logs(), quiet:
            result = train(settings, tell=note)
    except KeyboardInterrupt:
        if is_first():
            note(f"\nstopped: the same command resumes {plain(settings.output)}")
        raise
    except Exception as error:
        if ranks.is_on_all(error):
            if is_first():
                raise
            return 2
        if not is_told(error):
            raise
        if args.debug:
            note(traceback.format_exc())
        return 1
    if is_first():
        tell(str(result))
    return 0


@contextlib.contextmanager
def noted_logs() -> Iterator[None]:
    """Print warnings of the data, which name files of others, as lines on stderr."""
    logger, handler = logging.getLogger("comemo"), _Notes(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):  # beside a bar
            note(f"comemo: {record.levelname.lower()}: {plain(self.format(record))}")


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def split_file(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Find CONFIG.yaml: the word that is neither a setting nor the value of one.

    Args:
        words: of the command line, without the command's options.

    Returns:
        file: None if there is none.
        words: all others, in their order.
    """
    file, rest = None, list(words)
    for i, word in enumerate(rest):
        before = rest[i - 1] if i else ""
        is_value = before.startswith("--") and "=" not in before
        if "=" not in word and not word.startswith("--") and not is_value:
            file = rest.pop(i)
            break
    return file, rest


def _noted(line: str) -> None:
    if is_first():
        note(f"comemo: note: {plain(line)}")


@contextlib.contextmanager
def shown_notes() -> Iterator[None]:
    """Print what old names became, one line each, at the end of the `with` block."""
    from comemo.train.config.layers import SettingsNote

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SettingsNote)
        try:
            yield
        finally:
            texts = [str(warning.message) for warning in caught] if is_first() else []
            for text in dict.fromkeys(texts):
                note(f"comemo: note: {plain(text.removeprefix('read_settings: '))}")
