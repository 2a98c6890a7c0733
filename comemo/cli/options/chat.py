"""Options of `comemo chat`."""

import argparse

from comemo.cli.arguments import add_model, add_published_pixels, add_quantize, number
from comemo.cli.options.store import add_store_options
from comemo.safety.settings import CHOICES, DTYPES, MAX_TILES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    many, tiles, beams = (number(int, 1, most) for most in (10**6, MAX_TILES, 256))
    add_model(parser)
    parser.add_argument("question", nargs="?", help="without it: a conversation, line by line")
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="an image; may be repeated"
    )
    parser.add_argument("--max-tiles", type=tiles, metavar="N", help="per image (as trained: 12)")
    parser.add_argument(
        "--rope", choices=CHOICES["rope"], default="dhr", help="original: better for text in images"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best available")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    add_quantize(parser)
    threads = number(int, 1, 1024)  # PyTorch crashes with many more
    parser.add_argument("--threads", type=threads, metavar="N", help="of the CPU; default: torch's")
    parser.add_argument("--timing", action="store_true", help="show how long each answer took")
    add_store_options(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="notes without a terminal too")
    heat, penalty = number(float, 0.001, 1000), number(float, 0.01, 100)  # others end in NaN
    share = number(float, 0, 1, above=True)
    words = parser.add_argument_group("generation")
    words.add_argument("--max-new-tokens", type=many, default=512, metavar="N", help="%(default)s")
    words.add_argument("--sample", action="store_true", help="draw tokens; default: greedy")
    words.add_argument("--temperature", type=heat, metavar="X", help="implies --sample")
    words.add_argument("--top-p", type=share, metavar="X", help="implies --sample")
    words.add_argument("--top-k", type=many, metavar="N", help="implies --sample")
    words.add_argument("--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="of --sample")
    words.add_argument("--num-beams", type=beams, default=1, metavar="N", help="cannot be streamed")
    words.add_argument("--repetition-penalty", type=penalty, metavar="X")
    add_published_pixels(parser)
