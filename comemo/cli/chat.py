"""`comemo chat`: ask a question, or hold a conversation line by line."""

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from comemo import images, prompts
from comemo.chat.session import ChatSession
from comemo.cli.arguments import find_checkpoint
from comemo.cli.checkpoints import load_tokenizer
from comemo.cli.info import read_config
from comemo.cli.progress import AnswerStreamer, reading_bar
from comemo.cli.stores import open_store, show_store_warnings
from comemo.cli.terminal import is_watched, note, plain, report, tell
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.device import parse_device, parse_dtype
from comemo.processor import CoMemoImageProcessor, CoMemoProcessor
from comemo.safety.settings import GENERATION, check_settings, shorten
from comemo.weights.quantising import chosen_weights

COMMANDS = {
    "/image PATH": "show an image with the next question",
    "/again": "answer the last question once more",
    "/new": "forget the conversation, keep the images",
    "/help": "list these commands",
    "/quit": "end; so do Ctrl-D and an empty line; Ctrl-C stops an answer",
    "//...": "ask a question that begins with /",
}
HELP = "A line is a question, except for these commands:\n" + "\n".join(
    f"  {form:14}{text}" for form, text in COMMANDS.items()
)
LONGEST_LINE = 2**20  # characters; nobody types so many, and stdin may never end a line


def run(args: argparse.Namespace) -> int:
    """Answer one question, or hold a conversation; returns the exit status.

    Raises:
        ValueError, OSError: a checkpoint, image, question or option that is wrong.
    """
    if args.question is None and sys.stdin is None:
        raise ValueError("there is no QUESTION, and stdin is closed")
    if args.question is not None and not args.question.strip():
        raise ValueError("the question is empty")
    check_text("question", args.question or "")
    check_text("system message", args.system or "")
    args.model = find_checkpoint(args.model)
    talk = _load(args)
    if args.question is None:
        return talk.converse()
    talk.ask(args.question)
    return 0


def _load(args: argparse.Namespace) -> "Talk":
    try:
        return Talk(args)
    except (AttributeError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        # raised by transformers for files with contents that it does not expect
        kind = type(error).__name__
        raise ValueError(f"{args.model!r} cannot be loaded: {kind}: {error}") from error


class Talk:
    """A conversation with a checkpoint.

    Args:
        args: of the command.

    Raises:
        ValueError, OSError: a checkpoint, image or option that is wrong.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, config = args, read_config(args.model)
        self.stop = prompts.stop_text(config.template)
        tokenizer = load_tokenizer(args.model, config)  # before minutes of loading weights
        store = open_store(args)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        self.shown = self._load(args.image, config)  # with the next question
        dtype = parse_dtype(args.dtype, device := parse_device(args.device))
        weights = chosen_weights(args.quantize, args.model)
        model = CoMemoForConditionalGeneration.from_pretrained(args.model, dtype=dtype, **weights)
        self.model = model.to(device)
        check_settings("generation_config", GENERATION, vars(self.model.generation_config))
        self._note(
            f"{plain(args.model)}: on {device} in {str(dtype).removeprefix('torch.')}"
            + (f", weights of linear layers in {args.quantize}" if args.quantize else "")
        )
        self.session = ChatSession(
            self.model,
            CoMemoProcessor(CoMemoImageProcessor(), tokenizer),
            system_message=args.system,
            rope=args.rope,
            memory_store=store,
            **self._options(),
        )
        if args.seed is not None:
            torch.manual_seed(args.seed)

    def _load(self, paths: list[str], config: CoMemoConfig) -> list[tuple[Tensor, tuple[int, int]]]:
        max_num = self.args.max_tiles or config.max_dynamic_patch
        loaded = images.load_images(
            paths,
            config.vision_config.image_size[0],
            max_num,
            min_num=min(config.min_dynamic_patch, max_num),
            use_thumbnail=config.use_thumbnail,
            published=self.args.published_pixels,
        )
        shown = []
        for path, (pixel_values, grid) in zip(paths, loaded, strict=True):
            tokens = len(pixel_values) * config.tokens_per_tile
            self._note(f"{plain(path)}: grid {grid[0]} x {grid[1]}, {tokens:,} image tokens")
            shown.append((pixel_values, grid))
        return shown

    def _note(self, text: str) -> None:
        if is_watched(self.args.verbose):
            note(text)

    def ask(self, question: str | None) -> None:
        """Print an answer as it comes.

        Args:
            question: None to answer the last question again.
        """
        if question is not None:
            check_text("question", question)
        streams = self.args.num_beams == 1
        tiles = sum(len(pixel_values) for pixel_values, _ in self.shown)
        bar_shown = reading_bar(self.model, tiles, force=self.args.verbose)
        with show_store_warnings(), bar_shown as bar:
            streamer = AnswerStreamer(self.session.tokenizer, self.stop, before=bar.close)
            receiver = streamer if streams else None  # beam search gives no tokens before the end
            try:
                if question is None:
                    answer = self.session.regenerate(streamer=receiver)
                else:
                    answer = self.session.ask(question, self.shown, streamer=receiver)
                    self.shown = []
            except KeyboardInterrupt:
                if streamer.passed_on:
                    tell()
                raise
            if not streams:
                streamer.extend_to(answer)
                streamer.end()
        self._show_time()

    def _show_time(self) -> None:
        report = self.session.report
        if not self.args.timing or report is None:
            return
        parts = [f"{report.read_tokens:,} of {report.prompt_tokens:,} tokens read"]
        if not math.isnan(report.first_s):
            parts.append(f"first token after {report.first_s:.2f} s")
        if not math.isnan(report.per_token_s):
            parts.append(f"then {1 / report.per_token_s:.1f} tokens/s")
        note(f"[{', '.join(parts)}]")

    def converse(self) -> int:
        """Answer line by line; an error in one question does not end the conversation.

        Returns:
            Exit status.
        """
        status = 0
        self._note(HELP)
        for line in _read_lines():
            if line == "/quit":
                break
            try:
                self._follow(line)
            except KeyboardInterrupt:
                self._note("stopped; question and answer are forgotten")
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:
                status = report(error)
        return 0 if sys.stdin.isatty() else status

    def _follow(self, line: str) -> None:
        """Answer a question, or run one of `COMMANDS`."""
        word, rest = (*line.split(maxsplit=1), "")[:2]
        form = next((form for form in COMMANDS if form.split()[0] == word), None)
        if line.startswith("//"):
            self.ask(line[1:])
        elif not line.startswith("/"):
            self.ask(line)
        elif form is None:
            raise ValueError(f"there is no command {word!r}: wanted one of {', '.join(COMMANDS)}")
        elif bool(rest) != ("PATH" in form):
            raise ValueError(f"wanted {form}, got {shorten(line)}")
        elif word == "/help":
            note(HELP)
        elif word == "/new":
            absolute = self.model.config.memory_positions == "absolute"
            self.session.reset(keep_images=not absolute)
            self._note(
                "forgotten, images too"
                if absolute
                else "forgotten; its images come with the next question"
            )
        elif word == "/again":
            self.ask(None)
        elif word == "/image":
            self.shown += self._load([rest], self.model.config)

    def _options(self) -> dict[str, Any]:
        args = self.args
        sampling = ("temperature", "top_p", "top_k")
        given = {
            name: getattr(args, name)
            for name in (*sampling, "repetition_penalty")
            if getattr(args, name) is not None
        }
        return given | {
            "max_new_tokens": args.max_new_tokens,
            "num_beams": args.num_beams,
            "do_sample": args.sample or not given.keys().isdisjoint(sampling),
        }


def _read_lines() -> Iterator[str]:
    """Lines of stdin; at a terminal up to the first empty line."""
    typed = sys.stdin.isatty()
    edits = typed and sys.stdout.isatty()
    if edits:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            if typed and not edits:
                note("> ", end="")
            line = input("> ") + "\n" if edits else sys.stdin.readline(LONGEST_LINE)
        except EOFError:
            line = ""
        except OSError as error:
            raise OSError(error.errno, error.strerror, "stdin") from error
        if not line or (typed and not line.strip()):
            return
        if len(line) == LONGEST_LINE:
            raise ValueError(f"a line of stdin must have less than {LONGEST_LINE:,} characters")
        if line.strip():
            yield line.strip()


def check_text(name: str, text: str) -> None:
    """Refuse bytes that are not text.

    Args:
        name: what the text is, for the message.
        text: as Python reads arguments and stdin.

    Raises:
        ValueError: bytes that cannot be decoded, or lone surrogates.
    """
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"the {name} must be text, got bytes that are not: {shorten(text)}")
