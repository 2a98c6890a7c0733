"""Options of `comemo eval`."""

import argparse

from comemo.cli.arguments import NANO, number
from comemo.nano.held_out import MOST
from comemo.nano.questions import KINDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.add_argument("questions_of", choices=(NANO,), metavar=NANO, help="the questions to ask")
    parser.add_argument(
        "--questions", type=number(int, 1, MOST), default=1000, metavar="N", help="%(default)s"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}"
    )
    parser.add_argument(
        "--model", default=NANO, metavar="DIR", help="another checkpoint, trained to be like nano"
    )
    parser.add_argument(
        "--tiles", type=number(int, 1, 40), metavar="N", help="at most; 1: the thumbnail alone"
    )
    parser.add_argument("--json", metavar="PATH", help="write all answers and scores; -: to stdout")
    parser.add_argument(
        "--wrong", type=number(int, 1), metavar="N", help="show so many wrong answers"
    )
    parser.add_argument("--keep", metavar="DIR", help="draw the pictures of --wrong there")
