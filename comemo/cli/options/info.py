"""Options of `comemo info`."""

import argparse

from comemo.cli.arguments import add_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
