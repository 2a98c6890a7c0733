"""Options of `comemo map`."""

import argparse

from comemo.cli.arguments import add_published_pixels, number
from comemo.safety.settings import CHOICES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-o", "--output", required=True, metavar="PNG")
    parser.add_argument("--max-tiles", type=number(int, 1), default=12, metavar="N")
    parser.add_argument(
        "--tile-order", choices=CHOICES["tile_order"], default="row", help="column as published"
    )
    parser.add_argument(
        "--bias", type=number(int, 0, 2**31), default=0, metavar="N", help="id of the first token"
    )
    add_published_pixels(parser)
