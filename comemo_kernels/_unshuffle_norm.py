"""Pixel unshuffle of vision tokens and LayerNorm in one pass, and the gradient of both.

    x = norm(fold(tokens)) * weight + bias         fold: n x n neighbours into channels

Tokens are read in place, class token and strides included. Traffic: tokens once, x once; the
gradient reads both and the gradient of x, and writes that of tokens. Each program sums the
gradients of weight and bias over its rows; then they are summed over programs: no atomics.
Source: the projector of InternVL.

Letters: T tiles, C channels of a vision token, n fold, W = C*n*n, R rows of image tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels._blocks import offset_of
from comemo_kernels._op import Kernel, jit, multiprocessors, padded, register

# --- kernel ---


@triton.jit
def _raster_offset(
    row,  # an image token
    f,  # [F] index in its neighbourhood
    side,  # image tokens along the side of a tile
    stride_t,
    stride_s,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """[F, 1] offsets from the first token to those that are folded into an image token."""
    tile, place = row // (side * side), row % (side * side)
    if TRANSPOSED:
        i, j = place % side, place // side
    else:
        i, j = place // side, place % side
    token = 1 + (i * N + f // N) * (side * N) + j * N + f % N
    return (offset_of(tile, stride_t, ALIGNED) + offset_of(token, stride_s, ALIGNED))[:, None]


@jit
def _fold_norm_kernel(
    out_ptr,  # [R, W], contiguous
    stats_ptr,  # [R, 2] float32: mean, 1 / deviation
    x_ptr,  # [T, 1 + (side*n)**2, C], C contiguous
    weight_ptr,  # [W]
    bias_ptr,  # [W]
    stride_t: tl.int64,
    stride_s: tl.int64,
    side,
    channels,  # C
    eps,
    KEEP: tl.constexpr,  # write stats
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the raster of image tokens is transposed
    ALIGNED: tl.constexpr,  # strides and C are multiples of 8
    BLOCK_F: tl.constexpr,  # N*N and C, rounded up to powers of two
    BLOCK_C: tl.constexpr,
):
    """One program folds and normalises one image token."""
    row = tl.program_id(0)
    offs_f, c = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_C)[None, :]
    f = offs_f[:, None]
    if ALIGNED:  # unchanged; the compiler learns that masks are of 8 elements
        channels = channels // 8 * 8
    mask, width = (f < N * N) & (c < channels), N * N * channels
    offs = _raster_offset(row, offs_f, side, stride_t, stride_s, N, TRANSPOSED, ALIGNED) + c
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x, 1), 0) / width
    x = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(x * x, 1), 0) / width + eps)
    if KEEP:
        tl.store(stats_ptr + row * 2, mean)
        tl.store(stats_ptr + row * 2 + 1, rstd)
    offs = f * channels + c
    w = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = (x * rstd * w + b).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset_of(row, width, ALIGNED) + offs, y, mask=mask)


@jit
def _fold_norm_gradient_kernel(
    dx_ptr,  # [T, 1 + (side*n)**2, C], contiguous
    dweight_ptr,  # [programs, W] float32
    dbias_ptr,  # [programs, W] float32
    dy_ptr,  # [R, W], contiguous
    stats_ptr,  # [R, 2]
    x_ptr,
    weight_ptr,
    stride_t: tl.int64,
    stride_s: tl.int64,
    side,
    channels,
    num_rows,  # R
    programs,
    TOKENS: tl.constexpr,  # write dx
    NORM: tl.constexpr,  # write dweight and dbias
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program takes every `programs`-th image token, and sums gradients of weight and bias."""
    pid = tl.program_id(0)
    offs_f, c = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_C)[None, :]
    f = offs_f[:, None]
    if ALIGNED:
        channels = channels // 8 * 8
    mask, width = (f < N * N) & (c < channels), N * N * channels
    inside = f * channels + c
    dweight = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    tokens = side * side
    dx_stride = (tokens * N * N + 1) * channels  # of a tile
    for i in range(tl.cdiv(num_rows - pid, programs)):
        row = pid + i * programs
        offs = _raster_offset(row, offs_f, side, stride_t, stride_s, N, TRANSPOSED, ALIGNED) + c
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset_of(row, width, ALIGNED) + inside, mask=mask, other=0.0)
        dy = dy.to(tl.float32)
        mean, rstd = tl.load(stats_ptr + row * 2), tl.load(stats_ptr + row * 2 + 1)
        x = tl.where(mask, (x - mean) * rstd, 0.0)
        if NORM:
            dweight += dy * x
            dbias += dy
        if TOKENS:
            # Loaded again for each row, from the nearest cache, to save registers.
            dy *= tl.load(weight_ptr + inside, mask=mask, other=0.0).to(tl.float32)
            along = tl.sum(tl.sum(dy * x, 1), 0) / width
            dx = (dy - tl.sum(tl.sum(dy, 1), 0) / width - x * along) * rstd
            dx = dx.to(dx_ptr.dtype.element_ty)
            offs = (
                _raster_offset(row, offs_f, side, dx_stride, channels, N, TRANSPOSED, ALIGNED) + c
            )
            tl.store(dx_ptr + offs, dx, mask=mask)
            # A tile's first program clears its class token.
            first = dx_ptr + offset_of(row // tokens, dx_stride, ALIGNED) + c
            cleared = mask & (f + row % tokens == 0)
            tl.store(first + f * 0, tl.zeros_like(dx), mask=cleared)
    if NORM:
        sums = offset_of(pid, width, ALIGNED) + inside
        tl.store(dweight_ptr + sums, dweight, mask=mask)
        tl.store(dbias_ptr + sums, dbias, mask=mask)


# A program holds a row; a row of more than NARROW elements takes more warps. The widest InternViT's
# 3,200 channels are 16,384 after folding by two and rounding up: its gradient spills up to 96 bytes
# a thread, wider rows spill more. Rows of more than WIDEST elements have no kernel.
NARROW, WIDEST = 8192, 65536
fold_norm = Kernel(_fold_norm_kernel, [{"num_warps": 4}])
fold_norm_wide = Kernel(_fold_norm_kernel, [{"num_warps": 16}])
fold_norm_gradient = Kernel(_fold_norm_gradient_kernel, [{"num_warps": 4}])
fold_norm_gradient_wide = Kernel(_fold_norm_gradient_kernel, [{"num_warps": 16}])

# --- operator ---


class _Plan(NamedTuple):
    """Launch arguments that the fold decides."""

    rows: int  # R
    wide: bool
    numbers: tuple[int, int, int, int]  # strides, side, channels
    constants: tuple[int, bool, bool, int, int]  # N, TRANSPOSED, ALIGNED, BLOCK_F, BLOCK_C

    @classmethod
    def of(cls, tokens: Tensor, n: int, transposed: bool) -> "_Plan":
        T, count, C = tokens.shape
        side = round((count - 1) ** 0.5) // n
        blocks = padded(n * n), padded(C)
        aligned = all(size % 8 == 0 for size in (*tokens.stride()[:2], C))
        return cls(
            rows=T * side * side,
            wide=blocks[0] * blocks[1] > NARROW,
            numbers=(*tokens.stride()[:2], side, C),
            constants=(n, transposed, aligned, *blocks),
        )


def launch_fold_norm(
    normed: Tensor,
    stats: Tensor | None,
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    n: int,
    transposed: bool,
    eps: float,
) -> None:
    """Write normed [R, W], and stats [R, 2] unless None."""
    plan = _Plan.of(tokens, n, transposed)
    tensors = (normed, normed if stats is None else stats, tokens, norm_weight, norm_bias)
    constants = (stats is not None, *plan.constants)
    kernel = fold_norm_wide if plan.wide else fold_norm
    kernel.launch(plan.rows, *tensors, *plan.numbers, eps, *constants)


def _launch_fold_norm_gradient(
    dy: Tensor,
    tokens: Tensor,
    norm_weight: Tensor,
    stats: Tensor,
    n: int,
    transposed: bool,
    to_tokens: bool,
    to_norm: bool,
) -> tuple[Tensor, Tensor]:
    plan = _Plan.of(tokens, n, transposed)
    # Two a multiprocessor keep memory busy; each writes a row of sums that is read again.
    programs = min(plan.rows, 2 * multiprocessors(dy.get_device()))
    T = tokens.shape[0] if to_tokens else 0
    dx = tokens.new_empty(T, *tokens.shape[1:])
    sums = dy.new_empty(2, programs if to_norm else 0, dy.shape[1], dtype=torch.float32)
    tensors = (dx, *sums.unbind(0), dy, stats, tokens, norm_weight)
    kernel = fold_norm_gradient_wide if plan.wide else fold_norm_gradient
    passes = [(to_tokens, to_norm)]
    if plan.wide and to_tokens and to_norm:  # both at once would spill
        passes = [(True, False), (False, True)]
    for flags in passes:
        constants = (*flags, *plan.constants)
        kernel.launch(programs, *tensors, *plan.numbers, plan.rows, programs, *constants)
    return dx, sums.sum(1).to(norm_weight.dtype)


def _fake_fold_norm_gradient(
    dy: Tensor,
    tokens: Tensor,
    norm_weight: Tensor,
    stats: Tensor,
    n: int,
    transposed: bool,
    to_tokens: bool,
    to_norm: bool,
) -> tuple[Tensor, Tensor]:
    T = tokens.shape[0] if to_tokens else 0
    return tokens.new_empty(T, *tokens.shape[1:]), norm_weight.new_empty(2, dy.shape[1])


fold_norm_gradient_op = register(
    "fold_norm_gradient(Tensor dy, Tensor tokens, Tensor norm_weight, Tensor stats, int n,"
    " bool transposed, bool to_tokens, bool to_norm) -> (Tensor, Tensor)",
    _launch_fold_norm_gradient,
    _fake_fold_norm_gradient,
)
