"""Gradient of Llama's RMSNorm, of x and of the weight in one pass.

    n = x rstd;  dn = dy weight;  dx = (dn - n mean(dn n)) rstd + added;  dweight = sum(dy n)

rstd is computed again, because a row fits in registers. `added` is the gradient of x by the
residual: its sum with dx would be a pass of its own.
Traffic: dy, x and added read, dx written, once. Each program sums dweight over its rows; then the
sums are summed over programs: no atomics.
Source: the norm is that of Llama.

Letters: R rows, d elements of a row.
"""

import torch
import triton.language as tl
from torch import Tensor

from comemo_kernels._blocks import offset_of
from comemo_kernels._op import Kernel, jit, multiprocessors, padded, register

# --- kernel ---


@jit
def _rms_norm_gradient_kernel(
    dx_ptr,  # [R, d], contiguous
    dweight_ptr,  # [programs, d] float32
    dy_ptr,  # [R, d], contiguous
    x_ptr,  # [R, d], d contiguous
    weight_ptr,  # [d]
    added_ptr,  # [R, d], d contiguous
    x_stride_r: tl.int64,
    added_stride_r: tl.int64,
    width,  # d
    num_rows,  # R
    programs,
    eps,
    TO_X: tl.constexpr,  # write dx
    TO_WEIGHT: tl.constexpr,  # write dweight
    WEIGHTED: tl.constexpr,  # there is a weight
    ADDED: tl.constexpr,  # there is something to add to dx
    ALIGNED: tl.constexpr,  # strides and d are multiples of 8
    EARLY: tl.constexpr,  # load what is added before the sums, for more registers
    BLOCK: tl.constexpr,  # d, rounded up to a power of two
):
    """One program takes every `programs`-th row, and sums the gradient of the weight."""
    pid, c = tl.program_id(0), tl.arange(0, BLOCK)
    if ALIGNED:  # unchanged; the compiler learns that masks are of 8 elements
        width = width // 8 * 8
    mask = c < width
    dweight = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.cdiv(num_rows - pid, programs)):
        row = pid + i * programs
        out = offset_of(row, width, ALIGNED) + c
        x = tl.load(x_ptr + offset_of(row, x_stride_r, ALIGNED) + c, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + out, mask=mask, other=0.0).to(tl.float32)
        added_ptrs = added_ptr + offset_of(row, added_stride_r, ALIGNED) + c
        if (TO_X and ADDED) and EARLY:
            added = tl.load(added_ptrs, mask=mask, other=0.0).to(tl.float32)
        exact = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(exact * exact, 0) / width.to(tl.float32) + eps)
        exact *= rstd
        if TO_WEIGHT:
            dweight += dy * exact.to(x.dtype).to(tl.float32)
        if TO_X:
            if WEIGHTED:
                # Loaded again for each row, from the nearest cache, to save registers.
                dy *= tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
            dx = (dy - exact * (tl.sum(dy * exact, 0) / width.to(tl.float32))) * rstd
            if ADDED and EARLY:
                dx += added
            elif ADDED:
                dx += tl.load(added_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if TO_WEIGHT:
        tl.store(dweight_ptr + offset_of(pid, width, ALIGNED) + c, dweight, mask=mask)


# A program holds a row: 16 elements a thread up to NARROW and WIDE elements, 32 up to WIDEST. There
# x and the weight get a pass each, because both at once would spill hundreds of bytes a thread; in
# float32 x alone spills up to 48. Wider rows have no kernel.
NARROW, WIDE, WIDEST = 2048, 8192, 16384
rms_norm_gradient = Kernel(_rms_norm_gradient_kernel, [{"num_warps": 4}, {"num_warps": 8}])
rms_norm_gradient_wide = Kernel(_rms_norm_gradient_kernel, [{"num_warps": 8}, {"num_warps": 16}])
rms_norm_gradient_widest = Kernel(_rms_norm_gradient_kernel, [{"num_warps": 16}])

# --- operator ---


def _launch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    added: Tensor | None,
    eps: float,
    to_x: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    """All [R, d], with d contiguous; dy is contiguous."""
    R, d = x.shape
    kernel, resident, passes = rms_norm_gradient, 4, [(to_x, to_weight)]
    if d > NARROW:
        kernel, resident = rms_norm_gradient_wide, 2
    if d > WIDE:
        kernel, resident = rms_norm_gradient_widest, 1
        passes = [flags for flags in ((to_x, False), (False, to_weight)) if any(flags)]
    # All run at once, and each writes a row of sums that is read again.
    programs = min(R, resident * multiprocessors(x.get_device()))
    dx = x.new_empty(R if to_x else 0, d)
    sums = x.new_empty(programs if to_weight else 0, d, dtype=torch.float32)
    given, plus = (x if t is None else t for t in (weight, added))
    tensors, strides = (dx, sums, dy, x, given, plus), (x.stride(0), plus.stride(0))
    constants = (
        weight is not None,  # WEIGHTED
        added is not None,  # ADDED
        all(n % 8 == 0 for n in (*strides, d)),  # ALIGNED
        d <= WIDE,  # EARLY
        padded(d),  # BLOCK
    )
    for flags in passes:
        kernel.launch(programs, *tensors, *strides, d, R, programs, eps, *flags, *constants)
    return dx, sums.sum(0).to(given.dtype) if to_weight else x.new_empty(0)


def _fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    added: Tensor | None,
    eps: float,
    to_x: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    R, d = x.shape
    summed = x if weight is None or not to_weight else weight
    return x.new_empty(R if to_x else 0, d), summed.new_empty(d if to_weight else 0)


rms_norm_gradient_op = register(
    "rms_norm_gradient(Tensor dy, Tensor x, Tensor? weight, Tensor? added, float eps, bool to_x,"
    " bool to_weight) -> (Tensor, Tensor)",
    _launch,
    _fake,
)
