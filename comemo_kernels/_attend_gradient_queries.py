"""Gradient of attention over the image memory: queries.

    p  = exp(q' k'^T / sqrt(D) - lse)
    ds = p * (dout v^T - delta)             dq' = s ds k' / sqrt(D);  dq = rotate(dq', r - id)

A program has BLOCK_M rows of one key head, as in the forward kernel, and goes through the keys from
the first to the last that any of them reads. s is tanh(gate), or 1.
FLOPs: 6 * rows * keys * D for each head. Traffic: q', dout and dq once; keys and values once for
every BLOCK_M rows, all but the first pass from L2.
Source: FlashAttention-2 (arXiv:2307.08691).

Letters: B batch, N tokens, H query heads, M memory, G key heads, D head dimension, R rows of one
key head (B * N * H / G), P rows of the rotary table, I images.
"""

import triton.language as tl

from comemo_kernels._blocks import offset_of, tanh
from comemo_kernels._blocks_attention import columns, narrow_ids, row_offsets, table_rows
from comemo_kernels._op import Kernel, jit


@jit
def _gradient_queries_kernel(
    dq_ptr,  # [B, N, H, D], contiguous
    q_ptr,  # [B, N, H, D], contiguous: q'
    dout_ptr,  # [B, N, H, D], contiguous
    k_ptr,  # [M, G, D], D contiguous: k'
    v_ptr,  # [M, G, D], D contiguous
    lse2_ptr,  # [G, R]
    delta_ptr,  # [G, R]
    spans_ptr,  # [B, N, 2], pairs contiguous
    gate_ptr,  # [1]
    cos_ptr,  # [P, D/2]
    sin_ptr,
    ids_ptr,  # [B, N]
    biases_ptr,  # [B, I]
    k_stride_m: tl.int64,
    k_stride_g: tl.int64,
    v_stride_m: tl.int64,
    v_stride_g: tl.int64,
    spans_stride_b: tl.int64,
    spans_stride_n: tl.int64,
    ids_stride_b: tl.int64,
    ids_stride_n: tl.int64,
    biases_stride_b: tl.int64,
    table_stride: tl.int64,
    num_tokens,  # N
    num_rows,  # R
    num_keys,  # M
    num_heads,  # G
    group,  # H / G
    num_positions,  # P
    scale_log2,  # log2(e) / sqrt(D)
    scale,  # 1 / sqrt(D)
    ROTATE: tl.constexpr,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    GROUPED: tl.constexpr,  # query heads share key heads
    D: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,  # strides are multiples of 8
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes the gradients of BLOCK_M rows of one key head."""
    blocks = tl.cdiv(num_rows, BLOCK_M)
    head, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    mask_m = row < num_rows
    token = row // group
    batch, place = token // num_tokens, token % num_tokens
    span = spans_ptr + batch * spans_stride_b + place * spans_stride_n
    start = tl.maximum(tl.load(span, mask=mask_m, other=0), 0).to(tl.int32)
    end = tl.minimum(tl.load(span + 1, mask=mask_m, other=0), num_keys).to(tl.int32)
    some = mask_m & (start < end)
    low = tl.min(tl.where(some, start, num_keys), 0)
    high = tl.max(tl.where(some, end, 0), 0)
    # Keys that all rows may read; padding rows restrict nothing.
    shared = tl.max(tl.where(mask_m, start, 0), 0)
    shared_end = tl.min(tl.where(mask_m, tl.where(some, end, 0), num_keys), 0)
    shared_end = tl.minimum(shared_end, high)

    base, offs = row_offsets(first, row - first, head, group, num_heads, GROUPED)
    offs_d, offs_n = columns(HALF, BLOCK_D), tl.arange(0, BLOCK_N)
    tile = base * D + (offs * D)[:, None] + offs_d[None, :]
    mask_md = mask_m[:, None] & (offs_d < D)[None, :]
    q = tl.load(q_ptr + tile, mask=mask_md, other=0.0)
    dout = tl.load(dout_ptr + tile, mask=mask_md, other=0.0)
    stats = head.to(tl.int64) * num_rows + row
    lse2 = tl.load(lse2_ptr + stats, mask=mask_m, other=float("inf"))
    delta = tl.load(delta_ptr + stats, mask=mask_m, other=0.0)
    k_head = k_ptr + offset_of(head, k_stride_g, ALIGNED)
    v_head = v_ptr + offset_of(head, v_stride_g, ALIGNED)
    k_offs, v_offs = offs_n * k_stride_m.to(tl.int32), offs_n * v_stride_m.to(tl.int32)
    if ALIGNED:
        k_offs, v_offs = tl.multiple_of(k_offs, 8), tl.multiple_of(v_offs, 8)
    k_tile, v_tile = k_offs[:, None] + offs_d[None, :], v_offs[:, None] + offs_d[None, :]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    PRECISION: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    for i in tl.range(0, tl.cdiv(high - low, BLOCK_N)):
        first_key = low + i * BLOCK_N
        key = first_key + offs_n
        mask = (key < high)[:, None]
        if D < BLOCK_D:
            mask &= (offs_d < D)[None, :]
        k_ptrs = k_head + offset_of(first_key, k_stride_m, ALIGNED) + k_tile
        v_ptrs = v_head + offset_of(first_key, v_stride_m, ALIGNED) + v_tile
        k = tl.load(k_ptrs, mask=mask, other=0.0)
        v = tl.load(v_ptrs, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = tl.math.exp2(s * scale_log2 - lse2[:, None]) * (dp - delta[:, None])
        if (first_key < shared) | (first_key + BLOCK_N > shared_end):
            seen = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision=PRECISION)

    if GATED:
        scale *= tanh(tl.load(gate_ptr).to(tl.float32))
    dq *= scale
    if ROTATE:
        ids_ptrs = ids_ptr + batch * ids_stride_b + place * ids_stride_n
        ids = narrow_ids(tl.load(ids_ptrs, mask=mask_m, other=0))
        if BIASED:
            ids -= tl.load(biases_ptr + batch * biases_stride_b, mask=mask_m, other=0)
        halves = tl.permute(tl.reshape(dq, (BLOCK_M, 2, BLOCK_D // 2)), (0, 2, 1))
        dq1, dq2 = tl.split(halves)
        offs_h = tl.arange(0, BLOCK_D // 2)
        mask = mask_m[:, None] & (offs_h < HALF)[None, :]
        table = (cos_ptr, sin_ptr, table_stride, num_positions)
        cos, sin = table_rows(table, ids, mask, offs_h, ALIGNED)
        dq_ptrs = dq_ptr + base * D + (offs * D)[:, None] + offs_h[None, :]
        reads = some[:, None]  # others may be beyond the table, where angles are NaN
        tl.store(dq_ptrs, tl.where(reads, dq1 * cos + dq2 * sin, 0.0), mask=mask)
        tl.store(dq_ptrs + HALF, tl.where(reads, dq2 * cos - dq1 * sin, 0.0), mask=mask)
    else:
        tl.store(dq_ptr + tile, dq, mask=mask_md)


gradient_queries = Kernel(  # heads of at most 128 elements
    _gradient_queries_kernel,
    [
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    ],
)
gradient_queries_wide = Kernel(
    _gradient_queries_kernel, [{"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}]
)
gradient_queries_exact = Kernel(  # float32
    _gradient_queries_kernel, [{"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}]
)
