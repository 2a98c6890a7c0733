"""Options of `comemo draw`, and the seed of a picture for others."""

import argparse

from comemo.cli.arguments import number
from comemo.nano.scenes import LAYOUTS
from comemo.nano.showing import PICTURES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.add_argument("path", metavar="PNG", help="where to write it")
    add_seed(parser)
    parser.add_argument("--layout", choices=LAYOUTS, help="default: any, mostly objects")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add `--seed`, for `comemo.cli.draw.choose_seed`."""
    parser.add_argument(
        "--seed",
        type=number(int, 0, PICTURES - 1),
        metavar="N",
        help="of the picture; default: a new one each time",
    )
