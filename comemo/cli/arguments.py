"""Arguments that several commands share, and readers of numbers for `argparse`."""

import argparse
import math
from collections.abc import Callable
from typing import Any


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
