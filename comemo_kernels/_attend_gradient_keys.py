"""Gradient of attention over the image memory: keys and values.

    p  = exp(q' k'^T / sqrt(D) - lse)       dv = s p^T dout
    ds = p * (dout v^T - delta)             dk' = s ds^T q' / sqrt(D);  dk = rotate(dk', r - b)

A program has BLOCK_N keys of one head and goes through the rows that read them, with the query
heads that share the head, so that all sums stay in registers: no atomics, the same bits every time.
It reads only the row blocks in its ranges (`_attend_gradient_rows`); if there are none it writes
zeros. s is tanh(gate), or 1.
FLOPs: 8 * rows * keys * D for each head. Traffic: q' and dout once for every BLOCK_N keys, all but
the first pass from L2; keys and values read once, their gradients written once.
Source: FlashAttention-2 (arXiv:2307.08691).

Letters: B batch, N tokens, H query heads, M memory, G key heads, D head dimension, R rows of one
key head (B * N * H / G), P rows of the rotary table, I images.
"""

import triton.language as tl

from comemo_kernels._blocks import offset_of, tanh
from comemo_kernels._blocks_attention import (
    columns,
    image_of,
    load_columns,
    row_offsets,
    table_rows,
)
from comemo_kernels._op import Kernel, jit


@jit
def _gradient_keys_kernel(
    dk_ptr,  # [M, G, D], contiguous
    dv_ptr,  # [M, G, D], contiguous
    q_ptr,  # [B, N, H, D], contiguous: q'
    dout_ptr,  # [B, N, H, D], contiguous
    k_ptr,  # [M, G, D], D contiguous: k'
    v_ptr,  # [M, G, D], D contiguous
    lse2_ptr,  # [G, R]
    delta_ptr,  # [G, R]
    limits_ptr,  # [2, R] int32: first key and end of each row
    bounds_ptr,  # [row blocks, 4]
    runs_ptr,  # [key blocks, 1 + 2 * RUNS]
    gate_ptr,  # [1]
    cos_ptr,  # [P, D/2]
    sin_ptr,
    starts_ptr,  # [I]
    biases_ptr,  # [I] of one prompt
    k_stride_m: tl.int64,
    k_stride_g: tl.int64,
    v_stride_m: tl.int64,
    v_stride_g: tl.int64,
    table_stride: tl.int64,
    num_rows,  # R
    num_keys,  # M
    num_heads,  # G
    group,  # H / G
    num_positions,  # P
    num_images,  # I
    scale_log2,  # log2(e) / sqrt(D)
    scale,  # 1 / sqrt(D)
    REBASED: tl.constexpr,  # keys are rotated to the first image's frame
    GATED: tl.constexpr,
    GROUPED: tl.constexpr,  # query heads share key heads
    D: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,  # strides are multiples of 8
    RUNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes the gradients of BLOCK_N keys and values of one head."""
    # Key blocks are the fastest axis: they read the same rows, so L2 holds few heads at a time.
    blocks = tl.cdiv(num_keys, BLOCK_N)
    pid_n, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    first_key = pid_n * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    offs_d = columns(HALF, BLOCK_D)
    mask_n = key < num_keys
    mask_nd = mask_n[:, None] & (offs_d < D)[None, :]
    k_rows = k_ptr + offset_of(head, k_stride_g, ALIGNED) + offset_of(key, k_stride_m, ALIGNED)
    v_rows = v_ptr + offset_of(head, v_stride_g, ALIGNED) + offset_of(key, v_stride_m, ALIGNED)
    k = tl.load(k_rows[:, None] + offs_d[None, :], mask=mask_nd, other=0.0)
    v = tl.load(v_rows[:, None] + offs_d[None, :], mask=mask_nd, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    PRECISION: tl.constexpr = "ieee" if k.dtype == tl.float32 else "tf32"
    offs_m = tl.arange(0, BLOCK_M)
    stats = head.to(tl.int64) * num_rows
    runs = runs_ptr + pid_n * (1 + 2 * RUNS)
    for run in range(tl.load(runs)):
        begin, end = tl.load(runs + 1 + 2 * run), tl.load(runs + 2 + 2 * run)
        for block in tl.range(begin, end):
            first = block * BLOCK_M
            row = first + offs_m
            mask_m = row < num_rows
            # Rows past the last one read the last one, and have lse inf, so p = 0.
            last = tl.minimum(offs_m, num_rows - 1 - first)
            base, offs = row_offsets(first, last, head, group, num_heads, GROUPED)
            tile = (offs * D)[:, None] + offs_d[None, :]
            q = load_columns(q_ptr + base * D + tile, offs_d, D, BLOCK_D)
            lse2 = tl.load(lse2_ptr + stats + row, mask=mask_m, other=float("inf"))
            delta = tl.load(delta_ptr + stats + row, mask=mask_m, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            p = tl.math.exp2(s * scale_log2 - lse2[None, :])
            shared = tl.load(bounds_ptr + block * 4 + 2)
            shared_end = tl.load(bounds_ptr + block * 4 + 3)
            masked = (first_key < shared) | (first_key + BLOCK_N > shared_end)
            if masked:
                start = tl.load(limits_ptr + row, mask=mask_m, other=0)
                stop = tl.load(limits_ptr + num_rows + row, mask=mask_m, other=0)
                seen = (key[:, None] >= start[None, :]) & (key[:, None] < stop[None, :])
                p = tl.where(seen, p, 0.0)
            dout = load_columns(dout_ptr + base * D + tile, offs_d, D, BLOCK_D)
            dv = tl.dot(p.to(q.dtype), dout, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            if masked:  # a value that nobody reads may be NaN
                ds = tl.where(p > 0.0, ds, 0.0)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    if GATED:
        factor = tanh(tl.load(gate_ptr).to(tl.float32))
        dv *= factor
        scale *= factor
    dk *= scale
    rows = offset_of(key, num_heads, False)[:, None] * D + head * D
    dv_ptrs = dv_ptr + rows + offs_d[None, :]
    tl.store(dv_ptrs, dv, mask=mask_nd)
    if REBASED:
        halves = tl.permute(tl.reshape(dk, (BLOCK_N, 2, BLOCK_D // 2)), (0, 2, 1))
        dk1, dk2 = tl.split(halves)
        offs_h = tl.arange(0, BLOCK_D // 2)
        mask = mask_n[:, None] & (offs_h < HALF)[None, :]
        shift = tl.load(biases_ptr + image_of(starts_ptr, key, num_images)) - tl.load(biases_ptr)
        table = (cos_ptr, sin_ptr, table_stride, num_positions)
        cos, sin = table_rows(table, shift, mask, offs_h, ALIGNED)
        y1, y2 = dk1 * cos + dk2 * sin, dk2 * cos - dk1 * sin
        dk_ptrs = dk_ptr + rows + offs_h[None, :]
        tl.store(dk_ptrs, y1, mask=mask)
        tl.store(dk_ptrs + HALF, y2, mask=mask)
    else:
        dk_ptrs = dk_ptr + rows + offs_d[None, :]
        tl.store(dk_ptrs, dk, mask=mask_nd)


# By warp groups, heads of at most 128 elements: 64 x 128 blocks fill the registers of Hopper.
gradient_keys = Kernel(
    _gradient_keys_kernel,
    [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": stages}
        for m, n, w, stages in ((32, 64, 4, 3), (64, 128, 8, 2))
    ],
)
gradient_keys_small = Kernel(  # other GPUs
    _gradient_keys_kernel, [{"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}]
)
gradient_keys_wide = Kernel(  # heads of more than 128 elements
    _gradient_keys_kernel, [{"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}]
)
gradient_keys_exact = Kernel(  # float32
    _gradient_keys_kernel, [{"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}]
)
