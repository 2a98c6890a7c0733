"""One decode step of any answers over the pools, which a CUDA graph captures.

An answer is a row. Rows may read other pictures, the same picture or none: spans are the only mask.

Letters: B rows, R most rows, I images that rows read, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from comemo.decode.arena import IMAGES, capacity_for
from comemo.decode.interface import GeneratingModel
from comemo.decode.step import COUNT, END, POSITION, QUERY, SLOT, START, StepCache
from comemo.serve.engine.answer import Answer
from comemo.serve.engine.key_pool import KeyPool
from comemo.serve.engine.picture_pool import PicturePool, Shown


@dataclass(frozen=True)
class Reading:
    """What an answer reads of the image memory.

    Attributes:
        shown: the pictures of its prompt.
        images: how many of them, from the first on.
        positions: position id of the first token of each of them in the prompt.
    """

    shown: Shown
    images: int
    positions: tuple[int, ...]


class RaggedStep:
    """Static buffers for up to R rows, and the step over them.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        keys, pictures: the pools.
        most_rows: R.

    Attributes:
        logits: float32 [R, V] of the next tokens.
    """

    def __init__(
        self, model: GeneratingModel, keys: KeyPool, pictures: PicturePool, most_rows: int
    ) -> None:
        device = model.device
        self._model, self._keys, self._pictures = model, keys, pictures
        self.logits = torch.zeros(most_rows, model.config.text_config.vocab_size, device=device)
        self._token = torch.zeros(most_rows, 1, dtype=torch.int64, device=device)
        self._counters = torch.zeros(most_rows, 6, dtype=torch.int64, device=device)
        self._advance = torch.ones(6, dtype=torch.int64, device=device)
        self._advance[START] = 0
        self._spans = torch.zeros(most_rows, 1, 2, dtype=torch.int64, device=device)
        self._active = torch.zeros(most_rows, 1, 1, dtype=torch.bool, device=device)
        self._images: dict[int, tuple[Tensor, Tensor]] = {}  # starts [I], biases [R, I] by I
        self._records: dict[tuple[int, int], Callable[[], object]] = {}
        self._kind = (0, 0)  # B, and I or 0 if no row has images

    def place(self, answers: Sequence[Answer], readings: Sequence[Reading | None]) -> None:
        """Set the rows; whenever their number or one of them changes.

        Args:
            answers: B of them, whose last token is not in the KV cache yet.
            readings: what each reads of the image memory; None for nothing.
        """
        B = len(answers)
        rows = torch.zeros(B, 6, dtype=torch.int64)
        for row, answer in enumerate(answers):
            begin = answer.segment.start
            rows[row, POSITION], rows[row, QUERY] = answer.position, answer.query
            rows[row, COUNT], rows[row, SLOT] = answer.count, begin + answer.count - 1
            rows[row, START], rows[row, END] = begin, begin + answer.count
        self._counters[:B].copy_(rows)
        self._kind = B, self._place_images(readings)

    def run(self, tokens: Sequence[int]) -> Tensor:
        """Read the last token of each row; returns the logits [B, V] of the next ones."""
        B, _ = self._kind
        self._token[:B, 0].copy_(torch.tensor(tokens))
        if self._kind not in self._records:
            # Warm-ups write where the step will, and not after it: there may be another answer.
            self._advance.zero_()
            try:
                self._records[self._kind] = ops.capture(self._step, self._model.device)
            finally:
                self._advance.fill_(1)
                self._advance[START] = 0
        self._records[self._kind]()
        return self.logits[:B]

    def _place_images(self, readings: Sequence[Reading | None]) -> int:
        """Fill spans, starts and biases; returns I."""
        shown = {id(one.shown): one.shown for one in readings if one is not None}
        if not shown:
            return 0
        ordered = sorted(shown.values(), key=lambda one: one.segment.start)
        index: dict[int, int] = {}
        starts = [0] if ordered[0].segment.start else []  # nobody reads what is before the first
        for one in ordered:
            index[id(one)] = len(starts)
            ends = torch.tensor((0, *one.sizes)).cumsum(0)[:-1] + one.segment.start
            starts += ends.tolist()
        most = capacity_for(len(starts), IMAGES)
        # Starts of unused images: ascending, and after the memory, so that no token reaches them.
        beyond = self._pictures.segments.capacity
        padded = [*starts, *range(beyond, beyond + most - len(starts))]
        B = len(readings)
        biases, spans = torch.zeros(B, most, dtype=torch.int32), torch.zeros(B, 1, 2).long()
        active = torch.zeros(B, 1, 1, dtype=torch.bool)
        for row, reading in enumerate(readings):
            if reading is None:
                continue
            first, begin = index[id(reading.shown)], reading.shown.segment.start
            places = torch.tensor(reading.positions, dtype=torch.int32)
            biases[row, first : first + len(places)] = places
            spans[row, 0, 0] = begin
            spans[row, 0, 1] = begin + sum(reading.shown.sizes[: reading.images])
            active[row] = True
        held = self._buffers(most)
        held[0].copy_(torch.tensor(padded, dtype=torch.int32))
        held[1][:B].copy_(biases)
        self._spans[:B].copy_(spans)
        self._active[:B].copy_(active)
        return most

    def _buffers(self, images: int) -> tuple[Tensor, Tensor]:
        if images not in self._images:
            R, device = len(self._token), self._token.device
            starts = torch.zeros(images, dtype=torch.int32, device=device)
            self._images[images] = starts, torch.zeros(R, images, dtype=torch.int32, device=device)
        return self._images[images]

    @torch.no_grad()
    def _step(self) -> None:
        B, images = self._kind
        column = self._counters[:B]
        memory = None
        if images:
            starts, biases = self._images[images]
            memory = replace(
                self._pictures.memory,
                spans=self._spans[:B],
                active=self._active[:B],
                starts=starts,
                biases=biases[:B],
            )
        cache: Any = StepCache(
            self._keys.keys, self._keys.values, column[:, SLOT], column[:, None, START:]
        )
        output = self._model(
            input_ids=self._token[:B],
            position_ids=column[:, POSITION : POSITION + 1],
            query_position_ids=column[:, QUERY : QUERY + 1],
            token_counts=column[:, COUNT],
            cache=cache,
            image_memory=memory,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        self.logits[:B].copy_(output.logits[:, -1])
        column.add_(self._advance)
