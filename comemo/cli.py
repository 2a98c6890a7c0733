"""The command `comemo`: chat, info, demo and map. Answers on stdout, all else on stderr."""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer

from comemo import __version__, images, info, prompts
from comemo.chat import check_tokenizer
from comemo.config import CHOICES
from comemo.device import DTYPES, parse_device, parse_dtype
from comemo.progress import AnswerStreamer, hushed, reading_bar

# What a user can get wrong. Running out of memory is a RuntimeError.
USER_ERRORS = (ValueError, OSError, SafetensorError, MemoryError, torch.OutOfMemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `comemo`; None for those of the process.

    Returns:
        Exit status: 0; 2 for what the user can put right, told in one line; 130 for Ctrl-C; 141
        where nobody reads the output any more.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode gets question marks
            stream.reconfigure(errors="replace")
    debug = False
    try:
        parser = _parser()
        args = _parse(parser, argv)
        if args.command is None:
            parser.print_help()
            return 0
        debug = args.debug
        with contextlib.nullcontext() if debug else hushed(_is_watched(args)):
            status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes once more at its end; that must not fail too.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (*USER_ERRORS, RuntimeError) as error:
        if not isinstance(error, USER_ERRORS) and "memory" not in str(error):
            raise
        if debug:
            traceback.print_exc()
        _report(error)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _number(
    kind: type, low: float, high: float = math.inf, above: bool = False
) -> Callable[[str], Any]:
    """A reader of numbers from `low` (or above it) to `high`."""

    def read(text: str) -> Any:
        wanted = f"{'above' if above else 'at least'} {low:g}"
        wanted += f" and at most {high:g}" if high < math.inf else ""
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
        epilog="comemo COMMAND --help tells more; `comemo demo` needs no checkpoint.",
    )
    parser.add_argument("--version", action="version", version=f"comemo {__version__}")
    parser.set_defaults(command=None, debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
        added.set_defaults(run=run)
        return added

    count, tiles = _number(int, 1), _number(int, 1, images.MAX_TILES)
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
    chat.add_argument("-v", "--verbose", action="store_true", help="notes even into a file or pipe")
    words = chat.add_argument_group("how words are chosen")
    words.add_argument("--max-new-tokens", type=count, default=512, metavar="N", help="%(default)s")
    words.add_argument("--sample", action="store_true", help="draw words; default: the likeliest")
    above_zero = _number(float, 0, above=True)
    words.add_argument("--temperature", type=above_zero, metavar="X", help="implies --sample")
    words.add_argument(
        "--top-p", type=_number(float, 0, 1, above=True), metavar="X", help="implies --sample"
    )
    words.add_argument("--top-k", type=count, metavar="N", help="implies --sample")
    words.add_argument("--seed", type=_number(int, 0, 2**63 - 1), metavar="N", help="of --sample")
    words.add_argument("--num-beams", type=count, default=1, metavar="N", help="cannot be streamed")
    words.add_argument("--repetition-penalty", type=above_zero, metavar="X")

    about = command("info", _info, "describe a checkpoint without loading it")
    about.add_argument("model", metavar="MODEL", help="directory of a checkpoint")
    about.add_argument("--json", action="store_true", help="the same for programs")

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
    if args.question is not None and not args.question.strip():
        raise ValueError("the question is empty")
    session = _Session(args)
    if args.question is None:
        return session.converse()
    session.ask(args.question)
    return 0


class _Session:
    """A conversation over the same pictures."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, config = args, info.read_config(args.model)
        self.stop = prompts.stop_text(config.template)
        # What transformers says of a missing file is about other kinds of tokenizers.
        held = set(os.listdir(args.model))
        if "tokenizer_config.json" not in held:
            raise ValueError(f"{args.model!r} has no tokenizer_config.json")
        if not held & {"tokenizer.model", "tokenizer.json"}:
            raise ValueError(f"{args.model!r} has neither tokenizer.model nor tokenizer.json")
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        check_tokenizer(self.tokenizer, self.stop)  # before minutes of loading weights
        max_num = args.max_tiles or config.max_dynamic_patch
        tiles, self.grids = [], []
        for path in args.image:
            pixel_values, grid = images.load_image(
                path,
                config.vision_config.image_size[0],
                max_num,
                min_num=min(config.min_dynamic_patch, max_num),
                use_thumbnail=config.use_thumbnail,
                published=args.published_pixels,
            )
            tiles.append(pixel_values)
            self.grids.append(grid)
            tokens = len(pixel_values) * config.tokens_per_tile
            self.note(f"{path}: grid {grid[0]} x {grid[1]}, {tokens:,} image tokens")
        self.pixel_values = torch.cat(tiles) if tiles else None
        self.counts = [len(pixels) for pixels in tiles]
        self.dhr = args.rope == "dhr" and bool(tiles)
        dtype = parse_dtype(args.dtype, device := parse_device(args.device))
        self.model = AutoModel.from_pretrained(args.model, dtype=dtype).to(device)
        self.note(f"{args.model}: on {device} in {str(dtype).removeprefix('torch.')}")
        self.history: list[tuple[str, str]] = []
        if args.seed is not None:
            torch.manual_seed(args.seed)

    def note(self, text: str) -> None:
        if _is_watched(self.args):
            print(text, file=sys.stderr)

    def ask(self, question: str) -> None:
        """Print the answer as it comes, and remember it once it is complete."""
        if not any(prompts.IMAGE_MARK in text for text in (question, *sum(self.history, ()))):
            question = f"{prompts.IMAGE_MARK}\n" * len(self.counts) + question
        streams = self.args.num_beams == 1
        with reading_bar(self.model, bool(self.counts), force=self.args.verbose) as bar:
            streamer = AnswerStreamer(self.tokenizer, self.stop, before=bar.close)
            try:
                answer, history = self.model.chat(
                    self.tokenizer,
                    self.pixel_values,
                    question,
                    self._options(),
                    history=self.history,
                    return_history=True,
                    num_patches_list=self.counts or None,
                    target_aspect_ratio=self.grids if self.dhr else None,
                    system_message=self.args.system,
                    streamer=streamer if streams else None,
                )
            except KeyboardInterrupt:
                if streamer.printed:
                    print(flush=True)
                raise
            if not streams:
                streamer.write(answer)
                streamer.end()
        self.history = history

    def converse(self) -> int:
        """Answer line by line; what goes wrong with one question does not end it."""
        failed = False
        self.note(
            "Ask. An empty line or Ctrl-D ends, Ctrl-C stops an answer, /new forgets what was said,"
            " /quit ends."
        )
        for question in _read_questions():
            if question == "/quit":
                break
            if question == "/new":
                self.history = []
                self.note("forgotten")
                continue
            try:
                self.ask(question)
            except KeyboardInterrupt:
                self.note("stopped; question and answer are forgotten")
            except ValueError as error:
                _report(error)
                failed = True
        return 2 if failed and not sys.stdin.isatty() else 0

    def _options(self) -> dict[str, Any]:
        args = self.args
        options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
        drawing, penalty = ("temperature", "top_p", "top_k"), ("repetition_penalty",)
        given = {name for name in drawing + penalty if getattr(args, name) is not None}
        options |= {name: getattr(args, name) for name in given}
        drawn = args.sample or not given.isdisjoint(drawing)
        return options | {"num_beams": args.num_beams, "do_sample": drawn}


def _read_questions() -> Iterator[str]:
    """Lines of stdin; at a terminal up to the first empty one."""
    typed = sys.stdin.isatty()
    edits = typed and sys.stdout.isatty()
    if edits:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            if typed and not edits:
                print("> ", end="", file=sys.stderr, flush=True)
            line = input("> ") + "\n" if edits else sys.stdin.readline()
        except EOFError:
            line = ""
        if not line or (typed and not line.strip()):
            return
        if line.strip():
            yield line.strip()


def _info(args: argparse.Namespace) -> int:
    facts = info.describe_checkpoint(args.model)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else info.table(facts))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from comemo import demo

    demo.run(args.image, args.tiles, args.tokens, args.seed, args.keep)
    return 0


def _map(args: argparse.Namespace) -> int:
    from comemo import image_map

    path = image_map.save_map(
        args.image,
        args.output,
        max_num=args.max_tiles,
        tile_order=args.tile_order,
        bias=args.bias,
        published=args.published_pixels,
    )
    print(path)
    return 0


def _is_watched(args: argparse.Namespace) -> bool:
    """Whether somebody sees notes and progress."""
    return sys.stderr.isatty() or getattr(args, "verbose", False)


def _report(error: BaseException) -> None:
    """One line, without the name of the function that found the fault."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {str(error.filename)!r}"
    text = re.sub(r"^[A-Za-z_]\w*(\.\w+)*: ", "", text)
    print(f"comemo: error: {text[:600]}", file=sys.stderr)
