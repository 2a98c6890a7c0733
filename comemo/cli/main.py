"""The command `comemo`: reads the command line and runs one of `COMMANDS`."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from comemo import __version__
from comemo.cli import starting, terminal
from comemo.cli.hushing import hush_imports, hushed, unhushed


class Command(NamedTuple):
    """A command: its options are in `comemo.cli.options.MODULE`, `comemo.cli.MODULE` runs it.

    The first has `add_arguments(parser)` and must be quick to import: torch and transformers take
    seconds. The second has `run(args)`, which returns the exit status.
    """

    module: str
    summary: str


COMMANDS = {
    "chat": Command("chat", "ask a checkpoint about images, or without any"),
    "batch": Command("batch", "answer a file of questions, in one process or several"),
    "serve": Command("serve", "serve a checkpoint to OpenAI clients, with a page to look at"),
    "info": Command("info", "describe a checkpoint without loading it"),
    "store": Command("store", "list, remove and sum up the images in a store's directory"),
    "demo": Command(
        "demo", "ask nano about a fresh picture, offline, and see what the image memory saves"
    ),
    "draw": Command("draw", "draw a picture for nano, with questions and right answers"),
    "eval": Command("evaluate", "count right answers of nano, by kind of question"),
    "map": Command("map", "draw an image's tiles and the position id of every token"),
    "look": Command(
        "look", "answer a question, and draw where the memory path looks for each word"
    ),
    "train": Command("train", "train a model in stages, from JSON lines to a checkpoint"),
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
        terminal.prepare()
        parser = make_parser()
        args = _parse(parser, argv)
        if args.command is None:
            parser.print_help()
            return 0
        debug = args.debug
        if sys.stdout is None:
            raise OSError(errno.EBADF, "stdout is closed, nobody would see what is printed")
        # PyTorch then asks Linux for huge pages: large tensors are new memory in a third of the
        # time, and a CPU reads weights up to one and a half times as fast.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        if not debug:
            hush_imports()
        # Ctrl-C ends the process at once while this imports the libraries.
        command = import_module(f"comemo.cli.{COMMANDS[args.command].module}")
        watched = terminal.is_watched(getattr(args, "verbose", False))
        with unhushed() if debug else hushed(watched):
            starting.interruptible(True)
            return command.run(args)
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


class _CommandParser(_Parser):
    """Of one command: its options are defined when the command line names it."""

    module: str | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        if self.module is not None:
            options = import_module(f"comemo.cli.options.{self.module}")
            self.module = None
            self.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
            options.add_arguments(self)
        return super().parse_known_args(*args, **kwargs)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line; see `_CommandParser`."""
    parser = _Parser(
        prog="comemo",
        description="CoMemo: a vision-language model with an image memory.",
        epilog="comemo COMMAND --help shows the options of a command; `comemo demo` needs no"
        " checkpoint. Exit status: 0, 2 for wrong arguments and files, 1 for failures, 130 for"
        " Ctrl-C, 141 if the output has no reader.",
    )
    parser.add_argument("--version", action="version", version=f"comemo {__version__}")
    parser.set_defaults(command=None, debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_CommandParser)
    for name, (module, text) in COMMANDS.items():
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.module = module
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    given, settings = list(sys.argv[1:] if argv is None else argv), list[str]()
    if given[:1] == ["train"]:
        from comemo.cli.options import train

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
