"""The next token of all answers at work: one ragged step, or each alone if that step fails."""

import logging
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from comemo.batch.answering import describe
from comemo.decode.interface import GeneratingModel
from comemo.serve.engine.answer import Answer, choose_tokens
from comemo.serve.engine.key_pool import KeyPool
from comemo.serve.engine.picture_pool import PicturePool
from comemo.serve.engine.request import Request
from comemo.serve.engine.step import RaggedStep
from comemo.serve.work import TokenFacts

_log = logging.getLogger("comemo.serve")

Row: TypeAlias = tuple[Request, Answer]
Chosen: TypeAlias = TokenFacts | Exception


class BrokenLogitsError(Exception):
    """The model's logits of a request are not numbers, and what it holds may not be either."""


def choose(logits: Tensor, answers: Sequence[Answer]) -> list[Chosen]:
    """The next token of each answer, or why there is none.

    Args:
        logits: float32 [B, V].
        answers: B of them.
    """
    chosen, broken = choose_tokens(logits, answers)
    return [
        BrokenLogitsError() if bad else facts for facts, bad in zip(chosen, broken, strict=True)
    ]


class DecodeSteps:
    """Decode steps over the pools.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        keys, pictures: the pools.
        most_rows: most answers at a time.

    Attributes:
        count: steps so far.
    """

    def __init__(
        self, model: GeneratingModel, keys: KeyPool, pictures: PicturePool, most_rows: int
    ) -> None:
        self._step = RaggedStep(model, keys, pictures, most_rows)
        self._pools = keys.segments, pictures.segments
        self._placed: list[Row] = []
        self._moves = 0
        self.count = 0

    def run(self, rows: list[Row]) -> list[Chosen]:
        """One token of each row; the exception of a row alone if it fails.

        Args:
            rows: answers that go on. Their positions move on with their tokens.
        """
        try:
            return self._run(rows)
        except Exception as error:
            self._placed = []
            if len(rows) == 1:
                return [error]
            _log.warning("a step of %d answers failed: %s", len(rows), describe(error))
        # Outside of the handler: the exception holds the tensors of the failed step.
        return [chosen for row in rows for chosen in self.run([row])]

    def _run(self, rows: list[Row]) -> list[Chosen]:
        answers = [answer for _, answer in rows]
        moves = sum(pool.moves for pool in self._pools)
        if rows != self._placed or moves != self._moves:
            self._step.place(answers, [request.reading() for request, _ in rows])
            self._placed, self._moves = rows, moves
        logits = self._step.run([answer.tokens[-1] for answer in answers])
        self.count += 1
        chosen = choose(logits, answers)
        for answer in answers:
            answer.position, answer.query = answer.position + 1, answer.query + 1
            answer.count += 1
        return chosen


def first_tokens(request: Request, logits: Tensor) -> list[Chosen]:
    """The first token of each answer of a request.

    Args:
        request: whose prompt is read.
        logits: float32 [1, V] of its last token.
    """
    copies = logits.expand(len(request.answers), -1)
    with torch.no_grad():
        return choose(copies, request.answers)
