"""Options of `comemo look`."""

import argparse

from comemo.cli.arguments import add_model, add_published_pixels, add_quantize, number
from comemo.safety.settings import CHOICES, DTYPES, MAX_TILES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    add_model(parser)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("question")
    parser.add_argument("-o", "--output", required=True, metavar="PNG")
    tiles, many = number(int, 1, MAX_TILES), number(int, 1, 10**6)
    parser.add_argument("--max-tiles", type=tiles, metavar="N", help="as trained: 12")
    parser.add_argument(
        "--rope", choices=CHOICES["rope"], default="dhr", help="original: better for text in images"
    )
    parser.add_argument("--max-new-tokens", type=many, default=512, metavar="N", help="%(default)s")
    parser.add_argument(
        "--layers",
        type=number(int, 0),
        nargs="+",
        metavar="I",
        help="decoder layers whose mixin layers are shown; default: all that have one",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best available")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    add_quantize(parser)
    add_published_pixels(parser)
