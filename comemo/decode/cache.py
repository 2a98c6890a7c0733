"""The cache of the self-attention: keys and values of all tokens so far, with room for more.

transformers' dynamic cache copies all that it holds for every token. This one writes behind it.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens that a layer grows by, at least
ROOM_FOR_ANSWER = 1024  # tokens, at most, that callers reserve ahead


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, at the front of buffers [B, G, C, D] that hold C tokens.

    What transformers does to a dynamic layer it can do to this one: `keys` and `values`
    [B, G, N, D] are views of the buffers, and where something replaced them (beams that are
    reordered) the next `update` moves them into new buffers. There are as many tokens as there
    are keys: of values there may be more, where something interrupted.

    Args:
        capacity: C of the first buffers, at least; more tokens take larger ones.
    """

    def __init__(self, capacity: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.capacity = capacity
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put keys and values [B, G, n, D] behind the others; [B, G, N + n, D] of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        held = self._buffers_for(key_states, value_states, start, end)
        for buffer, new in zip(held, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        keys, values = (buffer[:, :, :end] for buffer in held)
        self.values = values  # before the keys, which say how many there are
        self.keys = keys
        return keys, values

    def _buffers_for(
        self, keys: Tensor, values: Tensor, start: int, end: int
    ) -> tuple[Tensor, Tensor]:
        held = self.buffers
        if held is not None and start and self.keys.data_ptr() != held[0].data_ptr():
            held = None  # somebody replaced the views
        if held is not None and held[0].shape[0] == keys.shape[0] and end <= held[0].shape[2]:
            return held
        room = max(ROOM, min(end // 8, 16 * ROOM))
        capacity = self.capacity if end <= self.capacity else end + room
        B, G, _, D = keys.shape
        made = (
            keys.new_empty(B, G, capacity, D),
            values.new_empty(B, G, capacity, values.shape[3]),
        )
        if start:
            for buffer, old in zip(made, (self.keys, self.values), strict=True):
                buffer[:, :, :start] = old[:, :, :start]
        self.buffers = made
        return made

    def crop_to(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if self.get_seq_length():
            self.keys = self.keys[:, :, :length]
            self.values = self.values[:, :, :length]

    def reset(self) -> None:
        """Forget all tokens and keep the buffers."""
        self.crop_to(0)


class RoomyCache(DynamicCache):
    """A dynamic cache that copies nothing to grow, but where its room runs out.

    Args:
        layers: how many decoder layers there are.
        capacity: tokens to make room for at once, if known.
    """

    def __init__(self, layers: int, capacity: int = 0) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [RoomyLayer(capacity) for _ in range(layers)]

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens at once, the next time that there is not enough.

        Args:
            capacity: tokens in all.
        """
        for layer in self.layers:
            layer.capacity = max(layer.capacity, capacity)

    def crop_to(self, length: int) -> None:
        """Keep the first `length` tokens, also where a call that failed left layers of two lengths.

        Args:
            length: tokens, at most as many as every layer holds.
        """
        for layer in self.layers:
            layer.crop_to(length)

    def fork(self, length: int) -> "RoomyCache":
        """The first `length` tokens in buffers of their own."""
        other = RoomyCache(len(self.layers))
        if length:
            for mine, theirs in zip(self.layers, other.layers, strict=True):
                theirs.update(mine.keys[:, :, :length], mine.values[:, :, :length])
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room included."""
        held = [layer.buffers for layer in self.layers if layer.buffers is not None]
        return sum(keys.nbytes + values.nbytes for keys, values in held)
