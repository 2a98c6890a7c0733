"""What a waiting user sees: a bar while a prompt is read, then the answer as it comes."""

import logging
import math
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from torch import Tensor
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from comemo.cli.terminal import note, show

_HELD_BACK = 40  # characters; longer than any stop text


class ReadingBar:
    """A bar on stderr over vision layers, prompt layers and, until it is closed, written tokens.

    Args:
        vision_layers, text_layers: how many of each are to be passed.
        delay: seconds before the bar appears; a shorter wait shows nothing.
        force: show it where stderr is no terminal too.
    """

    def __init__(
        self, vision_layers: int, text_layers: int, delay: float = 2.0, force: bool = False
    ) -> None:
        self.layers = {"vision": vision_layers, "text": text_layers}
        self.calls = {"vision": 0, "text": 0}
        self._caller = threading.get_ident()
        self._closed = threading.Event()
        self._painter: threading.Thread | None = None
        if force or sys.stderr.isatty():
            # A thread paints, so that the clock goes on while one layer takes its time.
            self._painter = threading.Thread(target=self._paint, args=(delay,), daemon=True)
            self._painter.start()

    def count(self, part: str) -> None:
        """One more layer is done; layers that other threads call are not ours."""
        if threading.get_ident() == self._caller:
            self.calls[part] += 1

    def close(self) -> None:
        """Take the bar off the screen for good; what is printed next starts on a clean line."""
        self._closed.set()
        if self._painter is not None:
            self._painter.join()
            self._painter = None

    def state(self) -> tuple[str, int, int | None]:
        """Which stage it is, how much of it is done, and of how much."""
        seen, read = self.calls["vision"], self.calls["text"]
        if seen < self.layers["vision"] and not read:  # of known pictures none passes
            return "seeing the pictures", seen, self.layers["vision"]
        if read < self.layers["text"]:
            return "reading the prompt", read, self.layers["text"]
        # Reading the prompt gives the first token.
        return "writing", read // max(self.layers["text"], 1), None

    def _paint(self, delay: float) -> None:
        if self._closed.wait(delay):
            return
        stage, bar = "", None
        while not self._closed.is_set():
            name, done, total = self.state()
            if name != stage:
                if bar is not None:
                    bar.close()
                unit = " tokens" if total is None else " layers"
                shape = {"total": total, "initial": done, "unit": unit, "ncols": 80}
                bar = tqdm(desc=name, leave=False, file=sys.stderr, **shape)
                if not stage:
                    bar.start_t -= delay
                stage = name
            assert bar is not None
            bar.n = done
            bar.refresh()
            self._closed.wait(0.2)
        if bar is not None:
            bar.close()


@contextmanager
def reading_bar(
    model: Any, tiles: int, delay: float = 2.0, force: bool = False
) -> Iterator[ReadingBar]:
    """Show how far a model is with its prompt, if that takes longer than `delay`.

    Args:
        model: a `CoMemoForConditionalGeneration`. Its layers carry counting hooks inside the
            `with` block, and none after it, however it ends.
        tiles: of the pictures that are new.
        delay: seconds before the bar appears.
        force: show it where stderr is no terminal too.

    Yields:
        The bar; close it before printing.
    """
    core, config = model.model, model.config
    tower = core.vision_tower.encoder.layer
    vision = tower[: config.select_layer % (len(tower) + 1)] if tiles else []
    text = core.language_model.layers
    rounds = -(-tiles // config.tiles_at_once)
    bar = ReadingBar(rounds * len(vision), len(text), delay, force)
    hooks = []
    try:
        for part, layers in (("vision", vision), ("text", text)):
            hook = _counting_hook(bar, part)
            hooks += [layer.register_forward_hook(hook) for layer in layers]
        yield bar
    finally:
        for handle in hooks:
            handle.remove()
        bar.close()


def _counting_hook(bar: ReadingBar, part: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        bar.count(part)

    return hook


class AnswerStreamer(BaseStreamer):
    """Writes an answer as its tokens come: in all the text that `chat` returns, control characters
    escaped.

    transformers' `TextStreamer` starts afresh after each line and so loses the blanks that a line
    begins with; this one decodes the whole answer each time.

    Args:
        tokenizer: of the checkpoint.
        stop: text that ends the answer.
        out: where to write.
        before: called once, before the first character is written.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: str,
        out: TextIO | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.tokenizer, self.stop, self.before = tokenizer, stop, before
        self.out = sys.stdout if out is None else out
        self.ids: list[int] = []
        self.printed = ""
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the next tokens; `generate` hands over the prompt first."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        self.write(_settled(self._answer()))

    def end(self) -> None:
        """The answer is complete: write what was held back, and end the line."""
        self.write(self._answer())
        self._emit("\n")

    def write(self, text: str) -> None:
        """Go on to `text`, of which a part is written already."""
        if len(text) > len(self.printed):
            self._emit(text[len(self.printed) :])
            self.printed = text

    def _answer(self) -> str:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        return text.split(self.stop)[0].strip()

    def _emit(self, text: str) -> None:
        if self.before is not None:
            self.before()
            self.before = None
        show(text, self.out)


class PieceStreamer(AnswerStreamer):
    """Hands an answer on in pieces, instead of writing it.

    Args:
        tokenizer, stop: as of `AnswerStreamer`.
        take: called with each piece.
    """

    def __init__(self, tokenizer: Any, stop: str, take: Callable[[str], None]) -> None:
        super().__init__(tokenizer, stop)
        self.take = take

    def end(self) -> None:
        """The answer is complete: hand on what was held back."""
        self.write(self._answer())

    def _emit(self, text: str) -> None:
        self.take(text)


def _settled(text: str) -> str:
    """The part of an unfinished answer that no further token can change.

    A character of several bytes is not whole before its last one, and decoding draws some words
    and marks together ("do n't", " ."): an ASCII word waits for the blank behind it, and of a very
    long one its end, which may be the beginning of the stop text.
    """
    if text and text[-1] != "\ufffd" and not text[-1].isascii():
        return text
    words = text.rsplit(maxsplit=1)
    whole = len(words[0]) if len(words) > 1 else 0
    return text[: max(whole, len(text) - _HELD_BACK)]


class TokenClock(BaseStreamer):
    """Notes when each token comes, and hands it on.

    Args:
        streamer: whom to.
    """

    def __init__(self, streamer: BaseStreamer | None = None) -> None:
        self.streamer, self.times = streamer, [time.perf_counter()]
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

    @property
    def first(self) -> float:
        """Seconds to the first token; not a number before it came."""
        return self.times[1] - self.times[0] if len(self.times) > 1 else math.nan

    @property
    def per_token(self) -> float:
        """Median seconds from one token to the next; not a number for a single one."""
        gaps = [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]
        return statistics.median(gaps) if gaps else math.nan


@contextmanager
def count_calls(objects: Sequence[Any], method: str) -> Iterator[list[int]]:
    """Count the calls of a method of these objects; they are as before afterwards.

    Args:
        objects: which; their class and its other objects are left alone.
        method: its name.

    Yields:
        A list of one number that goes up.
    """
    count = [0]

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return call(*args, **kwargs)

        return wrapper

    own = [vars(item).get(method) for item in objects]  # a module's, not one of a class
    try:
        for item in objects:
            vars(item)[method] = counted(getattr(item, method))
        yield count
    finally:
        for item, before in zip(objects, own, strict=True):
            if before is None:
                vars(item).pop(method, None)
            else:
                vars(item)[method] = before


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


@contextmanager
def unhushed() -> Iterator[None]:
    """Print warnings and transformers' remarks as notes inside the `with` block."""

    def show_warning(*warning: Any, **_: Any) -> None:
        note(warnings.formatwarning(*warning[:4]).rstrip())

    handler = _Notes()
    transformers_logging.disable_default_handler()
    transformers_logging.add_handler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            yield
    finally:
        transformers_logging.remove_handler(handler)
        transformers_logging.enable_default_handler()


@contextmanager
def hushed(progress: bool) -> Iterator[None]:
    """Keep warnings and transformers' remarks off the screen inside the `with` block.

    Args:
        progress: whether transformers may show its own bars.
    """
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    try:
        transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # errors are raised
        if not progress:
            transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
