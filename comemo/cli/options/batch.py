"""Options of `comemo batch`."""

import argparse

from comemo.batch.options import LONGEST, NUMBERS
from comemo.batch.settings import ROPES, BatchSettings
from comemo.cli.arguments import add_model, add_published_pixels, add_quantize, number
from comemo.cli.options.store import add_store_options
from comemo.safety.settings import DTYPES, MAX_TILES

FORMS = """\
A line of REQUESTS is a JSON object: {"question": "What is it?", "image": "a.jpg"}. At will it has
"id" (anything), "history" ([[question, answer], ...]), "system", and options of generate, which go
before those of the command line; "image" may be a list. Or {"messages": [...]}, as clients send
them. The output has a line for each, in their order: "line", "id", "answer" and "tokens", or
"error".

  comemo batch MODEL requests.jsonl -o answers.jsonl
  torchrun --nproc-per-node 8 -m comemo batch MODEL requests.jsonl -o answers.jsonl

The same command resumes a run that was stopped, on any number of processes, and later answers only
lines that are new, changed or failed.

Exit status: 0 if all lines have an answer; 1 if some have an error, or none yet because a process
failed; 2 for wrong arguments and files; 130 for Ctrl-C.
"""
HELP = {
    "max_new_tokens": f"default: {LONGEST}",
    "temperature": "implies --sample",
    "top_p": "implies --sample",
    "top_k": "implies --sample",
    "min_p": "implies --sample",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = FORMS
    add_model(parser)
    parser.add_argument("requests", metavar="REQUESTS", help="file of JSON lines")
    parser.add_argument("-o", "--output", required=True, metavar="ANSWERS", help="file to write")
    parser.add_argument("--force", action="store_true", help="replace ANSWERS of other settings")
    parser.add_argument("--root", metavar="DIR", help="of image paths; default: that of REQUESTS")
    parser.add_argument(
        "--batch",
        type=number(int, 1, 4096),
        default=BatchSettings.batch,
        metavar="N",
        help="questions that a process answers together (%(default)s); drawn ones come alone",
    )
    tiles = number(int, 1, MAX_TILES)
    parser.add_argument("--max-tiles", type=tiles, metavar="N", help="per image (as trained: 12)")
    parser.add_argument(
        "--rope", choices=ROPES, default="dhr", help="original: better for text in images"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps; default: each process its own GPU"
    )
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="auto on a CPU: float32"
    )
    add_quantize(parser)
    threads = number(int, 1, 1024)  # PyTorch crashes with many more
    parser.add_argument(
        "--threads", type=threads, metavar="N", help="of each process; default: its part of the CPU"
    )
    parser.add_argument(
        "--patience",
        type=number(float, 0, 10**6),
        default=BatchSettings.patience,
        metavar="S",
        help="seconds that processes wait for others to begin (%(default)g)",
    )
    add_store_options(parser)
    words = parser.add_argument_group("generation, for requests that do not say it themselves")
    for name, rule in NUMBERS.items():
        words.add_argument(
            f"--{name.replace('_', '-')}",
            type=number(rule.kind, rule.low, rule.high, rule.above),
            metavar="N" if rule.kind is int else "X",
            help=HELP.get(name),
        )
    words.add_argument("--sample", action="store_true", help="draw tokens; default: greedy")
    words.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        metavar="N",
        help="of drawn answers, each of which depends on it and on the number of its line alone",
    )
    add_published_pixels(parser)
