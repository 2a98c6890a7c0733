"""A KV cache of tuples whose tensors grow without being copied for every token.

The published code concatenates keys and values of all tokens for each new one. Here a tensor may
be the beginning of a larger buffer, and its successor, one token longer, the same buffer's. Whoever
holds an older tensor keeps what it had: a buffer is written behind its last token alone.
"""

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Buffer:
    """Room [B, G, C, D], of which the first `used` tokens are written."""

    def __init__(self, data: Tensor, used: int) -> None:
        self.data, self.used = data, used

    def has_room(self, length: int, tokens: int) -> bool:
        """Whether `tokens` more can be written behind the first `length`."""
        free = self.used == length and self.data.shape[2] >= length + tokens
        return free and (torch.is_inference_mode_enabled() or not self.data.is_inference())


_lock = threading.Lock()
_buffers: Any = WeakTensorKeyDictionary()  # a tensor that was returned -> its buffer


def append(old: Tensor, new: Tensor) -> Tensor:
    """`torch.cat([old, new], dim=2)` of [B, G, M, D] and [B, G, N, D], mostly without a copy.

    Where gradients are needed or torch.compile traces, it is exactly that.
    """
    if (torch.is_grad_enabled() and (old.requires_grad or new.requires_grad)) or (
        torch.compiler.is_compiling()
    ):
        return torch.cat([old, new], dim=2)
    M, N = old.shape[2], new.shape[2]
    with _lock:  # of threads that go on from one tensor the first takes the rows behind it
        buffer = _buffers.get(old)
        if buffer is None or not buffer.has_room(M, N):
            buffer = None
        else:
            buffer.used = M + N
    if buffer is None:
        data = old.new_empty(*old.shape[:2], M + N + max(64, M // 8), old.shape[3])
        data[:, :, :M] = old
        buffer = _Buffer(data, M + N)
    buffer.data[:, :, M : M + N] = new
    grown = buffer.data[:, :, : M + N]
    with _lock:
        _buffers[grown] = buffer
    return grown
