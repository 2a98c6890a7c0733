"""`comemo map`: draw an image's tiles and the position id of every token."""

import argparse

from comemo.cli.image_map import save_map
from comemo.cli.terminal import plain, tell


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
