"""Options of `comemo serve`."""

import argparse

from comemo.cli.arguments import add_model, add_quantize, number
from comemo.cli.options.store import add_store_options
from comemo.safety.settings import CHOICES, DTYPES, MAX_TILES
from comemo.serve.engine.settings import EngineSettings
from comemo.serve.http.settings import KEY, ServerSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    add_model(parser)
    http, engine = ServerSettings("-"), EngineSettings()
    many = number(int, 1, 10**9)
    seconds = number(float, 0, 10**7, above=True)
    parser.add_argument("--host", default="127.0.0.1", help="%(default)s: this machine alone")
    parser.add_argument(
        "--port", type=number(int, 0, 65535), default=8000, metavar="N", help="8000; 0: a free one"
    )
    parser.add_argument("--name", help="of the model, for clients; default: that of its directory")
    parser.add_argument(
        "--api-keys",
        metavar="FILE",
        help=f"lines of KEY [NAMESPACE]; without it: the key in {KEY}, if it is set",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best available")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    add_quantize(parser)
    parser.add_argument(
        "--threads", type=number(int, 1, 1024), metavar="N", help="of the CPU; default: torch's"
    )
    parser.add_argument(
        "--memory",
        type=number(float, 0, 10**6, above=True),
        metavar="GiB",
        help="of KV cache and image memory; default: half of what is free, or less if that is more"
        " than enough",
    )
    parser.add_argument(
        "--max-tiles", type=number(int, 1, MAX_TILES), metavar="N", help="per image (trained: 12)"
    )
    parser.add_argument(
        "--rope", choices=CHOICES["rope"], default="dhr", help="original: better for text in images"
    )
    parser.add_argument(
        "--visibility",
        choices=("causal", "all"),
        default="causal",
        help="all: every token reads every image, as published; a later image then rereads all",
    )
    add_store_options(parser)
    words = parser.add_argument_group("answers, for requests that do not say it themselves")
    words.add_argument(
        "--max-tokens", type=many, default=http.max_tokens, metavar="N", help="%(default)s"
    )
    heat = number(float, 0, 2)
    words.add_argument(
        "--temperature", type=heat, default=0.0, metavar="X", help="0: the most likely tokens"
    )
    limits = parser.add_argument_group("limits")
    for name, default, text in (
        ("--answers", engine.answers, "answers at the same time"),
        ("--waiting", engine.waiting, "requests that wait"),
        ("--waiting-each", engine.waiting_each, "requests of one namespace that wait"),
        ("--concurrent", http.concurrent, "requests at the same time, waiting ones included"),
        ("--longest", engine.longest, "tokens of a prompt and its answer"),
        ("--images", http.images, "pictures of a request"),
        ("--pixels", http.pixels, "pixels of a picture"),
    ):
        limits.add_argument(
            name, type=many, default=default, metavar="N", help=f"{text} ({default:,})"
        )
    limits.add_argument(
        "--body", type=number(float, 0, 10**4, above=True), default=64.0, metavar="MiB", help="64"
    )
    for name, wait, text in (
        ("--timeout", http.timeout_s, "seconds that a request may take"),
        ("--stall", engine.stall_s, "seconds that prompts of others may delay a token, about"),
        ("--grace", 30.0, "seconds to finish answers at the end"),
    ):
        limits.add_argument(
            name, type=seconds, default=wait, metavar="S", help=f"{text} ({wait:g})"
        )
    limits.add_argument(
        "--fetch",
        action="append",
        default=[],
        metavar="HOST",
        help='fetch pictures of this host by http(s), never from internal addresses; "*": of any',
    )
    parser.add_argument("--log-contents", action="store_true", help="log questions and answers")
    parser.add_argument("-v", "--verbose", action="store_true", help="notes without a terminal too")
