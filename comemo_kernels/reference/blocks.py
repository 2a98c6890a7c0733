"""Passes over large tensors by blocks of tokens, whose intermediate results stay in the cache.

On a CPU memory that is new to the process costs more than the arithmetic: the system clears each
page. A block's memory is used again by the next block.
"""

from collections.abc import Iterator

from torch import Tensor

from comemo_kernels._writes import may_overwrite, needs_gradient

ELEMENTS = 2**20  # of a block


def blocks(x: Tensor, dim: int, *others: Tensor | None) -> Iterator[slice] | None:
    """Slices of dimension `dim` of x; None where the whole is small, recorded or transformed.

    Args:
        x: what is passed over.
        dim: negative, because tensors that are broadcast with x may have fewer dimensions.
        others: further tensors of the pass, which may require gradients.
    """
    if x.device.type != "cpu" or not may_overwrite() or x.numel() < 2 * ELEMENTS:
        return None
    if needs_gradient(x, *others):
        return None
    length = x.shape[dim]
    size = max(ELEMENTS * length // x.numel(), 1)
    return (slice(start, start + size) for start in range(0, length, size))
