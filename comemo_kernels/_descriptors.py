"""Tensor descriptors (TMA) that a kernel makes itself: whether there are any, and their memory.

A kernel that makes descriptors needs a little memory for each program, for which Triton asks an
allocator that its user sets. A launch brings its own, and leaves the user's as it was.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# From triton 3.4 on; some of AMD's chips have the capability 9.0 as well.
AVAILABLE = hasattr(tl, "make_tensor_descriptor") and torch.version.hip is None


@contextlib.contextmanager
def allocated() -> Iterator[None]:
    """Launches within the block take memory for descriptors from PyTorch, of the current device."""
    previous = _allocator()
    triton.set_allocator(_allocate)
    try:
        yield
    finally:
        triton.set_allocator(previous)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _allocator() -> Any:
    """Triton's allocator, which may be the user's: from 3.6 on a variable of the context."""
    from triton.runtime import _allocation

    held = _allocation._allocator
    return held.get() if isinstance(held, contextvars.ContextVar) else held
