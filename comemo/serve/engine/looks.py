"""Where the memory path looked, for answers that are complete: read once more, in parts."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from comemo.decode.interface import GeneratingModel
from comemo.look.picture import heat_over_picture
from comemo.look.weights import answer_tokens, gate_sizes, look_at_answer, over_layers
from comemo.look.words import split_words
from comemo.serve.engine.answer import Answer
from comemo.serve.engine.key_pool import KeyPool
from comemo.serve.engine.prompts import Pace
from comemo.serve.engine.request import Request
from comemo.serve.work import Looked

MOST_CELLS = 1024  # of a map; larger ones are made coarser
_SHORTEST, _LONGEST = 16, 256  # tokens of a part; bounds memory


@dataclass
class _Partial:
    """What is known of an answer: weights [n, M] of its first tokens, in parts."""

    parts: list[Tensor] = field(default_factory=list)
    read: int = 0


class LookSteps:
    """Looks at answers in parts, so that others do not wait long.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        tokenizer: of its checkpoint.
        stop_text: that ends an answer.
        keys: where the answers are.
    """

    def __init__(
        self, model: GeneratingModel, tokenizer: Any, stop_text: str, keys: KeyPool
    ) -> None:
        self._model, self._tokenizer, self._stop = model, tokenizer, stop_text
        self._keys, self._per_token = keys, Pace(0.001)
        self._partial: dict[Answer, _Partial] = {}

    def advance(self, request: Request, stall_s: float) -> Looked | None:
        """Read a part of an answer again.

        Args:
            request: whose answers are complete, and whose segments are not given back yet.
            stall_s: seconds that the part may take, about.

        Returns:
            What is known of the answer if all of it is read.
        """
        answer = next(one for one in request.answers if not one.looked)
        partial = self._partial.setdefault(answer, _Partial())
        if request.shown is not None and partial.read < len(answer.tokens):
            self._read(request, answer, partial, stall_s)
            if partial.read < len(answer.tokens):
                return None
        self.forget(request)
        answer.looked = True
        return self._describe(request, answer, partial)

    def forget(self, request: Request) -> None:
        """Drop what is known of a request."""
        for answer in request.answers:
            self._partial.pop(answer, None)

    def _read(self, request: Request, answer: Answer, partial: _Partial, stall_s: float) -> None:
        model, prompt, device = self._model, request.work.prompt, self._model.device
        start = time.perf_counter()
        size = min(max(self._per_token.units(stall_s), _SHORTEST), _LONGEST)
        first, last = partial.read, min(partial.read + size, len(answer.tokens))
        tokens = torch.tensor(answer.tokens)
        again = answer_tokens(model, prompt.input_ids, prompt.position_ids, tokens)
        before = request.work.tokens - 1 + first
        memory = request.memory_for(request.work.tokens - 1, request.work.tokens, device)
        assert memory is not None
        weights = look_at_answer(
            model,
            *(part[:, first:last].to(device) for part in again),
            self._keys.cache(answer.segment, before),
            memory,
            token_counts=torch.full((1,), before + last - first, device=device),
        )
        partial.parts.append(over_layers(weights, gate_sizes(model)).cpu())
        partial.read = last
        self._per_token.learn(last - first, time.perf_counter() - start)

    def _describe(self, request: Request, answer: Answer, partial: _Partial) -> Looked:
        words, place = [], 0
        for word in split_words(self._tokenizer, torch.tensor(answer.tokens), self._stop):
            found = answer.text.find(word.text, place)
            if found < 0:  # after a stop text
                break
            words.append(word)
            place = found + len(word.text)
        heat: list[Tensor] = []
        if partial.parts:
            of_tokens = torch.cat(partial.parts)
            of_words = [of_tokens[list(word.tokens)].mean(0) for word in words]
            rows = torch.stack(of_words) if words else of_tokens[:0]
            parts = rows.split([picture.tokens for picture in request.work.pictures], -1)
            config = self._model.config
            for picture, part in zip(request.work.pictures, parts, strict=True):
                cells = heat_over_picture(part, picture.grid, config).cells
                heat.append(coarser(cells, config.side))
        return Looked(answer.choice, [word.text for word in words], heat)


def coarser(cells: Tensor, side: int) -> Tensor:
    """Maps [words, down, across] with about `MOST_CELLS` cells at most; sums of squares of cells.

    Args:
        cells: of a picture.
        side: cells along the side of a tile, of which down and across are multiples.
    """
    down, across = cells.shape[-2:]
    least = math.sqrt(down * across / MOST_CELLS)
    factor = next((n for n in range(1, side) if n >= least and side % n == 0), side)
    squares = cells.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor))
    return squares.sum((-1, -3))
