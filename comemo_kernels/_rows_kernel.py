"""Fused RMSNorm + linear, SwiGLU and gated residual, for the few rows of a decode step.

    norm_linear     y weight^T                               y = rmsnorm(x) * norm_weight
    norm_swiglu     silu(y gate_weight^T) * (y up_weight^T)
    gated_residual  x + tanh(gate) * (a weight^T)

Up to 16 rows are one block of a matrix instruction, and a weight is read once whatever their
number. All three are one kernel, whose time is that of reading the weights.
Without norm_weight (folded) the rows are multiplied unscaled, their squares are summed on the way,
and the products are scaled at the end: nothing waits for the norm. Without gate the product is
added whole.
Traffic: O * K elements of each weight, once. Rows are K + O elements each (gated_residual K + 2 O)
and come from L2: every program reads the K, with a norm_weight twice. In bfloat16, with the 2B
model's d = 2048 and F = 8192: norm_linear d -> d 8.4 MB (a joined q, k, v of the self-attention
16.8 MB), norm_swiglu 67.1 MB, gated_residual 8.4 MB of the attention and 33.6 MB of the
feed-forward network; 117 MB a mixin layer.
FLOPs: 2 * R * O * K for each weight; the matrix instructions execute 16 / R times as many.
Each output is summed by one program in one order: no atomics, no workspace.
Source: CoMemo (arXiv:2506.06279); the norm is that of Llama.

Letters: R rows, K elements of the reduction, O outputs of a row.
"""

import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels._blocks import offset_of, tanh
from comemo_kernels._op import Kernel, register

ROWS = 16  # of one matrix instruction: more rows would multiply a weight more than once

# --- kernel ---


@triton.jit
def _load(ptrs, mask, EVEN: tl.constexpr):
    return tl.load(ptrs) if EVEN else tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _add_product(acc, x, w):
    """acc + x w^T for blocks x [R, K] and w [O, K], K a multiple of 32.

    In float32 a thread sums all products of an output one after another. So 32 at a time are
    summed apart: as few roundings as PyTorch's sums have.
    """
    if w.dtype == tl.float32:
        PARTS: tl.constexpr = w.shape[1] // 32
        x = tl.permute(tl.reshape(x, [x.shape[0], PARTS, 32]), [1, 0, 2])
        w = tl.permute(tl.reshape(w, [w.shape[0], PARTS, 32]), [1, 2, 0])
        acc += tl.sum(tl.dot(x, w, input_precision="ieee"), 0)
    else:
        acc = tl.dot(x, w.T, acc)
    return acc


@triton.jit
def _sum_of_squares(x_ptrs, mask_r, num_inner, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[R] float32: sums of squares of the rows that begin at `x_ptrs` [R, 1]."""
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    squares = tl.zeros([x_ptrs.shape[0], BLOCK_K], tl.float32)
    # Four blocks in flight: a program reads its weight only after the last one came from L2.
    for start in tl.range(0, num_inner, BLOCK_K, loop_unroll_factor=4):
        mask = mask_r if EVEN else mask_r & (offs_k < num_inner - start)
        x = tl.load(x_ptrs + (start + offs_k), mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    return tl.sum(squares, axis=1)


STRIDES = ["x_stride_r", "weight_stride_o", "up_stride_o", "residual_stride_r"]
SIZES = ["num_rows", "num_outputs", "num_inner"]


@triton.jit(do_not_specialize=["gate_ptr", *STRIDES, *SIZES, "eps"])
def _rows_kernel(
    out_ptr,  # [R, O], contiguous
    x_ptr,  # [R, K], K contiguous
    norm_ptr,  # [K]
    weight_ptr,  # [O, K], K contiguous
    up_ptr,  # [O, K], K contiguous
    residual_ptr,  # [R, O], O contiguous
    gate_ptr,  # [1]
    x_stride_r: tl.int64,
    weight_stride_o: tl.int64,
    up_stride_o: tl.int64,
    residual_stride_r: tl.int64,
    num_rows,  # R
    num_outputs,  # O
    num_inner,  # K
    eps,
    NORM: tl.constexpr,  # rows are normalised
    WEIGHTED: tl.constexpr,  # and then multiplied by norm
    SWIGLU: tl.constexpr,  # a second weight, and silu(first) * second
    RESIDUAL: tl.constexpr,  # residual + product
    GATED: tl.constexpr,  # residual + tanh(gate) * product
    ALIGNED: tl.constexpr,  # strides and K are multiples of 8
    EVEN: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,  # of a row, in each step, at most
):
    """One program computes BLOCK_O outputs of all rows."""
    # Of two weights in float32 one part of `_add_product` a step: more would spill registers.
    PARTED: tl.constexpr = SWIGLU and weight_ptr.dtype.element_ty == tl.float32
    BLOCK_K: tl.constexpr = (
        32 if PARTED else BLOCK_BYTES * 8 // weight_ptr.dtype.element_ty.primitive_bitwidth
    )
    WIDE: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth  # of one access
    offs_r, offs_k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    offs_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    if ALIGNED:  # unchanged; the compiler learns that masks are of 8 elements
        num_inner = num_inner // 8 * 8
    mask_r = (offs_r < num_rows)[:, None]
    x_ptrs = x_ptr + offset_of(offs_r, x_stride_r, ALIGNED)[:, None]
    # Rows after the last one read the last one: no mask on the loads that count.
    row = tl.minimum(offs_o, num_outputs - 1)
    weight_ptrs = weight_ptr + offset_of(row, weight_stride_o, ALIGNED)[:, None]
    up_ptrs = up_ptr + offset_of(row, up_stride_o, ALIGNED)[:, None]

    if WEIGHTED:
        total = _sum_of_squares(x_ptrs, mask_r, num_inner, EVEN, BLOCK_K)
        scale = tl.rsqrt(total / num_inner.to(tl.float32) + eps)[:, None]
    squares = tl.zeros([BLOCK_R, BLOCK_K // WIDE], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    up = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    for start in range(0, num_inner, BLOCK_K):
        offs = (start + offs_k)[None, :]
        mask_k = (offs_k < num_inner - start)[None, :]
        x = tl.load(x_ptrs + offs, mask=mask_r if EVEN else mask_r & mask_k, other=0.0)
        if WEIGHTED:
            norm = tl.load(norm_ptr + offs) if EVEN else tl.load(norm_ptr + offs, mask_k, 0.0)
            x = (x.to(tl.float32) * scale).to(weight_ptr.dtype.element_ty).to(tl.float32)
            x = (x * norm.to(tl.float32)).to(weight_ptr.dtype.element_ty)
        w = _load(weight_ptrs + offs, mask_k, EVEN)
        acc = _add_product(acc, x, w)
        if SWIGLU:
            w = _load(up_ptrs + offs, mask_k, EVEN)
            up = _add_product(up, x, w)
        if NORM and not WEIGHTED:  # after the products: before them it would cost registers
            square = x.to(tl.float32) * x.to(tl.float32)
            squares += tl.sum(tl.reshape(square, [BLOCK_R, BLOCK_K // WIDE, WIDE]), 2)

    mask = mask_r & (offs_o < num_outputs)[None, :]
    if NORM and not WEIGHTED:
        scale = tl.rsqrt(tl.sum(squares, 1) / num_inner.to(tl.float32) + eps)[:, None]
        acc, up = acc * scale, up * scale
    if SWIGLU:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    if RESIDUAL:
        residual = residual_ptr + offset_of(offs_r, residual_stride_r, ALIGNED)[:, None]
        if GATED:
            acc *= tanh(tl.load(gate_ptr).to(tl.float32))
        acc += tl.load(residual + offs_o[None, :], mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + offs_r.to(tl.int64)[:, None] * num_outputs + offs_o[None, :]
    tl.store(out_ptrs, acc.to(weight_ptr.dtype.element_ty), mask=mask)


# Few outputs a program: every multiprocessor has one, and all run at once. What counts then is how
# many bytes of a weight are in flight on each, about 20 KiB on an H100. Of two weights, with four
# times as many outputs, 32 at a time are 256 programs.
one_weight_kernel = Kernel(
    _rows_kernel,
    [
        {"BLOCK_O": o, "BLOCK_BYTES": size, "num_warps": warps, "num_stages": stages}
        for o, size, warps, stages in (
            # Every warp reads all rows from shared memory, and two cover 16 outputs.
            (16, 512, 2, 5),
            # Faster with a norm of 2,048 elements, slower without.
            (32, 512, 4, 4),
        )
    ],
)
two_weights_kernel = Kernel(
    _rows_kernel,
    [
        {"BLOCK_O": o, "BLOCK_BYTES": size, "num_warps": warps, "num_stages": stages}
        for o, size, warps, stages in (
            (32, 256, 4, 4),
            (16, 512, 2, 4),
            (32, 512, 4, 3),
            (64, 256, 8, 3),
        )
    ],
)

# --- operator ---


def _launch(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    up_weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float | None,  # None: no norm
) -> Tensor:
    """x [R, K], weights [O, K] and residual [R, O]; their last dimensions are contiguous."""
    out = _fake(x, norm_weight, weight)
    kernel = one_weight_kernel if up_weight is None else two_weights_kernel
    (R, K), outputs, config = x.shape, weight.shape[0], kernel.config
    norm, up, added = (x if t is None else t for t in (norm_weight, up_weight, residual))
    tensors = (out, x, norm, weight, up, added, x if gate is None else gate)
    strides = (x.stride(0), weight.stride(0), up.stride(0), added.stride(0))
    constants = (
        eps is not None,  # NORM
        norm_weight is not None,  # WEIGHTED
        up_weight is not None,  # SWIGLU
        residual is not None,  # RESIDUAL
        gate is not None,  # GATED
        all(n % 8 == 0 for n in (*strides, K)),  # ALIGNED
        K * x.element_size() % config["BLOCK_BYTES"] == 0,  # EVEN
        ROWS,
    )
    programs = -(-outputs // config["BLOCK_O"]) if R else 0
    kernel.launch(programs, *tensors, *strides, R, outputs, K, eps or 0.0, *constants)
    return out


def _fake(x: Tensor, _: Tensor | None, weight: Tensor, *__: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


rows_op = register(
    "rows(Tensor x, Tensor? norm_weight, Tensor weight, Tensor? up_weight, Tensor? residual,"
    " Tensor? gate, float? eps) -> Tensor",
    _launch,
    _fake,
)
