"""Kernel that rotates queries and keys in one launch (RoPE-DHR).

    y1 = x1 * cos[p] - x2 * sin[p]
    y2 = x2 * cos[p] + x1 * sin[p]        x = [x1, x2, rest] along D,  p = position of the token

With INVERSE it is its own gradient: a rotation is orthogonal, so the sign of sin changes.
Traffic: q and k read once and written once, B * N * (H + G) * D * 2 elements (in place with
R < D only the rotated part), and per token its id of 4 or 8 bytes. Table rows are read once per
token and group of BLOCK_H heads; the rows of images, 256 for any number of tiles, stay in L2.
Source: CoMemo (arXiv:2506.06279); halves, not pairs, are rotated, as in Llama.

Letters: B batch, N tokens, H query heads, G key heads, D head dimension, R rotated part of it,
P rows of the table, I images.
"""

import triton
import triton.language as tl

from comemo_kernels._blocks import image_position, offset_of
from comemo_kernels._op import Kernel, jit


@triton.jit
def _rotate_heads(
    y,  # pointer to [B, N, H, D], strides of B, N, H; D is contiguous
    x,
    row,  # batch, token [BLOCK_T * BLOCK_H], head [BLOCK_T * BLOCK_H]
    mask_r,  # [BLOCK_T * BLOCK_H]
    cos,  # [BLOCK_T * BLOCK_H, BLOCK_D]
    sin,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotate one head of one token in each of BLOCK_T * BLOCK_H rows, and store it."""
    y_ptr, y_stride_b, y_stride_n, y_stride_h = y
    x_ptr, x_stride_b, x_stride_n, x_stride_h = x
    batch, token, head = row
    x_rows = x_ptr + offset_of(batch, x_stride_b, ALIGNED) + offset_of(token, x_stride_n, ALIGNED)
    y_rows = y_ptr + offset_of(batch, y_stride_b, ALIGNED) + offset_of(token, y_stride_n, ALIGNED)
    x_rows += offset_of(head, x_stride_h, ALIGNED)
    y_rows += offset_of(head, y_stride_h, ALIGNED)
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_r[:, None] & (offs_d < HALF)[None, :]
    x_ptrs, y_ptrs = x_rows[:, None] + offs_d[None, :], y_rows[:, None] + offs_d[None, :]
    x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(cos.dtype)
    x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(cos.dtype)
    tl.store(y_ptrs, x1 * cos - x2 * sin, mask=mask)
    tl.store(y_ptrs + HALF, x2 * cos + x1 * sin, mask=mask)
    if REST > 0:
        offs_rest = tl.arange(0, BLOCK_REST)
        mask = mask_r[:, None] & (offs_rest < REST)[None, :]
        offs = 2 * HALF + offs_rest[None, :]
        tl.store(y_rows[:, None] + offs, tl.load(x_rows[:, None] + offs, mask=mask), mask=mask)


@triton.jit
def _find_positions(
    ids,  # pointer, strides of B and N
    sizes,  # num_tokens, num_images, num_steps
    batch,
    token,
    POSITIONS: tl.constexpr,
    SIDE: tl.constexpr,
    COLUMN: tl.constexpr,
    THUMBNAIL: tl.constexpr,
):
    """Position ids of tokens; any number for padding tokens."""
    ids_ptr, ids_stride_b, ids_stride_n = ids
    num_tokens, num_images, num_steps = sizes
    if POSITIONS == "table":
        position = token
    elif POSITIONS == "ids":
        ids_ptrs = ids_ptr + batch * ids_stride_b + token * ids_stride_n
        position = tl.load(ids_ptrs, mask=token < num_tokens, other=0)
    else:
        place = batch * num_tokens + token
        position = image_position(ids_ptr, place, num_images, num_steps, SIDE, COLUMN, THUMBNAIL)
    return position


@triton.jit
def _load_table(
    table,  # cos_ptr, sin_ptr, strides of B, N
    batch,
    token,
    position,
    mask_t,
    num_rows,
    POSITIONS: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """cos and sin [BLOCK_T * BLOCK_H, BLOCK_D] of tokens."""
    cos_ptr, sin_ptr, table_stride_b, table_stride_n = table
    known = mask_t
    if POSITIONS == "table":
        row = offset_of(batch, table_stride_b, ALIGNED)
        row = row + offset_of(token, table_stride_n, ALIGNED)
    else:
        known &= (position >= 0) & (position < num_rows)
        row = offset_of(position, table_stride_n, ALIGNED)
    offs_d = tl.arange(0, BLOCK_D)
    mask = known[:, None] & (offs_d < HALF)[None, :]
    offs = row[:, None] + offs_d[None, :]
    cos = tl.load(cos_ptr + offs, mask=mask, other=float("nan"))
    sin = tl.load(sin_ptr + offs, mask=mask, other=float("nan"))
    return cos, sin


@jit
def _rotary_kernel(
    q_out_ptr,  # [B, N, H, D], D contiguous
    k_out_ptr,  # [B, N, G, D]
    q_ptr,
    k_ptr,
    cos_ptr,  # [P, R/2] by id, [B, N, R/2] by token
    sin_ptr,
    ids_ptr,  # [B, N] ids, or [I, 4] grids
    q_out_stride_b: tl.int64,
    q_out_stride_n: tl.int64,
    q_out_stride_h: tl.int64,
    k_out_stride_b: tl.int64,
    k_out_stride_n: tl.int64,
    k_out_stride_h: tl.int64,
    q_stride_b: tl.int64,
    q_stride_n: tl.int64,
    q_stride_h: tl.int64,
    k_stride_b: tl.int64,
    k_stride_n: tl.int64,
    k_stride_h: tl.int64,
    table_stride_b: tl.int64,  # of B and N; with positions 0 and the stride of P
    table_stride_n: tl.int64,
    ids_stride_b: tl.int64,
    ids_stride_n: tl.int64,
    num_tokens,  # N
    num_rows,  # P
    num_images,
    num_steps,  # bit length of num_images
    num_q_heads,
    num_k_heads,
    POSITIONS: tl.constexpr,  # "table": a row for each token; "ids"; "grids"
    SIDE: tl.constexpr,
    COLUMN: tl.constexpr,
    THUMBNAIL: tl.constexpr,
    INVERSE: tl.constexpr,
    ROUND: tl.constexpr,  # cos and sin to the dtype of q first
    HALF: tl.constexpr,  # R / 2
    REST: tl.constexpr,  # elements to copy after the rotated ones
    ALIGNED: tl.constexpr,  # all strides except those of ids are multiples of 8
    BLOCK_D: tl.constexpr,  # HALF rounded up to a power of two
    BLOCK_REST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STEPS: tl.constexpr,  # token blocks; ids of the next are loaded before this one is rotated
):
    """One program rotates BLOCK_H heads, of q or of k, of STEPS * BLOCK_T tokens of a batch row."""
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    # Head groups are the fastest axis: those of a token block share its table rows in L2.
    q_groups = tl.cdiv(num_q_heads, BLOCK_H)
    groups = q_groups + tl.cdiv(num_k_heads, BLOCK_H)
    pid_h, pid_t = pid % groups, pid // groups
    blocks = tl.cdiv(num_tokens, BLOCK_T * STEPS)
    batch = pid_t // blocks
    # Token and head share an axis: a thread then holds 8 bf16, 128 bits, of each half.
    offs_r = tl.arange(0, BLOCK_T * BLOCK_H)
    first = (pid_t % blocks) * (BLOCK_T * STEPS)
    token = first + offs_r // BLOCK_H
    ids = (ids_ptr, ids_stride_b, ids_stride_n)
    table = (cos_ptr, sin_ptr, table_stride_b, table_stride_n)
    sizes = (num_tokens, num_images, num_steps)
    position = _find_positions(ids, sizes, batch, token, POSITIONS, SIDE, COLUMN, THUMBNAIL)
    steps = 1 if STEPS == 1 else tl.minimum(STEPS, tl.cdiv(num_tokens - first, BLOCK_T))
    for _ in range(steps):
        following = position
        if STEPS > 1:
            following = _find_positions(
                ids, sizes, batch, token + BLOCK_T, POSITIONS, SIDE, COLUMN, THUMBNAIL
            )
        mask_t = token < num_tokens
        cos, sin = _load_table(
            table, batch, token, position, mask_t, num_rows, POSITIONS, HALF, ALIGNED, BLOCK_D
        )
        if ROUND:
            cos = cos.to(q_ptr.dtype.element_ty)
            sin = sin.to(q_ptr.dtype.element_ty)
        cos = cos.to(ACC)
        sin = sin.to(ACC)
        if INVERSE:
            sin = -sin
        # Names differ, because those set in both branches would become results of the `if`.
        if pid_h < q_groups:
            q_head = pid_h * BLOCK_H + offs_r % BLOCK_H
            q_out = (q_out_ptr, q_out_stride_b, q_out_stride_n, q_out_stride_h)
            q = (q_ptr, q_stride_b, q_stride_n, q_stride_h)
            q_row, q_mask = (batch, token, q_head), mask_t & (q_head < num_q_heads)
            _rotate_heads(
                q_out, q, q_row, q_mask, cos, sin, HALF, REST, ALIGNED, BLOCK_D, BLOCK_REST
            )
        else:
            k_head = (pid_h - q_groups) * BLOCK_H + offs_r % BLOCK_H
            k_out = (k_out_ptr, k_out_stride_b, k_out_stride_n, k_out_stride_h)
            k = (k_ptr, k_stride_b, k_stride_n, k_stride_h)
            k_row, k_mask = (batch, token, k_head), mask_t & (k_head < num_k_heads)
            _rotate_heads(
                k_out, k, k_row, k_mask, cos, sin, HALF, REST, ALIGNED, BLOCK_D, BLOCK_REST
            )
        token += BLOCK_T
        position = following


rotary_kernel = Kernel(
    _rotary_kernel,
    [
        {"BLOCK_T": t, "BLOCK_H": h, "STEPS": steps, "num_warps": warps}
        # Each head group reads the table rows of its tokens: few, large groups read them least.
        for t, h, steps, warps in (
            (4, 8, 1, 4),
            (8, 4, 1, 4),
            (8, 8, 1, 8),
            (8, 8, 1, 4),
            (4, 4, 1, 4),
            (4, 8, 4, 8),
            (4, 8, 8, 8),
        )
    ],
)
