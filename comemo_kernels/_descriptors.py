"""Tensor descriptors (TMA) created in a kernel: whether Triton has them, and their memory.

A kernel that creates descriptors needs a little memory for each program. Triton asks an allocator
for it, which the user may have set: a launch sets its own, and restores the user's afterwards.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# From triton 3.4 on; not on AMD, where some chips report capability 9.0 too.
AVAILABLE = hasattr(tl, "make_tensor_descriptor") and torch.version.hip is None


@contextlib.contextmanager
def allocated() -> Iterator[None]:
    """Launches in this block take memory for descriptors from PyTorch, on the current device."""
    previous = _allocator()
    triton.set_allocator(_allocate)
    try:
        yield
    finally:
        triton.set_allocator(previous)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _allocator() -> Any:
    """Triton's allocator, which may be the user's: a context variable from 3.6 on."""
    from triton.runtime import _allocation

    held = _allocation._allocator
    return held.get() if isinstance(held, contextvars.ContextVar) else held
