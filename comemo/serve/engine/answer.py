"""An answer while it is generated: its tokens, its text, and when it ends."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from comemo.chat.streamers import GrowingText, settled_part
from comemo.serve.engine.segments import Segment
from comemo.serve.work import Piece, Sampling, TokenFacts


class AnswerText:
    """The text of an answer in pieces; together they are its whole text.

    Args:
        tokenizer: of the checkpoint.
        end: text that ends every answer.
        stops: texts that end this one. The earliest in the text counts.
    """

    def __init__(self, tokenizer: Any, end: str, stops: tuple[str, ...]) -> None:
        self._text, self._stops = GrowingText(tokenizer, end), stops
        self._passed_on = ""
        self.stopped = False  # a stop text was found

    @property
    def passed_on(self) -> str:
        """All pieces so far."""
        return self._passed_on

    def add(self, token: int, last: bool) -> str:
        """The next piece.

        Args:
            token: the next one.
            last: whether it is complete, so that nothing is held back.
        """
        text = self._text.add([token])
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        elif not last:
            text = settled_part(text)
            text = text[: len(text) - self._begun(text)]
        piece = text[len(self._passed_on) :]
        self._passed_on += piece
        return piece

    def _begun(self, text: str) -> int:
        """Characters at the end of a text that a stop text may begin with."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:size])
            ),
            default=0,
        )


class Answer:
    """One answer of a request.

    Args:
        choice: its number.
        sampling: how it is chosen.
        text: of the answer.
        stop_id: token that ends every answer.
        device: of the logits.

    Attributes:
        segment: of its tokens in the KV cache, the prompt included.
        position, query, count: of its next token: position id, position of its mixin query, number
            of tokens with it.
        tokens: ids so far.
        reason: why it has ended; None before.
        looked: whether it is known where it looked.
    """

    segment: Segment
    position: int
    query: int
    count: int

    def __init__(
        self, choice: int, sampling: Sampling, text: AnswerText, stop_id: int, device: torch.device
    ) -> None:
        self.choice, self.sampling, self._text, self._stop_id = choice, sampling, text, stop_id
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.looked = False
        self._counts: Counter[int] = Counter()
        self._last: float | None = None
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:  # every answer of a request draws its own tokens
            self._generator.manual_seed((sampling.seed + choice * 0x9E3779B97F4A7C15) % 2**63)
        self._warp = LogitsProcessorList()
        if sampling.temperature not in (0.0, 1.0):
            self._warp.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._warp.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warp.append(TopPLogitsWarper(sampling.top_p))

    @property
    def text(self) -> str:
        """What was delivered so far."""
        return self._text.passed_on

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the most likely one."""
        s = self.sampling
        penalties = (s.repetition_penalty != 1, s.frequency_penalty, s.presence_penalty)
        return s.temperature == 0 and not any(penalties) and len(self.tokens) >= s.min_tokens

    def choose(self, logits: Tensor) -> Tensor:
        """The next token, int64 [1], by logits float32 [1, V], which are not changed."""
        s = self.sampling
        scores = logits
        if self.tokens:
            ids = torch.tensor([self.tokens], device=logits.device)
            if s.repetition_penalty != 1:
                scores = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(ids, scores)
            if s.frequency_penalty or s.presence_penalty:
                known = torch.tensor(list(self._counts), device=logits.device)
                often = torch.tensor(list(self._counts.values()), device=logits.device)
                minus = s.frequency_penalty * often + s.presence_penalty
                scores = scores.index_add(1, known, -minus[None].to(scores))
        if len(self.tokens) < s.min_tokens:
            scores = scores.clone()
            scores[:, self._stop_id] = float("-inf")
        if s.temperature == 0:
            return scores.argmax(-1)
        probabilities = self._warp(None, scores).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self._generator)[0]

    def take(self, facts: TokenFacts) -> Piece:
        """Add a token; `reason` says whether it was the last one."""
        token, now = facts.id, time.perf_counter()
        step = None if self._last is None else now - self._last
        self._last = now
        self.tokens.append(token)
        self._counts[token] += 1
        if token == self._stop_id:
            self.reason = "stop"
        elif len(self.tokens) >= self.sampling.max_tokens:
            self.reason = "length"
        piece = self._text.add(token, last=self.reason is not None)
        if self._text.stopped:
            self.reason = "stop"
        return Piece(self.choice, piece, facts, step)


def choose_tokens(logits: Tensor, answers: Sequence[Answer]) -> tuple[list[TokenFacts], list[bool]]:
    """The next token of each answer, with one transfer from the device.

    Args:
        logits: float32 [B, V], a row for each answer.
        answers: B of them.

    Returns:
        The tokens, and which rows have NaN, so that their token means nothing.
    """
    chosen, broken = logits.argmax(-1), torch.isnan(logits).any(-1)
    for row, answer in enumerate(answers):
        if not answer.is_plain:
            own = torch.where(broken[row], 0, logits[row : row + 1])  # else drawing would fail
            chosen[row : row + 1] = answer.choose(own)
    tokens, bad = torch.stack([chosen, broken.long()]).tolist()
    found = []
    for row, (token, answer) in enumerate(zip(tokens, answers, strict=True)):
        wanted = answer.sampling.logprobs
        if wanted is None or bad[row]:
            found.append(TokenFacts(token))
            continue
        logprobs = logits[row].log_softmax(-1)
        values, ids = logprobs.topk(min(wanted, len(logprobs)))
        others = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found.append(TokenFacts(token, float(logprobs[token]), others))
    return found, [bool(value) for value in bad]
