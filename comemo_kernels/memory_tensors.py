"""Tensors of an image memory: buffers for keys and values, and its rotary table."""

import functools
from typing import Any

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._op import INTERPRET, check, check_count
from comemo_kernels.reference import rotary_table

Table = tuple[Tensor, Tensor]


@public
def memory_buffers(
    layers: int,
    capacity: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    zeros: bool = False,
) -> Tensor:
    """Buffers for keys and values, in the layout that `attend_spans` reads fastest on a device.

    Args:
        layers, capacity, heads, head_dim: L, C, G and D.
        dtype, device: of the buffers.
        zeros: whether they hold zeros. Then a CPU provides memory for them only when they are
            written.

    Returns:
        [2, L, C, G, D], keys and values, uninitialised without `zeros`. On a GPU the heads of a
        token are contiguous, so that building writes contiguous memory. On a CPU the tokens of a
        head are: bfloat16 attention takes a third of the time.

    Raises:
        ValueError: a negative size, or more elements than 64-bit addresses allow.
    """
    counts = {"layers": layers, "capacity": capacity, "heads": heads, "head_dim": head_dim}
    for name, count in counts.items():
        check_count("memory_buffers", name, count)
    check(
        layers * capacity * heads * head_dim < 2**58,  # math.prod cannot be traced
        f"memory_buffers: keys and values must fit 64-bit addresses, got {counts}",
    )
    make = torch.zeros if zeros else torch.empty
    if torch.device(device).type == "cpu" and not INTERPRET:
        shape = (2, layers, heads, capacity, head_dim)
        return make(shape, dtype=dtype, device=device).transpose(2, 3)
    return make(2, layers, capacity, heads, head_dim, dtype=dtype, device=device)


@public
def distance_table(head_dim: int, theta: float, length: int, device: torch.device | str) -> Table:
    """cos, sin float32 [`length`, D/2] by distance of ids, for `ImageMemory`.

    Args:
        head_dim: D.
        theta: base of the angles.
        length: P, the number of distances from 0 on.
        device: of the table.

    Returns:
        The same tensors for the same arguments: do not write to them.

    Raises:
        ValueError: a head_dim that is odd or below 2, a theta that is not positive, no length.
    """
    if torch.compiler.is_compiling():
        return _distance_table(head_dim, theta, length, device)
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:  # the current one, which may change
        device = torch.device("cuda", torch.cuda.current_device())
    return _known_table(head_dim, theta, length, device)


def _distance_table(head_dim: int, theta: float, length: int, device: torch.device) -> Table:
    check_count("distance_table", "length", length, 1)
    cos, sin = rotary_table(torch.arange(length, device=device)[None], head_dim, theta)
    return cos[0], sin[0]


@functools.lru_cache(maxsize=4)
def _known_table(*args: Any) -> Table:
    with torch.inference_mode(False), torch.no_grad():  # usable in every mode
        return _distance_table(*args)
