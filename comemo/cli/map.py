"""`comemo map`: draw an image's tiles and the position id of every token."""

import argparse

from comemo.cli.arguments import add_published_pixels, number
from comemo.cli.image_map import save_map
from comemo.cli.terminal import plain, tell
from comemo.config import CHOICES

SUMMARY = "draw an image's tiles and the position id of every token"


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


def run(args: argparse.Namespace) -> int:
    """Write the map and print its path; returns the exit status.

    Raises:
        ValueError, OSError: see `save_map`.
    """
    path = save_map(
        args.image,
        args.output,
        max_num=args.max_tiles,
        tile_order=args.tile_order,
        bias=args.bias,
        published=args.published_pixels,
    )
    tell(plain(path))
    return 0
