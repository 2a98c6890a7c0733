"""Options of `comemo demo`."""

import argparse

from comemo.cli.arguments import NANO, number
from comemo.cli.options.draw import add_seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.add_argument("question", nargs="?", help="default: several, with their right answers")
    parser.add_argument("--image", metavar="PATH", help="default: a picture that is drawn")
    add_seed(parser)
    parser.add_argument(
        "--tiles",
        type=number(int, 1, 40),
        metavar="N",
        help="at most; 1: the thumbnail alone, which hides details",
    )
    parser.add_argument("--keep", metavar="DIR", help="write the picture there")
    parser.add_argument(
        "--model", default=NANO, metavar="DIR", help="another checkpoint, trained to be like nano"
    )
