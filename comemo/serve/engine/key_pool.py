"""The KV cache of all requests: one buffer for each layer, a segment for each answer.

Letters: C tokens that the buffers hold, G key heads, D head dimension.
"""

from collections.abc import Iterable

from torch import Tensor

import comemo_kernels as ops
from comemo.decode.cache import RoomyCache
from comemo.decode.interface import GeneratingModel
from comemo.serve.engine.segments import Segment, Segments


def bytes_per_token(model: GeneratingModel) -> int:
    """Bytes of the keys and values of one token in all layers."""
    text = model.config.text_config
    heads, width = text.num_key_value_heads, text.head_dim
    return 2 * text.num_hidden_layers * heads * width * model.dtype.itemsize


class KeyPool:
    """Keys and values of self-attention, allocated once.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        capacity: C.

    Attributes:
        keys, values: of each layer [C, G, D], in the layout of an image memory.
        segments: which of the C places are taken.
    """

    def __init__(self, model: GeneratingModel, capacity: int) -> None:
        text = model.config.text_config
        held = ops.memory_buffers(
            text.num_hidden_layers,
            capacity,
            text.num_key_value_heads,
            text.head_dim,
            model.dtype,
            model.device,
            zeros=True,
        )
        self.keys, self.values = list(held[0].unbind(0)), list(held[1].unbind(0))
        self.segments = Segments(capacity)

    def cache(self, segment: Segment, length: int) -> RoomyCache:
        """A KV cache over a segment that holds `length` tokens; it writes into the segment."""
        buffers = [
            (self._view(keys, segment), self._view(values, segment))
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
        return RoomyCache.over(buffers, length)

    def copy(self, source: Segment, target: Segment, length: int) -> None:
        """Copy the first `length` tokens of a segment into another one."""
        for held in (*self.keys, *self.values):
            first = held[source.start : source.start + length]
            held[target.start : target.start + length].copy_(first)

    def close_holes(self, segments: Iterable[Segment]) -> None:
        """Make one hole of all free places; see `Segments.close_holes`."""
        self.segments.close_holes(segments, (*self.keys, *self.values))

    def clear(self, segment: Segment) -> None:
        """Overwrite a segment, which may hold NaN."""
        for held in (*self.keys, *self.values):
            held[segment.start : segment.end].zero_()

    @staticmethod
    def _view(held: Tensor, segment: Segment) -> Tensor:
        """[1, G, n, D] of a segment."""
        return held[segment.start : segment.end].transpose(0, 1)[None]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(held.nbytes for held in (*self.keys, *self.values))
