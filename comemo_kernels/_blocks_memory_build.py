"""Block functions that the kernels of the memory build share."""

import triton
import triton.language as tl

from comemo_kernels._blocks import offset_of


@triton.jit
def pointer_to(address, like_ptr, ALIGNED: tl.constexpr):
    """An address as a pointer of the type of `like_ptr`; a multiple of 16 bytes, if ALIGNED."""
    pointer = address.to(like_ptr.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_rotation(
    table,  # cos_ptr and sin_ptr [P, HALF], the stride of their rows, P
    ids_ptr,  # [M] int32
    row,  # [rows]
    mask_m,  # [rows]
    element,  # [elements]
    mask_e,  # [elements]; None: all are within HALF
    ALIGNED: tl.constexpr,
):
    """cos and sin [rows, elements] float32 of each row's id; NaN where the table has no row."""
    cos_ptr, sin_ptr, stride, num_positions = table
    distance = tl.load(ids_ptr + row, mask=mask_m, other=0)
    at = tl.abs(distance)
    known = mask_m & (at >= 0) & (at < num_positions)  # abs of the lowest integer is negative
    known = known[:, None]
    if mask_e is not None:
        known &= mask_e[None, :]
    offs = offset_of(at, stride, ALIGNED)[:, None] + element[None, :]
    cos = tl.load(cos_ptr + offs, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + offs, mask=known, other=float("nan")).to(tl.float32)
    return cos, tl.where((distance < 0)[:, None], -sin, sin)


@triton.jit
def without_nan(x):
    """Zeros for NaN. The keys of such rows are NaN already; NaN values would reach other rows."""
    return tl.where(x == x, x, 0.0)
