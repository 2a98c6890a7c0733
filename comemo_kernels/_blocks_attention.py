"""Block functions of attention over the image memory: loads, the online softmax, its parts."""

import triton
import triton.language as tl

from comemo_kernels._blocks import offset_of

LOG2E = 1.4426950408889634


@triton.jit
def columns(HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """Elements of a head in the order of a block's columns: each half padded to a power of two."""
    offs_d = tl.arange(0, BLOCK_D)
    if 2 * HALF < BLOCK_D:
        inside = offs_d % (BLOCK_D // 2)
        # What lies behind a half is masked: it is behind the head too.
        offs_d = tl.where(inside < HALF, offs_d // (BLOCK_D // 2) * HALF + inside, 2 * HALF)
    return offs_d


@triton.jit
def narrow_ids(ids):
    """32 bits of ids of any sign and size, less a bias of at least 0 without an overflow.

    What was cut off is further from every image than a table reaches.
    """
    return tl.minimum(tl.maximum(ids, -1073741824), 2147483647).to(tl.int32)


@triton.jit
def share_of(low, high, split, num_splits, BLOCK: tl.constexpr):
    """Keys [low, high) of one of several programs: whole blocks, one more or less than others."""
    blocks = tl.cdiv(tl.maximum(high - low, 0), BLOCK)
    share, more = blocks // num_splits, blocks % num_splits
    first = low + (split * share + tl.minimum(split, more)) * BLOCK
    share += (split < more).to(tl.int32)
    return first, tl.minimum(high, first + share * BLOCK)


@triton.jit
def to_half(q):
    """Rows of float16 and the powers of two that they were divided by.

    float8 becomes float16 in one instruction and bfloat16 in four, and float16 rounds weights less.
    A row's largest element comes to lie in [1, 2): none overflows, and what is lost of small ones
    is below what bfloat16 rounds of that one.
    """
    largest = tl.max(tl.abs(q.to(tl.float32)), 1)
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.where(exponent == 0, 0x3F800000, exponent).to(tl.float32, bitcast=True)
    return (q.to(tl.float32) / power[:, None]).to(tl.float16), power


@triton.jit
def load_rotated(
    q_rows,  # [BLOCK_M] pointers
    mask_m,
    delta,  # [BLOCK_M] rows of the table, of either sign
    cos_ptr,  # [P, HALF]
    sin_ptr,
    table_stride,
    num_positions,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Queries [BLOCK_M, BLOCK_D] in their dtype, rotated in float32."""
    offs_d = tl.arange(0, BLOCK_D // 2)
    mask = mask_m[:, None] & (offs_d < HALF)[None, :]
    x_ptrs = q_rows[:, None] + offs_d[None, :]
    # Volatile: or the compiler moves these loads out of the loop over images, into registers.
    x1 = tl.load(x_ptrs, mask=mask, other=0.0, volatile=True).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0, volatile=True).to(tl.float32)
    row = tl.abs(delta)
    known = mask & ((row >= 0) & (row < num_positions))[:, None]  # the least integer has no abs
    offs = offset_of(row, table_stride, ALIGNED)[:, None] + offs_d[None, :]
    cos = tl.load(cos_ptr + offs, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + offs, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.where((delta < 0)[:, None], -sin, sin)
    y1 = tl.where(mask, x1 * cos - x2 * sin, 0.0).to(q_rows.dtype.element_ty)
    y2 = tl.where(mask, x2 * cos + x1 * sin, 0.0).to(q_rows.dtype.element_ty)
    y = tl.permute(tl.join(y1, y2), (0, 2, 1))
    return tl.reshape(y, (x1.shape[0], BLOCK_D))


@triton.jit
def attend_keys(
    q,  # [BLOCK_M, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D] in units of a value
    unit,  # scale of the values that were read last; 1 if not SCALED
    peak,  # [BLOCK_M] largest score so far, in steps of log 2
    total,  # [BLOCK_M] sum of exp2(score - peak)
    k_ptr,  # [M, D] of one head
    v_ptr,
    stride,  # of M, of both
    k_scale_ptr,  # [T] of one head
    v_scale_ptr,
    scale_stride,
    tile,
    scale_log2,
    first,  # [first, limit): keys of one image
    limit,
    shared,  # [shared, shared_end): keys that every row may read
    shared_end,
    start,  # [BLOCK_M] spans
    end,
    D: tl.constexpr,
    HALF: tl.constexpr,
    SCALED: tl.constexpr,
    TILED: tl.constexpr,  # BLOCK_N divides a tile
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The online softmax over blocks of keys."""
    WIDE: tl.constexpr = 16 if SCALED else 8  # elements of 128 bits, of float8 and others
    offs_n, offs_d = tl.arange(0, BLOCK_N), columns(HALF, BLOCK_D)
    # Within a block 32 bits reach every element: half the registers of pointers.
    rows = offs_n * stride.to(tl.int32)
    if ALIGNED:
        rows = tl.multiple_of(rows, WIDE)
    offs = rows[:, None] + offs_d[None, :]
    shared_end = tl.minimum(shared_end, limit)
    origin = first
    power = tl.full([q.shape[0]], 1.0, tl.float32) * scale_log2
    if SCALED and TILED:  # a block lies in one tile, and has one scale
        origin = first // BLOCK_N * BLOCK_N
        shared = tl.maximum(shared, first)
    if SCALED and q.dtype == tl.bfloat16:
        q, exponent = to_half(q)
        power *= exponent
    PRECISION: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    for i in tl.range(0, tl.cdiv(limit - origin, BLOCK_N)):
        key = origin + i * BLOCK_N
        base = offset_of(key, stride, ALIGNED, WIDE)
        offs_k = key + offs_n
        held = offs_k < limit
        if SCALED and TILED:
            held &= offs_k >= first
        mask = held[:, None]
        if D < BLOCK_D:
            mask &= (offs_d < D)[None, :]
        k = tl.load(k_ptr + base + offs, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if SCALED and TILED:
            offs_scale = key // tile * scale_stride
            s *= tl.load(k_scale_ptr + offs_scale)
            next_unit = tl.load(v_scale_ptr + offs_scale)
        elif SCALED:
            offs_scale = offs_k // tile * scale_stride
            s *= tl.load(k_scale_ptr + offs_scale, mask=held, other=0.0)[None, :]
        if (key < shared) | (key + BLOCK_N > shared_end):
            seen = (offs_k[None, :] >= start[:, None]) & (offs_k[None, :] < end[:, None])
            s = tl.where(seen & held[None, :], s, float("-inf"))
        largest = tl.maximum(peak, tl.max(s, 1) * power)
        # A row that has seen nothing yet: -inf minus -inf would be NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        p = tl.math.exp2(s * power[:, None] - shift[:, None])
        alpha = tl.math.exp2(peak - shift)
        total = total * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + base + offs, mask=mask, other=0.0)
        if SCALED and TILED:
            # The accumulator changes its unit with the scale: float16 would round p times that.
            p = tl.where(next_unit == 0.0, 0.0, p)
            next_unit = tl.where(next_unit == 0.0, unit, next_unit)
            alpha *= unit / next_unit
            unit = next_unit
        elif SCALED:
            p *= tl.load(v_scale_ptr + offs_scale, mask=held, other=0.0)[None, :]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * alpha[:, None], input_precision=PRECISION)
        peak = largest
    return acc, unit, peak, total


@triton.jit
def combine_parts(
    part_ptr,  # [splits, G * R, D]
    part_lse_ptr,  # [splits, G * R], in steps of log 2
    row,  # of G * R
    num_rows,  # G * R
    num_splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Output [BLOCK_D] and log-sum-exp of one row, from its parts in their order."""
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    largest = tl.full([], float("-inf"), tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        split = first + offs_s
        lse = tl.load(
            part_lse_ptr + split * num_rows + row,
            mask=split < num_splits,
            other=float("-inf"),
            cache_modifier=".cg",
        )
        largest = tl.maximum(largest, tl.max(lse, 0))
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        split = first + offs_s
        known = split < num_splits
        lse = tl.load(
            part_lse_ptr + split * num_rows + row,
            mask=known,
            other=float("-inf"),
            cache_modifier=".cg",
        )
        weight = tl.math.exp2(lse - shift)
        part = tl.load(
            part_ptr + (split.to(tl.int64) * num_rows + row)[:, None] * D + offs_d[None, :],
            mask=known[:, None] & (offs_d < D)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        acc += tl.sum(weight[:, None] * part, 0)
        total += tl.sum(weight, 0)
    return acc / tl.where(total == 0.0, 1.0, total), shift + tl.math.log2(total)
