"""What a user sees while waiting: a bar during prefill, then the answer as its tokens arrive."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from comemo.chat.streamers import PieceStreamer
from comemo.cli.terminal import show
from comemo.decode.interface import GeneratingModel


class ReadingBar:
    """A bar on stderr: vision layers, then decoder layers, then, until it is closed, tokens.

    Args:
        vision_layers, text_layers: how many layer calls to expect.
        delay: seconds before the bar appears; a shorter wait shows nothing.
        force: show it even if stderr is not a terminal.
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
            # A thread paints, so that the clock keeps running during a slow layer.
            self._painter = threading.Thread(target=self._paint, args=(delay,), daemon=True)
            self._painter.start()

    def count(self, part: str) -> None:
        """One more layer is done. Calls by other threads are not counted."""
        if threading.get_ident() == self._caller:
            self.calls[part] += 1

    def close(self) -> None:
        """Remove the bar; the next output starts on an empty line."""
        self._closed.set()
        if self._painter is not None:
            self._painter.join()
            self._painter = None

    def state(self) -> tuple[str, int, int | None]:
        """Stage, units done, units in total (None if unknown)."""
        seen, read = self.calls["vision"], self.calls["text"]
        if seen < self.layers["vision"] and not read:  # a memory store skips the tower
            return "encoding the images", seen, self.layers["vision"]
        if read < self.layers["text"]:
            return "reading the prompt", read, self.layers["text"]
        # The prefill also yields the first token.
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
    model: GeneratingModel, tiles: int, delay: float = 2.0, force: bool = False
) -> Iterator[ReadingBar]:
    """Show the progress of a prefill that takes longer than `delay`.

    Args:
        model: a `CoMemoForConditionalGeneration`. Its layers have counting hooks inside the
            `with` block, and none after it, also if an exception ends it.
        tiles: tiles of the new images.
        delay: seconds before the bar appears.
        force: show it even if stderr is not a terminal.

    Yields:
        The bar; close it before printing.
    """
    core = model.model
    vision = core.vision_layers() if tiles else []
    text = core.decoder_layers()
    rounds = -(-tiles // model.config.tiles_at_once)
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


class AnswerStreamer(PieceStreamer):
    """Writes an answer as its tokens arrive, control characters escaped.

    Args:
        tokenizer, stop: see `PieceStreamer`.
        out: where to write; None for stdout.
        before: called once, before the first character is written.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: str,
        out: TextIO | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(tokenizer, stop, self._write)
        self.out, self.before = sys.stdout if out is None else out, before

    def end(self) -> None:
        """The answer is complete: write the rest, and end the line."""
        super().end()
        self._write("\n")

    def _write(self, text: str) -> None:
        if self.before is not None:
            self.before()
            self.before = None
        show(text, self.out)
