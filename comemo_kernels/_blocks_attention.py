"""Block functions of attention over the image memory: loads, online softmax, split-K reduction."""

import triton
import triton.language as tl

from comemo_kernels._blocks import offset_of

LOG2E = 1.4426950408889634


@triton.jit
def columns(HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """Index in the head of each column of a block: each half is padded to a power of two."""
    offs_d = tl.arange(0, BLOCK_D)
    if 2 * HALF < BLOCK_D:
        inside = offs_d % (BLOCK_D // 2)
        # The padding of a half gets an index past the head, where masks are False.
        offs_d = tl.where(inside < HALF, offs_d // (BLOCK_D // 2) * HALF + inside, 2 * HALF)
    return offs_d


@triton.jit
def image_of(starts_ptr, keys, num_images):
    """Index of the image [N] that each key [N] belongs to."""
    count = tl.zeros_like(keys)
    for i in range(0, num_images, 64):
        image = i + tl.arange(0, 64)
        offsets = tl.load(starts_ptr + image, mask=image < num_images, other=2147483647)
        count += tl.sum((offsets[None, :] <= keys[:, None]).to(tl.int32), 1)
    return tl.maximum(count - 1, 0)


@triton.jit
def row_offsets(first, inside, head, group, num_heads, GROUPED: tl.constexpr):
    """Where rows `first + inside` of a key head are in [tokens, query heads].

    A row is a token and one of the `group` query heads that share the key head.

    Returns:
        The first row's offset, int64, and the offsets of all rows from it, int32 like `inside`.
    """
    if GROUPED:
        token = first // group
        row = first + inside
        base = token.to(tl.int64) * group * num_heads + head * group
        return base, (row // group - token) * group * num_heads + row % group
    return first.to(tl.int64) * num_heads + head, inside * num_heads


@triton.jit
def load_columns(ptrs, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of D elements, padded with zeros to BLOCK_D."""
    if D < BLOCK_D:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def narrow_ids(ids):
    """Clamp ids of any sign and size to int32, so that subtracting a bias >= 0 cannot overflow.

    A clamped id is further from every image than a rotary table reaches.
    """
    return tl.minimum(tl.maximum(ids, -1073741824), 2147483647).to(tl.int32)


@triton.jit
def share_of(low, high, split, num_splits, BLOCK: tl.constexpr):
    """Range of keys of one split: whole blocks; splits differ by at most one block."""
    blocks = tl.cdiv(tl.maximum(high - low, 0), BLOCK)
    share, more = blocks // num_splits, blocks % num_splits
    first = low + (split * share + tl.minimum(split, more)) * BLOCK
    share += (split < more).to(tl.int32)
    return first, tl.minimum(high, first + share * BLOCK)


@triton.jit
def to_half(q):
    """Rows in float16, and the power of two that each was divided by.

    float8 converts to float16 in one instruction and to bfloat16 in four, and float16 rounds
    softmax weights less. The largest element of a row moves into [1, 2): nothing overflows, and
    the loss in small elements is below the bfloat16 rounding of the largest.
    """
    largest = tl.max(tl.abs(q.to(tl.float32)), 1)
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.where(exponent == 0, 0x3F800000, exponent).to(tl.float32, bitcast=True)
    return (q.to(tl.float32) / power[:, None]).to(tl.float16), power


@triton.jit
def table_rows(
    table,  # cos_ptr and sin_ptr of [P, HALF], stride of P, P
    delta,  # [rows] of the table, of either sign
    mask,  # [rows, columns]
    offs,  # [columns]
    ALIGNED: tl.constexpr,
):
    """cos and sin [rows, columns] of angles; NaN beyond the table and outside the mask."""
    cos_ptr, sin_ptr, table_stride, num_positions = table
    row = tl.abs(delta)
    known = mask & ((row >= 0) & (row < num_positions))[:, None]  # the smallest integer has no abs
    ptrs = offset_of(row, table_stride, ALIGNED)[:, None] + offs[None, :]
    cos = tl.load(cos_ptr + ptrs, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + ptrs, mask=known, other=float("nan")).to(tl.float32)
    return cos, tl.where((delta < 0)[:, None], -sin, sin)


@triton.jit
def load_rotated(
    q_rows,  # [BLOCK_M] pointers
    mask_m,
    delta,  # [BLOCK_M] rows of the table, of either sign
    table,  # cos_ptr and sin_ptr of [P, HALF], stride of P, P
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Queries [BLOCK_M, BLOCK_D] in their dtype, rotated in float32."""
    offs_d = tl.arange(0, BLOCK_D // 2)
    mask = mask_m[:, None] & (offs_d < HALF)[None, :]
    x_ptrs = q_rows[:, None] + offs_d[None, :]
    # Volatile, because the compiler would hoist these loads out of the loop over images, into
    # registers.
    x1 = tl.load(x_ptrs, mask=mask, other=0.0, volatile=True).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0, volatile=True).to(tl.float32)
    cos, sin = table_rows(table, delta, mask, offs_d, ALIGNED)
    y1 = tl.where(mask, x1 * cos - x2 * sin, 0.0).to(q_rows.dtype.element_ty)
    y2 = tl.where(mask, x2 * cos + x1 * sin, 0.0).to(q_rows.dtype.element_ty)
    y = tl.permute(tl.join(y1, y2), (0, 2, 1))
    return tl.reshape(y, (x1.shape[0], BLOCK_D))


@triton.jit
def attend_keys(
    q,  # [BLOCK_M, BLOCK_D]
    state,  # acc, unit, peak, total; see below
    keys,  # pointers, strides and scales of one head; see below
    bounds,  # first, limit, shared, shared_end, start, end; see below
    D: tl.constexpr,
    HALF: tl.constexpr,
    SCALED: tl.constexpr,
    TILED: tl.constexpr,  # BLOCK_N divides a tile
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over blocks of keys; returns the new state.

    State: acc [BLOCK_M, BLOCK_D] in units of `unit`, the scale of the last values read (1 if not
    SCALED); peak [BLOCK_M], the largest score so far, in base 2; total [BLOCK_M], the sum of
    exp2(score - peak).
    Bounds: keys [first, limit) belong to one image; every row may read [shared, shared_end); row m
    may read [start[m], end[m]).
    """
    acc, unit, peak, total = state
    # k and v [M, D] of one head, stride of M of both; scales [T] of one head, stride of T.
    k_ptr, v_ptr, stride, k_scale_ptr, v_scale_ptr, scale_stride, tile, scale_log2 = keys
    first, limit, shared, shared_end, start, end = bounds
    WIDE: tl.constexpr = 16 if SCALED else 8  # elements in 128 bits: float8, or 16-bit dtypes
    offs_n, offs_d = tl.arange(0, BLOCK_N), columns(HALF, BLOCK_D)
    # Offsets within a block fit 32 bits, which take half the registers of pointers.
    rows = offs_n * stride.to(tl.int32)
    if ALIGNED:
        rows = tl.multiple_of(rows, WIDE)
    offs = rows[:, None] + offs_d[None, :]
    shared_end = tl.minimum(shared_end, limit)
    origin = first
    power = tl.full([q.shape[0]], 1.0, tl.float32) * scale_log2
    if SCALED and TILED:  # a block is within one tile and has one scale
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
        # A row may have seen no key yet: -inf minus -inf would be NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        p = tl.math.exp2(s * power[:, None] - shift[:, None])
        alpha = tl.math.exp2(peak - shift)
        total = total * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + base + offs, mask=mask, other=0.0)
        if SCALED and TILED:
            # Rescale the accumulator rather than p: p * scale would be rounded to float16.
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
    parts,  # pointers: outputs [splits, G * R, D], and log2-sum-exp [splits, G * R]
    row,  # in G * R
    num_rows,  # G * R
    num_splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Output [BLOCK_D] and log2-sum-exp of one row; splits are added in a fixed order."""
    part_ptr, part_lse_ptr = parts
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
