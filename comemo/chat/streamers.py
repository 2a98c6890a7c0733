"""Following an answer as it is generated: its text, its times, and how to stop it."""

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

_HELD_BACK = 40  # characters; longer than any stop text
_LONGEST_TAIL = 64  # tokens that are decoded for each new one


def answer_text(tokenizer: Any, tokens: Iterable[int] | Tensor, stop: str) -> str:
    """The text of an answer: decoded, cut at the stop text, without surrounding whitespace.

    Args:
        tokenizer: of the checkpoint.
        tokens: generated ids.
        stop: text that ends an answer, see `prompts.stop_text`.
    """
    return tokenizer.decode(tokens, skip_special_tokens=True).split(stop)[0].strip()


class GrowingText:
    """The text of an answer after each token, as `answer_text` has it.

    Decoding everything for each token would take a time that grows with the square of the length.
    The text is divided at a place where decoding both parts was seen to give the whole, far enough
    from the end that later tokens do not change what is around it. Only the second part is decoded
    again.

    Args:
        tokenizer: of the checkpoint.
        stop: text that ends an answer.
    """

    def __init__(self, tokenizer: Any, stop: str) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self.ids: list[int] = []
        self._head, self._anchor, self._next = "", 0, _LONGEST_TAIL

    def add(self, ids: Iterable[int]) -> str:
        """The text with these tokens."""
        self.ids += ids
        tail = self._decode(self._anchor, None)
        text = self._head + tail
        if len(self.ids) >= self._next:
            self._divide(tail)
        return text.split(self._stop)[0].strip()

    def _divide(self, tail: str) -> None:
        """Move the border, if there is a place where both parts make the whole."""
        end = len(self.ids)
        self._next = end + _LONGEST_TAIL // 2
        for place in range(end - _LONGEST_TAIL // 2, end - _LONGEST_TAIL * 3 // 4, -1):
            before, after = self._decode(self._anchor, place), self._decode(place, None)
            for joint in (" ", ""):
                if after and before + joint + after == tail:
                    self._head += before + joint
                    self._anchor = place
                    return

    def _decode(self, first: int, last: int | None) -> str:
        return self._tokenizer.decode(self.ids[first:last], skip_special_tokens=True)


class PieceStreamer(BaseStreamer):
    """Passes an answer on in pieces of text; together they are what `answer_text` returns.

    transformers' `TextStreamer` restarts after each line and drops the whitespace that a line
    begins with.

    Args:
        tokenizer: of the checkpoint.
        stop: text that ends an answer.
        take: called with each piece.
    """

    def __init__(self, tokenizer: Any, stop: str, take: Callable[[str], None]) -> None:
        self.take, self._text = take, GrowingText(tokenizer, stop)
        self.passed_on = ""
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the next tokens. `generate` passes the prompt first."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.extend_to(settled_part(self._text.add(value.flatten().tolist())))

    def end(self) -> None:
        """The answer is complete: pass on the rest."""
        self.extend_to(self._text.add([]))

    def extend_to(self, text: str) -> None:
        """Pass on what `text` adds to the pieces so far."""
        if len(text) > len(self.passed_on):
            self.take(text[len(self.passed_on) :])
            self.passed_on = text


def settled_part(text: str) -> str:
    """The part of an unfinished answer that no further token can change.

    A character of several bytes is incomplete before its last one. Decoding also joins some words
    and marks ("do n't", " ."), so an ASCII word waits for the space after it. The end of a very
    long word is held back too, because it may be the beginning of the stop text.
    """
    if text and text[-1] != "\ufffd" and not text[-1].isascii():
        return text
    words = text.rsplit(maxsplit=1)
    whole = len(words[0]) if len(words) > 1 else 0
    return text[: max(whole, len(text) - _HELD_BACK)]


class TokenClock(BaseStreamer):
    """Records when each token arrives, and passes it on.

    Args:
        streamer: the next streamer, if any.
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
        """Seconds to the first token; NaN before it arrived."""
        return self.times[1] - self.times[0] if len(self.times) > 1 else math.nan

    @property
    def per_token(self) -> float:
        """Median seconds from one token to the next; NaN for a single token."""
        gaps = [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]
        return statistics.median(gaps) if gaps else math.nan


@dataclass(frozen=True)
class TurnReport:
    """What an answer cost.

    Attributes:
        prompt_tokens: tokens of the whole conversation up to the answer.
        read_tokens: how many of them were not in the KV cache.
        new_tokens: tokens of the answer.
        first_s: seconds to its first token, everything included.
        per_token_s: median seconds from one token to the next; NaN for a single token.
    """

    prompt_tokens: int
    read_tokens: int
    new_tokens: int
    first_s: float
    per_token_s: float


class StopOnEvent(StoppingCriteria):
    """Ends all sequences once an event is set."""

    def __init__(self, asked: threading.Event) -> None:
        self.asked = asked

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)
