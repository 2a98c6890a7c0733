"""Arguments that several commands share: models by name, numbers, pixels."""

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

from comemo import nano
from comemo.safety.settings import BITS

NANO = "nano"  # in place of a directory


def number(
    kind: type[int] | type[float], low: float, high: float = math.inf, above: bool = False
) -> Callable[[str], Any]:
    """A reader of numbers for `type=`.

    Args:
        kind: int or float.
        low: the least number.
        high: the greatest number.
        above: whether numbers must be above `low`, not at least `low`.

    Returns:
        A function from text to a number. It raises an ArgumentTypeError for any other text.
    """

    def read(text: str) -> Any:
        wanted = f"{'above' if above else 'at least'} {low:g}"
        wanted += f" and at most {high:,}" if high < math.inf else ""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"wanted {noun}, {wanted}, got {text!r}")
        return value

    return read


def add_published_pixels(parser: argparse.ArgumentParser) -> None:
    """Add `--published-pixels`: read images as the published code does."""
    parser.add_argument(
        "--published-pixels", action="store_true", help="ignore the EXIF orientation of photographs"
    )


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Add `--quantize`, for `chosen_weights`."""
    parser.add_argument(
        "--quantize",
        choices=BITS,
        help="weights of 8 or 4 bits, made while the checkpoint is loaded; for a CPU",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, for `find_checkpoint`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"directory of a checkpoint; {NANO}: the one in this package, unless there is a"
        " directory of this name",
    )


def find_checkpoint(name: str) -> str:
    """The directory that MODEL means.

    Args:
        name: a directory, or "nano". A directory of this name that exists wins.

    Returns:
        `name`, or the directory of comemo-nano.

    Raises:
        ValueError: see `shipped_checkpoint`.
    """
    return shipped_checkpoint() if name == NANO and not os.path.isdir(name) else name


def shipped_checkpoint() -> str:
    """The directory of comemo-nano.

    Raises:
        ValueError: this copy of the package has none.
    """
    directory = nano.checkpoint()
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"shipped_checkpoint: wanted comemo-nano in {str(directory)!r}, got no config.json:"
            " this copy of the package is not complete"
        )
    return str(directory)
