"""The command `comemo`: reads the command line and runs one of `COMMANDS`."""

import argparse
import errno
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from comemo import __version__
from comemo.cli import (
    batch,
    chat,
    demo,
    draw,
    evaluate,
    info,
    look,
    map,
    serve,
    starting,
    store,
    terminal,
    train,
)
from comemo.cli.progress import hushed, unhushed

# Each module has a SUMMARY, `add_arguments(parser)` and `run(args)`, which returns the exit status.
COMMANDS: dict[str, ModuleType] = {
    "chat": chat,
    "batch": batch,
    "serve": serve,
    "info": info,
    "store": store,
    "demo": demo,
    "draw": draw,
    "eval": evaluate,
    "map": map,
    "look": look,
    "train": train,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `comemo`; None for those of the process.

    Returns:
        Exit status: 0; 2 for an error that the user can correct, 1 for a failure, both reported in
        one line; 130 for Ctrl-C; 141 if the output has no reader any more.
    """
    debug = False
    try:
        starting.interruptible(True)
        terminal.prepare()
        parser = make_parser()
        args = _parse(parser, argv)
        if args.command is None:
            parser.print_help()
            return 0
        debug = args.debug
        if sys.stdout is None:
            raise OSError(errno.EBADF, "stdout is closed, nobody would see what is printed")
        watched = terminal.is_watched(getattr(args, "verbose", False))
        with unhushed() if debug else hushed(watched):
            return COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:  # of any kind: the user sees one line
        if debug:
            terminal.note(traceback.format_exc())
        return terminal.report(error)
    finally:
        terminal.settle()
        starting.interruptible(False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line; each command defines its own arguments."""
    parser = _Parser(
        prog="comemo",
        description="CoMemo: a vision-language model with an image memory.",
        epilog="comemo COMMAND --help shows the options of a command; `comemo demo` needs no"
        " checkpoint. Exit status: 0, 2 for wrong arguments and files, 1 for failures, 130 for"
        " Ctrl-C, 141 if the output has no reader.",
    )
    parser.add_argument("--version", action="version", version=f"comemo {__version__}")
    parser.set_defaults(command=None, debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, command in COMMANDS.items():
        text = command.SUMMARY
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
        command.add_arguments(added)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    given, settings = list(sys.argv[1:] if argv is None else argv), list[str]()
    if given[:1] == ["train"]:
        options, settings = train.split_words(given[1:])
        given = ["train", *options]
    args, rest = parser.parse_known_args(given)
    args.words = settings
    # argparse does not match an optional positional once an option was there.
    if getattr(args, "question", "") is None and rest and rest[0][:1] != "-":
        args.question, *rest = rest
    if rest:
        words = " ".join(rest)
        raise ValueError(f"unrecognized arguments: {words} (see comemo {args.command} --help)")
    return args
