"""One decode step over static buffers, which a CUDA graph captures.

Everything that changes from token to token is on the device and advanced there: lengths,
positions, spans, the row of the next keys and values.

Letters: B prompts, C tokens that the buffers hold, G key heads, D head dimension, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from comemo.decode.arena import MemoryArena, MemoryKind
from comemo.decode.interface import GeneratingModel

MAX_ENDS = 8  # stop tokens that a step checks
# Columns of a step's counters; all except the start advance by one.
POSITION, QUERY, COUNT, SLOT, START, END = range(6)


@dataclass(frozen=True)
class StepKind:
    """Everything that a captured step depends on, except the model.

    Attributes:
        rows: B.
        capacity: C.
        layers, heads, head_dim, dtype, device: of the self-attention's keys and values.
        vocabulary: V.
        memory: None without an image memory.
    """

    rows: int
    capacity: int
    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    vocabulary: int
    memory: MemoryKind | None


class StepCache:
    """The KV cache that a step passes to the model: keys and values in static buffers.

    Args:
        keys, values: of each layer [B * C, G, D].
        slot: int64 [B], the row of the current token.
        spans: int64 [B, 1, 2], rows that it reads, its own included.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], slot: Tensor, spans: Tensor
    ) -> None:
        self.keys, self.values, self.slot, self.spans = keys, values, slot, spans

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """1, because there is a past. Its length is known on the device only."""
        return 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int) -> Tensor:
        """Write keys and values [B, 1, G, D] of a token, and attend with q [B, 1, H, D]."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(0, self.slot, k[:, 0])
        values.index_copy_(0, self.slot, v[:, 0])
        read = ops.attend_spans(q, keys, values, self.spans)
        assert isinstance(read, Tensor)
        return read


class DecodeStep:
    """Static buffers of one kind, and the step over them.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        kind: sizes of the buffers.

    Attributes:
        logits: float32 [B, V] of the next token.
        token: int64 [B, 1], the last chosen token, input of the next step.
        unfinished: bool [B], prompts whose answer continues.
        report: int64 [B + 2]: the chosen tokens, whether any answer continues, whether the
            probabilities were free of NaN.
    """

    def __init__(self, model: GeneratingModel, kind: StepKind) -> None:
        self.model, self.kind = model, kind
        B, C, device = kind.rows, kind.capacity, kind.device
        self._records: dict[bool, Callable[[], object]] = {}
        self.arena = None if kind.memory is None else MemoryArena(kind.memory)
        # Zeros, because values outside a span are multiplied with zero where rows share a block.
        shape = (2, kind.layers, B, C, kind.heads, kind.head_dim)
        self.buffers = torch.zeros(shape, dtype=kind.dtype, device=device)
        self.logits = torch.zeros(B, kind.vocabulary, device=device)
        self.token = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.unfinished = torch.ones(B, dtype=torch.bool, device=device)
        self.report = torch.ones(B + 2, dtype=torch.int64, device=device)
        self.ends = torch.full((MAX_ENDS,), -1, dtype=torch.int64, device=device)
        self.pad = torch.zeros(1, dtype=torch.int64, device=device)
        self.pads = torch.zeros(1, dtype=torch.bool, device=device)
        self._first = C * torch.arange(B, device=device)  # row of each prompt's first token
        self.counters = torch.zeros(B, 6, dtype=torch.int64, device=device)
        self._advance = torch.ones(6, dtype=torch.int64, device=device)
        self._advance[START] = 0
        flat = self.buffers.flatten(2, 3)  # [2, layers, B * C, G, D]
        self._cache = StepCache(
            list(flat[0].unbind(0)),
            list(flat[1].unbind(0)),
            self.counters[:, SLOT],
            self.counters[:, None, START:],
        )

    def prepare(self, chooses: bool) -> bool:
        """Capture the step if it is not captured yet, which clears the buffers.

        Args:
            chooses: whether the step itself takes the most likely token.

        Returns:
            Whether it was captured now.
        """
        if chooses in self._records:
            return False
        self.counters.zero_()
        self._place(0, self.counters[:, 0])
        if self.arena is not None:
            self.arena.memory.spans.zero_()  # type: ignore[union-attr]
        self._records[chooses] = ops.capture(lambda: self._step(chooses), self.kind.device)
        return True

    def begin(
        self,
        cache: Any,
        held: int,
        start: Tensor,
        position: Tensor,
        query: Tensor,
        count: Tensor,
    ) -> None:
        """Copy a prompt into the buffers.

        Args:
            cache: KV cache of transformers.
            held: tokens that it holds.
            start: int64 [B], padding tokens before each prompt.
            position, query: int64 [B], position of the first new token, for the self-attention and
                for the image memory.
            count: int64 [B], tokens of each prompt, the new one included.
        """
        for i, layer in enumerate(cache.layers):
            self.buffers[0, i, :, :held].copy_(layer.keys[:, :, :held].transpose(1, 2))
            self.buffers[1, i, :, :held].copy_(layer.values[:, :, :held].transpose(1, 2))
        self.buffers[1, :, :, held:].zero_()
        for column, value in ((POSITION, position), (QUERY, query), (COUNT, count)):
            self.counters[:, column] = value
        self._place(held, start)

    def _place(self, held: int, start: Tensor) -> None:
        self.counters[:, START] = self._first + start
        self.counters[:, SLOT] = self._first + held
        self.counters[:, END] = self._first + held + 1

    def adopt(self, other: "DecodeStep", held: int) -> None:
        """Continue from another step with smaller buffers, which hold `held` tokens."""
        self.buffers[:, :, :, :held].copy_(other.buffers[:, :, :, :held])
        self.buffers[1, :, :, held:].zero_()
        for name in ("logits", "token", "unfinished", "report", "ends", "pad", "pads", "counters"):
            getattr(self, name).copy_(getattr(other, name))
        self._place(held, other.counters[:, START] - other._first)
        if self.arena is not None and other.arena is not None:
            self.arena.adopt(other.arena)

    def give(self, cache: Any, first: int, last: int) -> None:
        """Append tokens first to last to a KV cache of transformers."""
        if first == last:
            return
        for i in range(self.kind.layers):
            keys, values = self.buffers[:, i, :, first:last].transpose(2, 3)
            cache.update(keys, values, i)

    def run(self, chooses: bool) -> None:
        """Read `token`; write the logits of the next one, and that token if the step chooses."""
        self._records[chooses]()

    def choose(self) -> None:
        """Take the most likely token."""
        self.take(self.logits.argmax(-1))

    def take(self, chosen: Tensor) -> None:
        """Take a token [B] for each prompt, padding for answers that have ended."""
        chosen = torch.where(self.unfinished | ~self.pads, chosen, self.pad)
        self.token.copy_(chosen[:, None])
        self.stop((chosen[:, None] == self.ends).any(1))
        self.report[: len(chosen)].copy_(chosen)

    def stop(self, done: Tensor) -> None:
        """End the answers where `done` [B] is True."""
        self.unfinished.logical_and_(~done)
        self.report[-2].copy_(self.unfinished.any())

    def _step(self, chooses: bool) -> None:
        column = self.counters
        memory = None if self.arena is None else self.arena.memory
        output = self.model(
            input_ids=self.token,
            position_ids=column[:, POSITION : POSITION + 1],
            query_position_ids=column[:, QUERY : QUERY + 1],
            token_counts=column[:, COUNT],
            cache=self._cache,
            image_memory=memory,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        self.logits.copy_(output.logits[:, -1])
        if chooses:
            self.choose()
        column.add_(self._advance)
