"""`comemo chat`: a question, or a conversation line by line."""

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from comemo import images, prompts
from comemo.chat.published import check_tokenizer
from comemo.chat.session import ChatSession
from comemo.cli import info
from comemo.cli import store as store_cli
from comemo.cli.device import parse_device, parse_dtype
from comemo.cli.progress import AnswerStreamer, reading_bar
from comemo.cli.terminal import note, plain, report, tell
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.processor import CoMemoImageProcessor, CoMemoProcessor
from comemo.safety.regular import check_settings_files
from comemo.safety.settings import TEXT, check_settings, shorten
from comemo.tokenizer import InternLM2Tokenizer

COMMANDS = {
    "/image PATH": "show a picture with the next question",
    "/again": "answer the last question once more",
    "/new": "forget what was said, keep the pictures",
    "/help": "list these",
    "/quit": "end, as Ctrl-D and an empty line do; Ctrl-C stops an answer",
    "//...": "ask a question that begins with /",
}
HELP = "A line is a question, but for these:\n" + "\n".join(
    f"  {form:14}{text}" for form, text in COMMANDS.items()
)
LONGEST_LINE = 2**20  # characters of a question that no one types; stdin may never end a line


class Talk:
    """A conversation with a checkpoint.

    Args:
        args: of the command.

    Raises:
        ValueError, OSError: a checkpoint, picture or option that is not right.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, config = args, info.read_config(args.model)
        self.stop = prompts.stop_text(config.template)
        check_settings_files(args.model)
        # What transformers says of a missing file is about other kinds of tokenizers.
        held = set(os.listdir(args.model))
        if "tokenizer_config.json" not in held:
            raise ValueError(f"{args.model!r} has no tokenizer_config.json")
        if "tokenizer.model" not in held:
            raise ValueError(f"{args.model!r} has no tokenizer.model")
        tokenizer = InternLM2Tokenizer.from_pretrained(args.model)
        check_tokenizer(tokenizer, self.stop)  # before minutes of loading weights
        if len(tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"{args.model!r}: the tokenizer must have at most the model's"
                f" {config.text_config.vocab_size:,} tokens, got {len(tokenizer):,}"
            )
        store = store_cli.open_store(args)
        self.shown = [self._load(path, config) for path in args.image]  # with the next question
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        dtype = parse_dtype(args.dtype, device := parse_device(args.device))
        model = CoMemoForConditionalGeneration.from_pretrained(args.model, dtype=dtype)
        self.model = model.to(device)
        check_settings("generation_config", TEXT, vars(self.model.generation_config))
        self._note(f"{plain(args.model)}: on {device} in {str(dtype).removeprefix('torch.')}")
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

    def _load(self, path: str, config: CoMemoConfig) -> tuple[Tensor, tuple[int, int]]:
        max_num = self.args.max_tiles or config.max_dynamic_patch
        pixel_values, grid = images.load_image(
            path,
            config.vision_config.image_size[0],
            max_num,
            min_num=min(config.min_dynamic_patch, max_num),
            use_thumbnail=config.use_thumbnail,
            published=self.args.published_pixels,
        )
        tokens = len(pixel_values) * config.tokens_per_tile
        self._note(f"{plain(path)}: grid {grid[0]} x {grid[1]}, {tokens:,} image tokens")
        return pixel_values, grid

    def _note(self, text: str) -> None:
        if is_watched(self.args):
            note(text)

    def ask(self, question: str | None) -> None:
        """Print an answer as it comes.

        Args:
            question: None for another answer to the last one.
        """
        if question is not None:
            check_text("question", question)
        streams = self.args.num_beams == 1
        tiles = sum(len(pixel_values) for pixel_values, _ in self.shown)
        told = store_cli.told_warnings()
        with told, reading_bar(self.model, tiles, force=self.args.verbose) as bar:
            streamer = AnswerStreamer(self.session.tokenizer, self.stop, before=bar.close)
            receiver = streamer if streams else None
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
        self._tell_time()

    def _tell_time(self) -> None:
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
        """Answer line by line; what goes wrong with one question does not end it.

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
        """A question, or one of `COMMANDS`."""
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
            self.session.reset(keep_pictures=not absolute)
            self._note(
                "forgotten; its pictures go with the next question"
                if not absolute
                else "forgotten, pictures too"
            )
        elif word == "/again":
            self.ask(None)
        elif word == "/image":
            self.shown.append(self._load(rest, self.model.config))

    def _options(self) -> dict[str, Any]:
        args = self.args
        options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
        drawing, penalty = ("temperature", "top_p", "top_k"), ("repetition_penalty",)
        given = {name for name in drawing + penalty if getattr(args, name) is not None}
        options |= {name: getattr(args, name) for name in given}
        drawn = args.sample or not given.isdisjoint(drawing)
        return options | {"num_beams": args.num_beams, "do_sample": drawn}


def _read_lines() -> Iterator[str]:
    """Lines of stdin; at a terminal up to the first empty one."""
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
    """Refuse bytes that are no text.

    Args:
        name: of what it is.
        text: as Python reads arguments and stdin.

    Raises:
        ValueError: bytes that are not of the encoding, or halves of surrogate pairs.
    """
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"the {name} must be text, got bytes that are none: {shorten(text)}")


def is_watched(args: argparse.Namespace) -> bool:
    """Whether somebody sees notes and progress.

    Args:
        args: of any command.
    """
    return sys.stderr.isatty() or getattr(args, "verbose", False)
