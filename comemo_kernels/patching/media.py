"""What was computed from a tensor of image features, kept as long as that tensor lives."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

Result = TypeVar("Result")

_kept: Any = WeakTensorKeyDictionary()  # media -> owner -> (state, result)
_lock = threading.Lock()


class _State(NamedTuple):
    """Changes when a tensor is written or gets other storage, or when results get another kind.

    Results of the inference mode cannot be used for gradients; autocast changes their dtype. The
    weak references keep addresses of storages from being used again, not their memory. A write
    through `.data` changes nothing here.
    """

    inference: bool
    autocast: torch.dtype | None
    tensors: tuple[tuple[Any, int, int], ...]  # storage, offset, version; no version: inference

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "_State":
        kind = tensors[0].device.type
        return cls(
            torch.is_inference_mode_enabled(),
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            tuple(
                (
                    StorageWeakRef(t.untyped_storage()),
                    t.storage_offset(),
                    -1 if t.is_inference() else t._version,
                )
                for t in tensors
            ),
        )


def keep_while_alive(
    media: Tensor,
    owner: object,
    weights: Sequence[Tensor] | None,
    compute: Callable[[], Result],
) -> Result:
    """The result of `compute()`, computed again only if media or weights changed.

    It is dropped together with `media`, so it must not refer to it. Where gradients are needed or
    torch.compile traces, nothing is kept. Changes through `.data` are not noticed.

    Args:
        media: the tensor that identifies the images.
        owner: what the result belongs to, a module or a function.
        weights: what the result depends on beside media; None if that is not known, for example
            because of an adapter: then nothing is kept, and what was kept is dropped.
        compute: without arguments.
    """
    if torch.compiler.is_compiling():
        return compute()
    if weights is None:
        with _lock:
            _kept.get(media, {}).pop(owner, None)
        return compute()
    tensors = (media, *weights)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return compute()
    state = _State.of(tensors)
    with _lock:
        known = _kept.get(media)
        found = None if known is None else known.get(owner)
    if found is not None and found[0] == state:
        return found[1]
    result = compute()
    with _lock:
        _kept.setdefault(media, WeakKeyDictionary())[owner] = (state, result)
    return result
