"""What was computed from a tensor of image features, kept as long as that tensor lives."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Result = TypeVar("Result")

_kept: Any = WeakTensorKeyDictionary()  # media -> owner -> (state, result)
_lock = threading.Lock()


def _state(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Changes when a tensor is written or gets other storage; inference tensors have no counter."""
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)


def keep_while_alive(
    media: Tensor, owner: object, weights: Sequence[Tensor], compute: Callable[[], Result]
) -> Result:
    """The result of `compute()`, computed again only if media or weights changed.

    It is dropped together with `media`, so it must not refer to it. Where gradients are needed or
    torch.compile traces, nothing is kept.

    Args:
        media: the tensor that identifies the images.
        owner: what the result belongs to, a module or a function.
        weights: what the result depends on beside media.
        compute: without arguments.
    """
    tensors = (media, *weights)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if learns or torch.compiler.is_compiling():
        return compute()
    state = _state(tensors)
    with _lock:
        known = _kept.get(media)
        found = None if known is None else known.get(owner)
    if found is not None and found[0] == state:
        return found[1]
    result = compute()
    with _lock:
        _kept.setdefault(media, WeakKeyDictionary())[owner] = (state, result)
    return result
