"""The store that a command uses, and its warnings."""

import argparse
import contextlib
import math
import warnings
from collections.abc import Iterator

from comemo.cli.terminal import note, plain
from comemo.store.store import MemoryStore, MemoryStoreWarning


def open_store(args: argparse.Namespace) -> MemoryStore | None:
    """The store that the options of `add_store_options` ask for; None without `--store`.

    Raises:
        ValueError: a budget without a directory, or not finite; an empty directory.
        NotADirectoryError: the directory is a file.
    """
    if args.store is None:
        if args.store_budget is not None:
            raise ValueError("--store-budget needs --store DIR")
        return None
    budget = None if args.store_budget is None else args.store_budget * 1e9
    if budget == math.inf:
        raise ValueError(f"--store-budget must be finite, got {args.store_budget:g}")
    with show_store_warnings():
        return MemoryStore(directory=args.store, disk_budget=budget)


@contextlib.contextmanager
def show_store_warnings() -> Iterator[None]:
    """Print each warning of a store as a line on stderr, at the end of the `with` block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MemoryStoreWarning)
        try:
            yield
        finally:
            warned = list(caught)
    for warning in warned:
        if issubclass(warning.category, MemoryStoreWarning):
            text = str(warning.message).removeprefix("MemoryStore: ")
            note(f"comemo: warning: {plain(text)}")
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
