"""Attention kernel over the image memory, with loads by pointers, and its configurations.

    out = softmax(rotate(q, id - bias) k^T / sqrt(D)) v        over the keys [start, end) of a span
    lse = log sum exp of the same scores

A block has BLOCK_M rows; a row is one query token and one of the query heads that share a key head.
The block reads the keys from the first to the last that any of its rows may read, once: batches,
beams and draft tokens share these reads, and so do the prompts of a batch, whose images are
concatenated in the memory.
Only key blocks that some row of the block may not read entirely are masked.
Keys are stored rotated by the id within their image. Queries are rotated on load by their own id
minus the image's bias, and again where a span goes on to the next image.

FLOPs: 4 * rows * keys * D for each head. Traffic: q and out once; keys and values once for every
BLOCK_M rows, 2 * keys * G * D elements, of which all but the first pass hit L2; split-K adds 8
bytes for each element of out and split. Rows of the rotary table come from L2, D * 4 bytes for each
row and image.
Source: CoMemo (arXiv:2506.06279); online softmax and split-K as in FlashAttention
(arXiv:2205.14135, arXiv:2307.08691).

Letters: B batch, N tokens, H query heads, M memory, G key heads, D head dimension, R rows of one
key head (B * N * H / G), P rows of the rotary table, I images, T tiles.
"""

import triton.language as tl

from comemo_kernels._blocks import NEW, let_next_begin, offset_of
from comemo_kernels._blocks_attention import (
    attend_keys,
    columns,
    combine_parts,
    load_rotated,
    narrow_ids,
    share_of,
)
from comemo_kernels._op import Kernel, jit


@jit
def _attend_kernel(
    out_ptr,  # [B, N, H, D], contiguous
    lse_ptr,  # [B, N, H], contiguous
    part_ptr,  # [splits, G * R, D], contiguous
    part_lse_ptr,  # [splits, G * R]
    count_ptr,  # [G * blocks], zeros: how many splits of a block are done
    q_ptr,  # [B, N, H, D], D contiguous
    k_ptr,  # [M, G, D], D contiguous
    v_ptr,  # [M, G, D], D contiguous
    spans_ptr,  # [B, N, 2], pairs contiguous
    cos_ptr,  # [P, R/2] by distance of ids
    sin_ptr,
    ids_ptr,  # [B, N] of the queries
    starts_ptr,  # [I], first key of each image
    biases_ptr,  # [B, I], id of each image's first token
    k_scale_ptr,  # [T, G], contiguous
    v_scale_ptr,
    q_stride_b: tl.int64,
    q_stride_n: tl.int64,
    q_stride_h: tl.int64,
    kv_stride_m: tl.int64,
    kv_stride_g: tl.int64,
    spans_stride_b: tl.int64,
    spans_stride_n: tl.int64,
    table_stride: tl.int64,
    ids_stride_b: tl.int64,
    ids_stride_n: tl.int64,
    biases_stride_b: tl.int64,
    num_tokens,  # N
    num_rows,  # R
    num_keys,  # M
    num_heads,  # G
    group,  # H / G
    num_positions,  # P
    num_images,
    tile,  # keys that share a scale
    num_blocks,  # of rows
    num_splits,
    scale_log2,  # log2(e) / sqrt(D)
    ROTATE: tl.constexpr,  # "no", by "ids", by ids minus the bias of "one" image, of "several"
    SCALED: tl.constexpr,  # keys and values are float8 with scales
    TILED: tl.constexpr,  # BLOCK_N divides the number of keys that share a scale
    D: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,  # strides of q, k, v and the table are multiples of 8, of float8 of 16
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUSED: tl.constexpr,  # the last split of a block to finish combines all of them
    EARLY: tl.constexpr,  # or a second launch does, which starts before this one ends and waits
):
    """One program attends BLOCK_M rows of one key head to one split of their keys."""
    if EARLY:
        let_next_begin()
    pid = tl.program_id(0)
    # Row blocks are the fastest axis: they read the same keys, so L2 holds few heads at a time.
    pid_m, rest = pid % num_blocks, pid // num_blocks
    split, head = rest % num_splits, rest // num_splits
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < num_rows
    token = row // group
    batch, place = token // num_tokens, token % num_tokens
    q_head = head * group + row % group

    span_ptrs = spans_ptr + batch * spans_stride_b + place * spans_stride_n
    start = tl.maximum(tl.load(span_ptrs, mask=mask_m, other=0), 0).to(tl.int32)
    end = tl.minimum(tl.load(span_ptrs + 1, mask=mask_m, other=0), num_keys).to(tl.int32)
    some = mask_m & (start < end)
    low = tl.min(tl.where(some, start, num_keys), 0)
    high = tl.max(tl.where(some, end, 0), 0)
    # Keys that all rows may read; padding rows restrict nothing.
    shared = tl.max(tl.where(mask_m, start, 0), 0)
    shared_end = tl.min(tl.where(mask_m, tl.where(some, end, 0), num_keys), 0)
    if SPLIT:
        origin = low // BLOCK_N * BLOCK_N if SCALED and TILED else low
        first_key, high = share_of(origin, high, split, num_splits, BLOCK_N)
        low = tl.maximum(low, first_key)

    q_rows = q_ptr + offset_of(batch, q_stride_b, ALIGNED) + offset_of(place, q_stride_n, ALIGNED)
    q_rows += offset_of(q_head, q_stride_h, ALIGNED)
    offs_d = columns(HALF, BLOCK_D)
    mask_md = mask_m[:, None] & (offs_d < D)[None, :]
    head_offset = offset_of(head, kv_stride_g, ALIGNED, 16 if SCALED else 8)
    k_head, v_head = k_ptr + head_offset, v_ptr + head_offset
    k_scales, v_scales = k_scale_ptr + head, v_scale_ptr + head
    keys = (k_head, v_head, kv_stride_m, k_scales, v_scales, num_heads, tile, scale_log2)
    acc, unit = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), 1.0
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    table = (cos_ptr, sin_ptr, table_stride, num_positions)
    if ROTATE != "no":
        ids_ptrs = ids_ptr + batch * ids_stride_b + place * ids_stride_n
        ids = narrow_ids(tl.load(ids_ptrs, mask=mask_m, other=0))
        bias_ptrs = biases_ptr + batch * biases_stride_b
    if ROTATE == "several":
        first, last = -1, -1
        for i in range(0, num_images, 64):
            image = i + tl.arange(0, 64)
            offsets = tl.load(starts_ptr + image, mask=image < num_images, other=2147483647)
            first += tl.sum((offsets <= low).to(tl.int32), 0)
            last += tl.sum((offsets < high).to(tl.int32), 0)
        for image in range(tl.maximum(first, 0), last + 1):
            bias = tl.load(bias_ptrs + image, mask=mask_m, other=0)
            segment = tl.maximum(tl.load(starts_ptr + image), low)
            more = image + 1 < num_images
            next_image = tl.load(starts_ptr + image + 1, mask=more, other=2147483647)
            q = load_rotated(q_rows, mask_m, ids - bias, table, HALF, ALIGNED, BLOCK_D)
            state = (acc, unit, peak, total)
            bounds = (segment, tl.minimum(next_image, high), shared, shared_end, start, end)
            acc, unit, peak, total = attend_keys(
                q, state, keys, bounds, D, HALF, SCALED, TILED, ALIGNED, BLOCK_D, BLOCK_N
            )
    else:
        if ROTATE == "no":
            q = tl.load(q_rows[:, None] + offs_d[None, :], mask=mask_md, other=0.0)
        else:
            if ROTATE == "one":
                ids -= tl.load(bias_ptrs, mask=mask_m, other=0)
            q = load_rotated(q_rows, mask_m, ids, table, HALF, ALIGNED, BLOCK_D)
        state = (acc, unit, peak, total)
        bounds = (low, high, shared, shared_end, start, end)
        acc, unit, peak, total = attend_keys(
            q, state, keys, bounds, D, HALF, SCALED, TILED, ALIGNED, BLOCK_D, BLOCK_N
        )

    if SCALED:
        acc *= unit
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = peak + tl.math.log2(total)
    offs_out = (token * group).to(tl.int64) * num_heads + q_head
    LN2: tl.constexpr = 0.6931471805599453
    if SPLIT:
        offs_part = (split * num_heads + head).to(tl.int64) * num_rows + row
        tl.store(part_ptr + offs_part[:, None] * D + offs_d[None, :], acc, mask=mask_md)
        tl.store(part_lse_ptr + offs_part, lse, mask=mask_m)
        if FUSED:
            tl.debug_barrier()  # this program writes all of its parts before it counts itself
            done = tl.atomic_add(count_ptr + head * num_blocks + pid_m, 1, sem="acq_rel")
            if done == num_splits - 1:
                tl.store(count_ptr + head * num_blocks + pid_m, 0)
                parts = (part_ptr, part_lse_ptr)
                for r in range(pid_m * BLOCK_M, tl.minimum((pid_m + 1) * BLOCK_M, num_rows)):
                    part, parts_apart = head * num_rows + r, num_heads * num_rows
                    y, lse_r = combine_parts(parts, part, parts_apart, num_splits, D, BLOCK_D, 16)
                    offs_r = (r // group) * group * num_heads + head * group + r % group
                    offs_y = tl.arange(0, BLOCK_D)
                    tl.store(out_ptr + offs_r.to(tl.int64) * D + offs_y, y, mask=offs_y < D)
                    tl.store(lse_ptr + offs_r, lse_r * LN2)
    else:
        tl.store(out_ptr + offs_out[:, None] * D + offs_d[None, :], acc, mask=mask_md)
        tl.store(lse_ptr + offs_out, lse * LN2, mask=mask_m)


PLAIN = {"FUSED": 0, "EARLY": 0}
# Prefill; decode step of a batch; decode step of one conversation; any rows in float32.
attend_many = Kernel(
    _attend_kernel,
    [
        {"BLOCK_M": 128, "BLOCK_N": 64, **PLAIN, "num_warps": 8, "num_stages": 3},
    ],
)
attend_few = Kernel(
    _attend_kernel,
    [
        {"BLOCK_M": 16, "BLOCK_N": 64, **PLAIN, "num_warps": 4, "num_stages": 3},
    ],
)
# Two plain launches come first until a GPU has timed the others.
attend_one = Kernel(
    _attend_kernel,
    [
        {"BLOCK_M": 16, "BLOCK_N": 64, **how, "num_warps": 4, "num_stages": 3}
        for how in (PLAIN, {"FUSED": 1, "EARLY": 0}, {"FUSED": 0, "EARLY": 1})
        if NEW or not how["EARLY"]
    ],
)
attend_exact = Kernel(
    _attend_kernel,
    [
        {"BLOCK_M": 16, "BLOCK_N": 16, **PLAIN, "num_warps": 8, "num_stages": 2},
    ],
)
