"""What precedes the gradient of attention: rotated rows, row sums, and which blocks meet.

    q' = rotate(q, id - r);  k' = rotate(k, b - r)          b: bias of the key's image
    delta = rowsum(dout * out) - dlse

r is the bias of the first image of a launch. In this one frame a score is q' k' whichever
image the key belongs to, so that the two GEMM kernels rotate nothing but their results.

Spans decide which blocks of rows and keys meet. `bounds` has the first and the last key of each
block of rows, `runs` the row blocks that each block of keys meets, as ranges: one for packed
samples, for batches and for causal visibility. After RUNS - 1 ranges the rest is one range, whose
superfluous blocks are masked.
Traffic: q, out and dout read, q' written; for several images k read and k' written.
Source: delta of FlashAttention-2 (arXiv:2307.08691).

Letters: B batch, N tokens, H query heads, M memory, G key heads, D head dimension, R rows of one
key head (B * N * H / G), P rows of the rotary table, I images.
"""

import triton
import triton.language as tl

from comemo_kernels._blocks import offset_of
from comemo_kernels._blocks_attention import (
    columns,
    image_of,
    load_rotated,
    narrow_ids,
    row_offsets,
)
from comemo_kernels._op import Kernel, jit

RUNS = 16  # ranges of row blocks that a block of keys keeps


@jit
def _gradient_rows_kernel(
    turned_ptr,  # [B, N, H, D], contiguous: q'
    lse2_ptr,  # [G, R] float32: base 2, inf where a span is empty
    delta_ptr,  # [G, R] float32
    q_ptr,  # [B, N, H, D], D contiguous
    out_ptr,  # [B, N, H, D], contiguous
    dout_ptr,
    lse_ptr,  # [B, N, H]
    dlse_ptr,
    cos_ptr,  # [P, D/2]
    sin_ptr,
    ids_ptr,  # [B, N]
    biases_ptr,  # [B, I]
    q_stride_b: tl.int64,
    q_stride_n: tl.int64,
    q_stride_h: tl.int64,
    ids_stride_b: tl.int64,
    ids_stride_n: tl.int64,
    biases_stride_b: tl.int64,
    table_stride: tl.int64,
    num_tokens,  # N
    num_rows,  # R
    num_heads,  # G
    group,  # H / G
    num_positions,  # P
    ROTATE: tl.constexpr,
    BIASED: tl.constexpr,
    DLSE: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program prepares BLOCK_M rows of one key head."""
    blocks = tl.cdiv(num_rows, BLOCK_M)
    head, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    mask = row < num_rows
    base, offs = row_offsets(first, row - first, head, group, num_heads, True)
    offs_d = columns(HALF, BLOCK_D)
    mask_md = mask[:, None] & (offs_d < D)[None, :]
    tile = base * D + (offs * D)[:, None] + offs_d[None, :]
    out = tl.load(out_ptr + tile, mask=mask_md, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + tile, mask=mask_md, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    lse = tl.load(lse_ptr + base + offs, mask=mask, other=0.0)
    if DLSE:
        delta -= tl.load(dlse_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
    empty = lse == float("-inf")
    LOG2E: tl.constexpr = 1.4426950408889634
    stats = head.to(tl.int64) * num_rows + row
    tl.store(lse2_ptr + stats, tl.where(empty, float("inf"), lse * LOG2E), mask=mask)
    tl.store(delta_ptr + stats, tl.where(empty, 0.0, delta), mask=mask)
    if ROTATE:
        token = row // group
        batch, place = token // num_tokens, token % num_tokens
        ids_ptrs = ids_ptr + batch * ids_stride_b + place * ids_stride_n
        ids = narrow_ids(tl.load(ids_ptrs, mask=mask, other=0))
        if BIASED:
            ids -= tl.load(biases_ptr + batch * biases_stride_b, mask=mask, other=0)
        q_rows = q_ptr + offset_of(batch, q_stride_b, ALIGNED)
        q_rows += offset_of(place, q_stride_n, ALIGNED)
        q_rows += offset_of(head * group + row % group, q_stride_h, ALIGNED)
        table = (cos_ptr, sin_ptr, table_stride, num_positions)
        q = load_rotated(q_rows, mask, ids, table, HALF, ALIGNED, BLOCK_D)
        # A row that reads nothing may be beyond the table, and 0 * NaN is NaN.
        q = tl.where(empty[:, None], 0.0, q)
        tl.store(turned_ptr + tile, q, mask=mask_md)


@jit
def _gradient_rebase_kernel(
    turned_ptr,  # [M, G, D], contiguous: k'
    k_ptr,  # [M, G, D], D contiguous
    cos_ptr,  # [P, D/2]
    sin_ptr,
    starts_ptr,  # [I]
    biases_ptr,  # [I] of one prompt
    k_stride_m: tl.int64,
    k_stride_g: tl.int64,
    table_stride: tl.int64,
    num_keys,  # M
    num_heads,  # G
    num_positions,  # P
    num_images,  # I
    D: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program rotates BLOCK_M keys of one head from their images' frames to the first one's."""
    head, block = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    key = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = key < num_keys
    shift = tl.load(biases_ptr + image_of(starts_ptr, key, num_images)) - tl.load(biases_ptr)
    k_rows = k_ptr + offset_of(key, k_stride_m, ALIGNED) + offset_of(head, k_stride_g, ALIGNED)
    table = (cos_ptr, sin_ptr, table_stride, num_positions)
    k = load_rotated(k_rows, mask, shift, table, HALF, ALIGNED, BLOCK_D)
    offs_d = columns(HALF, BLOCK_D)
    turned = turned_ptr + (key.to(tl.int64) * num_heads + head)[:, None] * D + offs_d[None, :]
    tl.store(turned, k, mask=mask[:, None] & (offs_d < D)[None, :])


@jit
def _gradient_bounds_kernel(
    bounds_ptr,  # [row blocks, 4] int32: first key, end; first key that all rows read, end
    limits_ptr,  # [2, R] int32: first key and end of each row
    spans_ptr,  # [B, N, 2], pairs contiguous
    spans_stride_b: tl.int64,
    spans_stride_n: tl.int64,
    num_tokens,  # N
    num_rows,  # R
    num_keys,  # M
    group,  # H / G
    BLOCK_M: tl.constexpr,
):
    """One program finds the keys of one block of rows; all key heads have the same."""
    pid = tl.program_id(0)
    row = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = row < num_rows
    token = row // group
    span = spans_ptr + token // num_tokens * spans_stride_b + token % num_tokens * spans_stride_n
    start = tl.maximum(tl.load(span, mask=mask, other=0), 0).to(tl.int32)
    end = tl.minimum(tl.load(span + 1, mask=mask, other=0), num_keys).to(tl.int32)
    tl.store(limits_ptr + row, start, mask=mask)
    tl.store(limits_ptr + num_rows + row, end, mask=mask)
    some = mask & (start < end)
    bounds = bounds_ptr + pid * 4
    tl.store(bounds, tl.min(tl.where(some, start, num_keys), 0))
    tl.store(bounds + 1, tl.max(tl.where(some, end, 0), 0))
    tl.store(bounds + 2, tl.max(tl.where(mask, start, 0), 0))
    tl.store(bounds + 3, tl.min(tl.where(mask, tl.where(some, end, 0), num_keys), 0))


@triton.jit
def _reads(bounds_ptr, block, num_blocks, key, BLOCK_N: tl.constexpr):
    """Whether blocks of rows read any of the keys [key, key + BLOCK_N); 0 outside the table."""
    there = (block >= 0) & (block < num_blocks)
    first = tl.load(bounds_ptr + block * 4, mask=there, other=2147483647)
    end = tl.load(bounds_ptr + block * 4 + 1, mask=there, other=0)
    return ((first < key + BLOCK_N) & (end > key)).to(tl.int32)


@jit
def _gradient_runs_kernel(
    runs_ptr,  # [key blocks, 1 + 2 * RUNS] int32: number of ranges; first row block and end of each
    bounds_ptr,  # [row blocks, 4]
    num_blocks,  # of rows
    RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program finds the row blocks that read one block of keys."""
    key = tl.program_id(0) * BLOCK_N
    runs = runs_ptr + tl.program_id(0) * (1 + 2 * RUNS)
    count, end = 0, 0
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        reads = _reads(bounds_ptr, block, num_blocks, key, BLOCK_N)
        begins = reads & (_reads(bounds_ptr, block - 1, num_blocks, key, BLOCK_N) == 0)
        ends = reads & (_reads(bounds_ptr, block + 1, num_blocks, key, BLOCK_N) == 0)
        index = count + tl.cumsum(begins, 0) - 1
        tl.store(runs + 1 + 2 * index, block, mask=(begins != 0) & (index < RUNS))
        tl.store(runs + 2 + 2 * index, block + 1, mask=(ends != 0) & (index < RUNS - 1))
        end = tl.maximum(end, tl.max(tl.where(reads != 0, block + 1, 0), 0))
        count += tl.sum(begins, 0)
    kept = tl.minimum(count, RUNS)
    tl.store(runs, kept)
    tl.store(runs + 2 * kept, end, mask=kept > 0)  # of the last range


gradient_rows = Kernel(_gradient_rows_kernel, [{"BLOCK_M": 32, "num_warps": 4}])
gradient_rebase = Kernel(_gradient_rebase_kernel, [{"BLOCK_M": 32, "num_warps": 4}])
gradient_bounds = Kernel(_gradient_bounds_kernel, [{"num_warps": 1}])
gradient_runs = Kernel(_gradient_runs_kernel, [{"CHUNK": 256, "num_warps": 4}])
