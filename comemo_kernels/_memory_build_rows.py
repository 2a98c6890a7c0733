"""Row-wise kernels of the memory build: RMSNorm before the GEMM, float8 scales after it.

    rstd = 1 / sqrt(mean(media^2) + eps)
    normed = media * rstd * norm_weight                     for each layer, in exact mode
    scale = max |x| / 448;  out = x / scale                 for each tile and head, in float8

Traffic: media once, in exact mode twice, and L * M * d elements written; float8 reads keys and
values twice and writes them once.
Source: CoMemo (arXiv:2506.06279); the norm is that of Llama.

Letters: M image tokens, d their width, L layers, G heads, D head dimension, T tiles.
"""

import triton.language as tl

from comemo_kernels._blocks import offset_of
from comemo_kernels._blocks_memory_build import pointer_to
from comemo_kernels._op import Kernel, jit

# --- kernel ---


@jit
def _norm_kernel(
    rstd_ptr,  # [M] float32
    normed_ptr,  # [L, M, d], contiguous
    media_ptr,  # [M, d], d contiguous
    address_ptr,  # [L, 4]: of W, norm weight, keys, values
    media_stride: tl.int64,
    num_rows,  # M
    width,  # d
    num_layers,
    eps,
    EXACT: tl.constexpr,  # write the normalised media instead of rstd
    ALIGNED: tl.constexpr,  # stride and width are multiples of 8
    EVEN: tl.constexpr,  # BLOCK_K divides the width
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program normalises BLOCK_M image tokens, for all layers."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < num_rows
    offs_k = tl.arange(0, BLOCK_K)
    media_rows = media_ptr + offset_of(row, media_stride, ALIGNED)
    square = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i in range(0, tl.cdiv(width, BLOCK_K)):
        column = i * BLOCK_K + offs_k
        mask = mask_m[:, None]
        if not EVEN:
            mask &= (column < width)[None, :]
        x = tl.load(media_rows[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        square += x * x
    rstd = 1.0 / tl.sqrt_rn(tl.sum(square, 1) / width + eps)
    if not EXACT:
        tl.store(rstd_ptr + row, rstd, mask=mask_m)
    else:
        for i in range(0, tl.cdiv(width, BLOCK_K)):
            column = i * BLOCK_K + offs_k
            mask = mask_m[:, None]
            if not EVEN:
                mask &= (column < width)[None, :]
            x = tl.load(media_rows[:, None] + column[None, :], mask=mask, other=0.0)
            normed = (x.to(tl.float32) * rstd[:, None]).to(x.dtype)
            for layer in range(num_layers):
                address = tl.load(address_ptr + layer * 4 + 1)
                weight_ptr = pointer_to(address, media_ptr, ALIGNED)
                if EVEN:
                    weight = tl.load(weight_ptr + column)
                else:
                    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
                first = normed_ptr + offset_of(row + layer * num_rows, width, ALIGNED)
                y = normed.to(tl.float32) * weight.to(tl.float32)[None, :]
                tl.store(first[:, None] + column[None, :], y, mask=mask)


@jit
def _scale_kernel(
    x_ptr,  # [L, 2, plane_rows, G, D], contiguous
    like_ptr,  # a tensor of the output's dtype
    address_ptr,  # [L, 4]: of keys, values and their scales
    out_stride_m: tl.int64,
    out_stride_g: tl.int64,
    plane_rows,
    num_rows,  # M
    num_heads,  # G
    num_tiles,  # T
    tile,  # rows of a tile
    out_row,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,  # strides are multiples of 16
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program scales one tile of one head's keys or values and stores it in float8."""
    pid = tl.program_id(0).to(tl.int64)
    head, rest = pid % num_heads, pid // num_heads
    pid_t, plane = rest % num_tiles, rest // num_tiles  # plane: layer, keys or values
    address = address_ptr + plane // 2 * 4 + plane % 2
    out_ptr = pointer_to(tl.load(address), like_ptr, ALIGNED)
    scale_ptr = tl.load(address + 2).to(tl.pointer_type(tl.float32))
    offs_d = tl.arange(0, BLOCK_D)
    first = pid_t * tile
    largest = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(0, tl.cdiv(tile, BLOCK_M)):
        inside = i * BLOCK_M + tl.arange(0, BLOCK_M)
        row = first + inside
        mask = ((inside < tile) & (row < num_rows))[:, None] & (offs_d < D)[None, :]
        offs = ((plane * plane_rows + row) * num_heads + head)[:, None] * D + offs_d[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    most = tl.max(tl.max(largest, 1), 0)
    bad = tl.max(tl.max((largest != largest).to(tl.int32), 1), 0)
    scale = tl.where(most > 0.0, most / 448.0, 1.0)  # 448: the largest float8_e4m3fn
    scale = tl.where(bad > 0, float("nan"), scale)
    tl.store(scale_ptr + (out_row // tile + pid_t) * num_heads + head, scale)
    for i in range(0, tl.cdiv(tile, BLOCK_M)):
        inside = i * BLOCK_M + tl.arange(0, BLOCK_M)
        row = first + inside
        mask = ((inside < tile) & (row < num_rows))[:, None] & (offs_d < D)[None, :]
        offs = ((plane * plane_rows + row) * num_heads + head)[:, None] * D + offs_d[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) / scale
        out_rows = out_ptr + offset_of(row + out_row, out_stride_m, ALIGNED, 16)
        out_rows += offset_of(head, out_stride_g, ALIGNED, 16)
        tl.store(out_rows[:, None] + offs_d[None, :], x.to(like_ptr.dtype.element_ty), mask=mask)


norm_media = Kernel(
    _norm_kernel,
    [
        {"BLOCK_M": 4, "BLOCK_K": 512, "num_warps": 4},
        {"BLOCK_M": 2, "BLOCK_K": 1024, "num_warps": 4},
    ],
)
scale_memory = Kernel(_scale_kernel, [{"BLOCK_M": 32, "num_warps": 4}])
