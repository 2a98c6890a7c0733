"""Warnings and log messages of the libraries: hidden, or printed as notes with `--debug`.

What is not imported logs nothing: these functions import neither torch nor transformers.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comemo.cli.terminal import note

# What they log when they are imported, wherever torchao is installed without a GPU.
ON_IMPORT = ("torchao", "torch.utils._pytree")


def hush_imports() -> None:
    """Hide what libraries log while they are imported, except errors."""
    for name in ON_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


@contextmanager
def unhushed() -> Iterator[None]:
    """Print warnings and transformers' log messages as notes inside the `with` block."""

    def show_warning(*warning: Any, **_: Any) -> None:
        note(warnings.formatwarning(*warning[:4]).rstrip())

    handler, library = _Notes(), _transformers_logging()
    if library is not None:
        library.disable_default_handler()
        library.add_handler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            yield
    finally:
        if library is not None:
            library.remove_handler(handler)
            library.enable_default_handler()


@contextmanager
def hushed(progress: bool) -> Iterator[None]:
    """Hide warnings and transformers' log messages inside the `with` block.

    Args:
        progress: whether transformers may show its own progress bars.
    """
    library = _transformers_logging()
    if library is not None:
        verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    try:
        if library is not None:
            library.set_verbosity(library.CRITICAL)  # errors are raised
            if not progress:
                library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if library is not None:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def _transformers_logging() -> Any:
    """The module of transformers that sets what it logs; None if it is not imported."""
    return sys.modules.get("transformers.utils.logging")
