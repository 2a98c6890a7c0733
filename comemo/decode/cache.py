"""The KV cache: keys and values of all tokens so far in buffers with room for more.

transformers' dynamic cache copies everything it holds for each new token. This one appends in
place.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens; a layer grows by at least as many
ROOM_FOR_ANSWER = 1024  # tokens; callers reserve at most as many ahead


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, at the front of buffers [B, G, C, D] that hold C tokens.

    It can be used like transformers' dynamic layer: `keys` and `values` [B, G, N, D] are views of
    the buffers. If something replaced them (reordered beams), the next `update` copies them into
    new buffers. The number of keys is the number of tokens; an interrupted update may leave more
    values than keys.

    Args:
        capacity: least C of the first buffers; more tokens allocate larger ones.
    """

    def __init__(self, capacity: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.capacity = capacity
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, G, n, D]; returns all, [B, G, N + n, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        held = self._buffers_for(key_states, value_states, start, end)
        for buffer, new in zip(held, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        keys, values = (buffer[:, :, :end] for buffer in held)
        self.values = values  # before the keys, which define the number of tokens
        self.keys = keys
        return keys, values

    def adopt(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Use buffers [B, G, C, D] that hold `length` tokens."""
        self.lazy_initialization(keys, values)
        self.capacity, self.buffers = keys.shape[2], (keys, values)
        self.values, self.keys = values[:, :, :length], keys[:, :, :length]

    def _buffers_for(
        self, keys: Tensor, values: Tensor, start: int, end: int
    ) -> tuple[Tensor, Tensor]:
        held = self.buffers
        if held is not None and start and self.keys.data_ptr() != held[0].data_ptr():
            held = None  # the views were replaced
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
        """Drop all tokens and keep the buffers."""
        self.crop_to(0)


class RoomyCache(DynamicCache):
    """A dynamic cache that copies nothing to grow, except when its room runs out.

    Args:
        layers: number of decoder layers.
        capacity: tokens to allocate at once, if known.
    """

    def __init__(self, layers: int, capacity: int = 0) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [RoomyLayer(capacity) for _ in range(layers)]

    def reserve(self, capacity: int) -> None:
        """Set the capacity of the next allocation.

        Args:
            capacity: tokens in all.
        """
        for layer in self.layers:
            layer.capacity = max(layer.capacity, capacity)

    def crop_to(self, length: int) -> None:
        """Keep the first `length` tokens, even if a failed call left layers of two lengths.

        Args:
            length: tokens, at most as many as every layer holds.
        """
        for layer in self.layers:
            layer.crop_to(length)

    @classmethod
    def over(cls, buffers: Sequence[tuple[Tensor, Tensor]], length: int) -> "RoomyCache":
        """A cache in buffers of somebody else, which is filled there.

        Args:
            buffers: keys and values [B, G, C, D] of each layer. Beyond C tokens the cache
                allocates its own.
            length: tokens that they hold.
        """
        cache = cls(len(buffers))
        for layer, (keys, values) in zip(cache.layers, buffers, strict=True):
            layer.adopt(keys, values, length)
        return cache

    @classmethod
    def copy_of(cls, cache: Any, length: int) -> "RoomyCache":
        """The first `length` tokens of a cache with `layers`, in buffers of their own."""
        other = cls(len(cache.layers))
        if length:
            for theirs, ours in zip(cache.layers, other.layers, strict=True):
                ours.update(theirs.keys[:, :, :length], theirs.values[:, :, :length])
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room included."""
        held = [layer.buffers for layer in self.layers if layer.buffers is not None]
        return sum(keys.nbytes + values.nbytes for keys, values in held)
