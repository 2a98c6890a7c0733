"""Tokens of an answer: how the next one is chosen, and when the answer ends."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from comemo.decode.step import MAX_ENDS, DecodeStep
from comemo.outputs import CACHE

ROOM = 4096  # tokens; capacity of the ids beyond the current length


class Answer:
    """The tokens of a call, under the rules of transformers' sampling loop.

    Args:
        input_ids: [B, n], the ids that `generate` was called with.
        processors, criteria: prepared by `generate`.
        config: the `GenerationConfig` of the call.

    Attributes:
        length: number of ids so far, the given ones included.
        limit: length at which every answer ends.
        in_step: whether the decode step chooses the token itself.
    """

    def __init__(self, input_ids: Tensor, processors: Any, criteria: Any, config: Any) -> None:
        self.processors, self.sampled = processors, bool(config.do_sample)
        self.in_step = not self.sampled and not len(processors)
        self.length = input_ids.shape[1]
        limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        self.limit = min(limits, default=torch.iinfo(torch.int64).max)
        known = [c for c in criteria if type(c) is EosTokenCriteria]
        self._ends = [c.eos_token_id.flatten() for c in known]
        if sum(len(ids) for ids in self._ends) > MAX_ENDS:
            known, self._ends = [], []
        self._others = [c for c in criteria if type(c) is not MaxLengthCriteria and c not in known]
        # As in transformers: ended answers continue as padding only if there is a stop token.
        self._pad = config._pad_token_tensor
        self._pads = any(hasattr(c, "eos_token_id") for c in criteria)
        dictionary = config.return_dict_in_generate
        self._dictionary = bool(dictionary)
        self.scores: tuple[Tensor, ...] | None = () if dictionary and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if dictionary and config.output_logits else None
        self._ids = input_ids.new_empty(input_ids.shape[0], self._room())
        self._ids[:, : self.length].copy_(input_ids)

    def _room(self) -> int:
        return max(self.length, min(self.limit, self.length + ROOM))

    @property
    def ids(self) -> Tensor:
        """[B, length] so far."""
        return self._ids[:, : self.length]

    def begin(self, step: DecodeStep) -> None:
        """Set stop tokens and padding in a step's buffers."""
        step.unfinished.fill_(True)
        step.report.fill_(1)
        step.ends.fill_(-1)
        if self._ends:
            ids = torch.cat(self._ends)
            step.ends[: len(ids)].copy_(ids)
        step.pads.fill_(self._pads)
        if self._pad is not None:
            step.pad.copy_(self._pad.flatten()[:1])

    def choose(self, step: DecodeStep, chosen: bool) -> None:
        """Take the next token from the step's logits.

        Args:
            step: its `report` then holds the tokens.
            chosen: whether the step has chosen the token already.
        """
        if not chosen or self.logits is not None or self.scores is not None:
            self._select(step, chosen)
        if self.length == self._ids.shape[1]:
            held = self.ids
            self._ids = held.new_empty(held.shape[0], self._room())
            self._ids[:, : self.length].copy_(held)
        self._ids[:, self.length : self.length + 1].copy_(step.token)
        self.length += 1
        for criterion in self._others:
            step.stop(criterion(self.ids, self.scores).to(step.unfinished.device))

    def _select(self, step: DecodeStep, chosen: bool) -> None:
        logits = step.logits.clone()
        scores = self.processors(self.ids, logits)
        if self.logits is not None:
            self.logits += (logits,)
        if self.scores is not None:
            self.scores += (scores,)
        if chosen:
            return
        if not self.sampled:
            step.take(scores.argmax(-1))
            return
        probabilities = scores.softmax(-1)
        # Same distribution as `torch.multinomial`, which would sync to check the probabilities.
        noise = torch.empty_like(probabilities).exponential_()
        step.take((probabilities / noise).argmax(-1))
        step.report[-1].copy_(~probabilities.isnan().any())

    def result(self, cache: Any) -> Any:
        """The return value of `generate`."""
        sequences = self.ids.clone()
        if not self._dictionary:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=self.scores, logits=self.logits, **{CACHE: cache}
        )
