"""The command `comemo`: chat, info, store, demo and map."""

import argparse
import errno
import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from comemo import __version__, images
from comemo.cli import chat as chat_cli
from comemo.cli import info, starting, terminal
from comemo.cli import store as store_cli
from comemo.cli.device import DTYPES
from comemo.cli.progress import hushed, unhushed
from comemo.cli.terminal import plain, tell
from comemo.config import CHOICES


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `comemo`; None for those of the process.

    Returns:
        Exit status: 0; 2 for what the user can put right, 1 for what failed, both told in one
        line; 130 for Ctrl-C; 141 where nobody reads the output any more.
    """
    debug = False
    try:
        starting.interruptible(True)
        terminal.prepare()
        parser = _parser()
        args = _parse(parser, argv)
        if args.command is None:
            parser.print_help()
            return 0
        debug = args.debug
        if sys.stdout is None:
            raise OSError(errno.EBADF, "stdout is closed, nobody would see what is printed")
        with unhushed() if debug else hushed(chat_cli.is_watched(args)):
            return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:  # whatever it is, a user meets one line
        if debug:
            terminal.note(traceback.format_exc())
        return terminal.report(error)
    finally:
        terminal.settle()
        starting.interruptible(False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _number(
    kind: type, low: float, high: float = math.inf, above: bool = False
) -> Callable[[str], Any]:
    """A reader of numbers from `low` (or above it) to `high`."""

    def read(text: str) -> Any:
        wanted = f"{'above' if above else 'at least'} {low:g}"
        wanted += f" and at most {high:,}" if high < math.inf else ""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"wanted {noun}, {wanted}, got {text!r}")
        return value

    return read


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="comemo",
        description="CoMemo: a vision-language model with an image memory.",
        epilog="comemo COMMAND --help tells more; `comemo demo` needs no checkpoint. Exit status:"
        " 0, 2 for wrong words and files, 1 for what failed, 130 for Ctrl-C, 141 for output that"
        " nobody reads.",
    )
    parser.add_argument("--version", action="version", version=f"comemo {__version__}")
    parser.set_defaults(command=None, debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
        added.set_defaults(run=run)
        return added

    many, tiles, beams = (_number(int, 1, most) for most in (10**6, images.MAX_TILES, 256))
    chat = command("chat", _chat, "ask a checkpoint about pictures, or about none")
    chat.add_argument("model", metavar="MODEL", help="directory of a checkpoint")
    chat.add_argument("question", nargs="?", help="without it: a conversation, line by line")
    chat.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="a picture; may be repeated"
    )
    chat.add_argument("--max-tiles", type=tiles, metavar="N", help="of a picture (as trained: 12)")
    chat.add_argument(
        "--rope", choices=CHOICES["rope"], default="dhr", help="original suits text in pictures"
    )
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    chat.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    threads = _number(int, 1, 1024)  # of many more the library dies
    chat.add_argument("--threads", type=threads, metavar="N", help="of the CPU; default: torch's")
    chat.add_argument("--timing", action="store_true", help="tell how long each answer took")
    above_zero, not_negative = _number(float, 0, above=True), _number(float, 0)
    heat, penalty = _number(float, 0.001, 1000), _number(float, 0.01, 100)  # others end in NaN
    store_cli.add_options(chat, above_zero)
    chat.add_argument("-v", "--verbose", action="store_true", help="notes even into a file or pipe")
    words = chat.add_argument_group("how words are chosen")
    words.add_argument("--max-new-tokens", type=many, default=512, metavar="N", help="%(default)s")
    words.add_argument("--sample", action="store_true", help="draw words; default: the likeliest")
    words.add_argument("--temperature", type=heat, metavar="X", help="implies --sample")
    words.add_argument(
        "--top-p", type=_number(float, 0, 1, above=True), metavar="X", help="implies --sample"
    )
    words.add_argument("--top-k", type=many, metavar="N", help="implies --sample")
    words.add_argument("--seed", type=_number(int, 0, 2**63 - 1), metavar="N", help="of --sample")
    words.add_argument("--num-beams", type=beams, default=1, metavar="N", help="cannot be streamed")
    words.add_argument("--repetition-penalty", type=penalty, metavar="X")

    about = command("info", _info, "describe a checkpoint without loading it")
    about.add_argument("model", metavar="MODEL", help="directory of a checkpoint")
    about.add_argument("--json", action="store_true", help="the same for programs")

    store = command("store", store_cli.run, "look after a directory of known pictures")
    store_cli.add_commands(store, not_negative)

    demo = command("demo", _demo, "show the whole way at work, offline, on an untrained tiny model")
    demo.add_argument("--image", metavar="PATH", help="default: one that is drawn")
    demo.add_argument("--tiles", type=_number(int, 1, 40), default=12, metavar="N", help="at most")
    demo.add_argument("--tokens", type=_number(int, 1, 1000), default=16, metavar="N")
    demo.add_argument("--seed", type=_number(int, 0, 2**63 - 2**10), default=0, metavar="N")
    demo.add_argument("--keep", metavar="DIR", help="keep the checkpoint in this new directory")

    picture = command("map", _map, "draw a picture's tiles and the position id of every token")
    picture.add_argument("image", metavar="IMAGE")
    picture.add_argument("-o", "--output", required=True, metavar="PNG")
    picture.add_argument("--max-tiles", type=_number(int, 1), default=12, metavar="N")
    picture.add_argument(
        "--tile-order", choices=CHOICES["tile_order"], default="row", help="column as published"
    )
    picture.add_argument(
        "--bias", type=_number(int, 0, 2**31), default=0, metavar="N", help="id of the first token"
    )
    for added in (chat, picture):
        added.add_argument(
            "--published-pixels", action="store_true", help="ignore how a photograph was held"
        )
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args, rest = parser.parse_known_args(argv)
    # argparse gives up an optional word once an option follows MODEL.
    if args.command == "chat" and args.question is None and rest and rest[0][:1] != "-":
        args.question, *rest = rest
    if rest:
        words = " ".join(rest)
        raise ValueError(f"unrecognized arguments: {words} (see comemo {args.command} --help)")
    return args


def _chat(args: argparse.Namespace) -> int:
    if args.question is None and sys.stdin is None:
        raise ValueError("there is no QUESTION, and stdin is closed")
    if args.question is not None and not args.question.strip():
        raise ValueError("the question is empty")
    chat_cli.check_text("question", args.question or "")
    chat_cli.check_text("system message", args.system or "")
    talk = _loaded(args)
    if args.question is None:
        return talk.converse()
    talk.ask(args.question)
    return 0


def _loaded(args: argparse.Namespace) -> chat_cli.Talk:
    try:
        return chat_cli.Talk(args)
    except (AttributeError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        # what transformers raises on files that say something else than it expects
        kind = type(error).__name__
        raise ValueError(f"{args.model!r} cannot be loaded: {kind}: {error}") from error


def _info(args: argparse.Namespace) -> int:
    facts = info.describe_checkpoint(args.model)
    tell(json.dumps(facts, indent=2) if args.json else info.table(facts))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from comemo.cli import demo

    demo.run(args.image, args.tiles, args.tokens, args.seed, args.keep)
    return 0


def _map(args: argparse.Namespace) -> int:
    from comemo.cli import map as image_map

    path = image_map.save_map(
        args.image,
        args.output,
        max_num=args.max_tiles,
        tile_order=args.tile_order,
        bias=args.bias,
        published=args.published_pixels,
    )
    tell(plain(path))
    return 0
