"""Attention over the image memory, from one query to a whole prompt.

    out = softmax(rotate(q, id - bias) k^T / sqrt(D)) v        over the keys [start, end) of a span
    lse = log sum exp of the same scores

One kernel at two block sizes. A block holds BLOCK_M rows, a row being a query token and one of the
query heads that share a key head, and reads once from the first to the last key that any of its
rows may: what batches, beams or drafts share is read once, and so is the memory of a batch whose
prompts have their own images, one behind the other.
Key blocks that every row of the block may read need no mask; only the others get one.
Keys are stored rotated by the id within their image. Queries are rotated on load by their own id
minus the image's bias, and again where a span passes into the next image.
With few blocks the keys are split over programs, and the parts are combined in the order of the
splits: twice the same input gives twice the same bits.

FLOPs: 4 * rows * keys * D for each head. Traffic: q and out once; keys and values once for every
BLOCK_M rows, of which L2 serves all but the first, 2 * keys * G * D elements; with splits 8 bytes
more for each element of out and split. Rows of the rotary table come from L2, D * 4 bytes for each
row and image.
Source: CoMemo (arXiv:2506.06279); online softmax and splits as in FlashAttention
(arXiv:2205.14135, arXiv:2307.08691).

Letters: B batch, N tokens, H query heads, M memory, G key heads, D head dimension, R rows of one
key head (B * N * H / G), P rows of the rotary table, I images, T tiles.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels import _attend_tma, reference
from comemo_kernels._blocks import NEW, await_previous, let_next_begin, offset_of, prefetch
from comemo_kernels._blocks_attention import (
    LOG2E,
    attend_keys,
    columns,
    combine_parts,
    load_rotated,
    narrow_ids,
    share_of,
)
from comemo_kernels._checks import check_attention, check_read, check_workspace
from comemo_kernels._op import (
    Kernel,
    documented,
    has_float8,
    launches_early,
    multiprocessors,
    on_triton,
    register,
)
from comemo_kernels.attention_types import AttentionWorkspace, MemoryScales, QueryRotation

# --- kernel ---


# Strides and sizes stand one by one: in a tuple they would specialise.
@triton.jit(
    do_not_specialize=[
        *("q_stride_b", "q_stride_n", "q_stride_h", "kv_stride_m", "kv_stride_g"),
        *("spans_stride_b", "spans_stride_n", "table_stride"),
        *("ids_stride_b", "ids_stride_n", "biases_stride_b"),
        *("num_tokens", "num_rows", "num_keys", "num_heads", "group", "num_positions"),
        *("num_images", "tile", "num_blocks", "num_splits", "scale_log2"),
    ]
)
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
    SCALED: tl.constexpr,  # keys and values are stored scaled
    TILED: tl.constexpr,  # BLOCK_N divides the keys that share a scale
    D: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,  # strides of q, k, v and the table are multiples of 8, of float8 of 16
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,  # keys that L2 is asked for before queries are rotated
    FUSED: tl.constexpr,  # the last split of a block to finish combines them all
    EARLY: tl.constexpr,  # or a launch that may begin while this one ends, and waits for it
):
    """One program attends BLOCK_M rows of one key head to one part of their keys."""
    if EARLY:
        let_next_begin()
    pid = tl.program_id(0)
    # Blocks of rows lie side by side: they read the same keys, of which L2 then holds few heads.
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
    # What all rows may read; rows behind the last one restrict nothing.
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
    k_head = (
        k_ptr + head_offset,
        v_ptr + head_offset,
        kv_stride_m,
        k_scale_ptr + head,
        v_scale_ptr + head,
        num_heads,
        tile,
        scale_log2,
    )
    if AHEAD > 0:  # L2 fetches the first keys and values while queries wait for ids and table
        rows = low + tl.arange(0, AHEAD)
        LINE: tl.constexpr = 1024 // k_ptr.dtype.element_ty.primitive_bitwidth  # of 128 bytes
        lines = tl.arange(0, (BLOCK_D + LINE - 1) // LINE) * LINE
        ahead = head_offset + offset_of(rows, kv_stride_m, ALIGNED)[:, None] + lines[None, :]
        there = (rows < high)[:, None] & (lines < D)[None, :]
        prefetch(k_ptr + ahead, there)
        prefetch(v_ptr + ahead, there)
    acc, unit = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), 1.0
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
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
            q = load_rotated(
                *(q_rows, mask_m, ids - bias, cos_ptr, sin_ptr, table_stride, num_positions),
                *(HALF, ALIGNED, BLOCK_D),
            )
            acc, unit, peak, total = attend_keys(
                *(q, acc, unit, peak, total),
                *k_head,
                *(segment, tl.minimum(next_image, high), shared, shared_end, start, end),
                *(D, HALF, SCALED, TILED, ALIGNED, BLOCK_D, BLOCK_N),
            )
    else:
        if ROTATE == "no":
            q = tl.load(q_rows[:, None] + offs_d[None, :], mask=mask_md, other=0.0)
        else:
            if ROTATE == "one":
                ids -= tl.load(bias_ptrs, mask=mask_m, other=0)
            q = load_rotated(
                *(q_rows, mask_m, ids, cos_ptr, sin_ptr, table_stride, num_positions),
                *(HALF, ALIGNED, BLOCK_D),
            )
        acc, unit, peak, total = attend_keys(
            *(q, acc, unit, peak, total),
            *k_head,
            *(low, high, shared, shared_end, start, end),
            *(D, HALF, SCALED, TILED, ALIGNED, BLOCK_D, BLOCK_N),
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
            tl.debug_barrier()  # all of this program's parts are written before it says so
            done = tl.atomic_add(count_ptr + head * num_blocks + pid_m, 1, sem="acq_rel")
            if done == num_splits - 1:
                tl.store(count_ptr + head * num_blocks + pid_m, 0)
                for r in range(pid_m * BLOCK_M, tl.minimum((pid_m + 1) * BLOCK_M, num_rows)):
                    y, lse_r = combine_parts(
                        *(part_ptr, part_lse_ptr, head * num_rows + r, num_heads * num_rows),
                        *(num_splits, D, BLOCK_D, 16),
                    )
                    offs_r = (r // group) * group * num_heads + head * group + r % group
                    offs_y = tl.arange(0, BLOCK_D)
                    tl.store(out_ptr + offs_r.to(tl.int64) * D + offs_y, y, mask=offs_y < D)
                    tl.store(lse_ptr + offs_r, lse_r * LN2)
    else:
        tl.store(out_ptr + offs_out[:, None] * D + offs_d[None, :], acc, mask=mask_md)
        tl.store(lse_ptr + offs_out, lse * LN2, mask=mask_m)


@triton.jit(do_not_specialize=["num_rows", "num_heads", "group", "num_splits"])
def _combine_kernel(
    out_ptr,  # [B, N, H, D], contiguous
    lse_ptr,  # [B, N, H]
    part_ptr,  # [splits, G * R, D]
    part_lse_ptr,  # [splits, G * R]
    num_rows,  # R
    num_heads,  # G
    group,
    num_splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,  # began before the parts were written
):
    """One program combines the parts of one row."""
    if EARLY:
        await_previous()
    LN2: tl.constexpr = 0.6931471805599453
    pid = tl.program_id(0)
    row, head = pid // num_heads, pid % num_heads
    y, lse = combine_parts(
        *(part_ptr, part_lse_ptr, head * num_rows + row, num_heads * num_rows, num_splits),
        *(D, BLOCK_D, BLOCK_S),
    )
    offs = (row // group).to(tl.int64) * group * num_heads + head * group + row % group
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + offs * D + offs_d, y, mask=offs_d < D)
    tl.store(lse_ptr + offs, lse * LN2)


PLAIN = {"AHEAD": 0, "FUSED": 0, "EARLY": 0}
# Blocks of a prompt; of a batch in a decode step; of one conversation's; in float32.
attend_many = Kernel(
    _attend_kernel,
    [
        {"BLOCK_M": 128, "BLOCK_N": 64, **PLAIN, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 64, **PLAIN, "num_warps": 8, "num_stages": 2},
    ],
)
attend_few = Kernel(
    _attend_kernel,
    [
        {"BLOCK_M": 16, "BLOCK_N": 64, **PLAIN, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 16, "BLOCK_N": 32, **PLAIN, "num_warps": 2, "num_stages": 4},
        {"BLOCK_M": 16, "BLOCK_N": 64, **PLAIN, "num_warps": 4, "num_stages": 4},
    ],
)
# Two launches, one behind the other, until a GPU has run what leans on the order of accesses.
attend_one = Kernel(
    _attend_kernel,
    [
        {"BLOCK_M": 16, "BLOCK_N": 64, **how, "num_warps": 4, "num_stages": 3}
        for how in (
            PLAIN,
            {"AHEAD": 256, "FUSED": 0, "EARLY": 0},
            {"AHEAD": 256, "FUSED": 1, "EARLY": 0},
            *([{"AHEAD": 256, "FUSED": 0, "EARLY": 1}] if NEW else []),
        )
    ],
)
attend_exact = Kernel(
    _attend_kernel,
    [
        {"BLOCK_M": 16, "BLOCK_N": 16, **PLAIN, "num_warps": 8, "num_stages": 2},
    ],
)
combine = Kernel(_combine_kernel, [{"BLOCK_S": 16, "EARLY": 0, "num_warps": 2}])
combine_early = combine
if NEW:
    combine_early = Kernel(
        _combine_kernel, [{"BLOCK_S": 16, "EARLY": 1, "num_warps": 2, "launch_pdl": True}]
    )

# --- operator ---

ONE, FEW = 4, 64  # rows of a key head, up to which attend_one and attend_few are taken
MAX_SPLITS = 64
USE_TMA = False  # for prompts that `_attend_tma` takes; off until a GPU has decided


def _kernel_for(dtype: torch.dtype, rows: int) -> Kernel:
    if dtype == torch.float32:
        return attend_exact
    return attend_one if rows <= ONE else attend_few if rows <= FEW else attend_many


def _choose_splits(q: Tensor, k: Tensor) -> int:
    """Programs over which the keys of a block are split, so that every multiprocessor has work."""
    (B, N, H, _), (M, G, _) = q.shape, k.shape
    rows = B * N * H // G
    kernel, slots = _kernel_for(q.dtype, rows), multiprocessors(q.get_device())
    programs = max(-(-rows // kernel.config["BLOCK_M"]) * G, 1)
    if rows <= FEW:
        slots *= 2  # blocks of few rows leave room for two on a multiprocessor
    elif 5 * programs >= 4 * slots:
        return 1
    blocks = -(-M // kernel.config["BLOCK_N"])
    most = max(1, min(slots // programs, blocks // 2, MAX_SPLITS))  # two blocks of keys at least
    return -(-blocks // -(-blocks // most)) if blocks else 1  # as few as make none take more


@functools.lru_cache(maxsize=1024)
def _plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    spans_shape: tuple[int, ...],
    spans_strides: tuple[int, ...],
    table: tuple[tuple[int, ...], tuple[int, ...]],  # shape, strides
    ids: tuple[tuple[int, ...], tuple[int, ...]],
    biases: tuple[tuple[int, ...], tuple[int, ...]],
    rotate: str,
    scaled: bool,
    tile: int,
    splits: int,
    block: int,
    block_keys: int,
) -> tuple[int, tuple[Any, ...], tuple[Any, ...]]:
    """Programs, numbers and compile-time values of a launch, in the kernel's order."""
    B, N, H, D = q_shape
    M, G = k_shape[:2]
    rows = B * N * H // G
    blocks = -(-rows // block)
    strides = (*q_strides[:3], *k_strides[:2])
    table_stride = table[1][0] if rotate != "no" else 0
    spans_n = spans_strides[1] if spans_shape[1] > 1 else 0
    numbers = (*strides, spans_strides[0], spans_n, table_stride)
    if rotate == "no":
        numbers += (0, 0, 0)
    else:
        numbers += (ids[1][0] if ids[0][0] > 1 else 0, ids[1][1])
        numbers += (biases[1][0] if rotate in ("one", "several") and biases[0][0] > 1 else 0,)
    images = biases[0][1] if rotate == "several" else 0
    positions = table[0][0] if rotate != "no" else 0
    numbers += (N, rows, M, G, H // G, positions, images, tile, blocks, splits)
    aligned = all(stride % 8 == 0 for stride in (*strides, table_stride))
    aligned &= not scaled or all(stride % 16 == 0 for stride in k_strides[:2])
    half = -(-D // 2)
    wide = max(16, 2 << (half - 1).bit_length())
    tiled = scaled and tile % block_keys == 0
    constants = (rotate, scaled, tiled, D, half, aligned, splits > 1, wide)
    return blocks * G * splits, (*numbers, LOG2E / D**0.5), constants


def _launch_into(
    out: Tensor,
    lse: Tensor,
    parts: Tensor,
    part_lse: Tensor,
    counts: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    *optional: Any,  # cos, sin, ids, starts, biases, k_scale, v_scale, tile
) -> None:
    *tensors, tile = optional
    cos, _, ids, starts, biases, k_scale, _ = tensors
    B, N, H, _ = q.shape
    if not out.numel():
        return
    rotate, splits, rows = "no", parts.shape[0], B * N * H // k.shape[1]
    if cos is not None:
        images = 0 if starts is None else starts.shape[0]
        rotate = ("ids", "one", "several")[min(images, 2)]
    kernel = _kernel_for(q.dtype, rows)
    programs, numbers, constants = _plan(
        *(q.shape, q.stride(), k.shape, k.stride(), spans.shape, spans.stride()),
        *(((), ()) if t is None else (t.shape, t.stride()) for t in (cos, ids, biases)),
        *(rotate, k_scale is not None, tile, splits),
        *(kernel.config["BLOCK_M"], kernel.config["BLOCK_N"]),
    )
    pointers = [out, lse, parts, part_lse, counts, q, k, v, spans]
    pointers += [q if t is None else t for t in tensors]
    kernel.launch(programs, *pointers, *numbers, *constants)
    if splits > 1 and not kernel.config["FUSED"]:
        early = kernel.config["EARLY"] and launches_early(q.get_device())
        way = combine_early if early else combine
        _launch_combine(way, out, lse, parts, part_lse, q, k)


def _launch_combine(
    way: Kernel,
    out: Tensor,
    lse: Tensor,
    parts: Tensor,  # [splits, G, R, D]
    part_lse: Tensor,
    q: Tensor,
    k: Tensor,
) -> None:
    (splits, G, rows, D), H = parts.shape, q.shape[2]
    wide = 1 << (D - 1).bit_length()
    way.launch(*(rows * G, out, lse, parts, part_lse, rows, G, H // G, splits, D, wide))


def _allocate(q: Tensor, k: Tensor, splits: int, lasting: bool = False) -> AttentionWorkspace:
    (B, N, H, D), G = q.shape, k.shape[1]
    rows, float32 = B * N * H // G, {"dtype": torch.float32, "device": q.device}
    part = (splits, G, rows, D)
    counted = lasting or (splits > 1 and _kernel_for(q.dtype, rows).config["FUSED"])
    return AttentionWorkspace(
        *_fake(q),
        torch.empty(part, **float32) if splits > 1 else torch.empty(1, **float32).expand(part),
        torch.empty(part[:-1] if splits > 1 else 1, **float32),
        (torch.zeros if counted else torch.empty)(G * rows, dtype=torch.int32, device=q.device),
    )


def _launch(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, *optional: Any) -> tuple[Tensor, ...]:
    splits = _choose_splits(q, k)
    workspace = _allocate(q, k, splits)
    if (
        USE_TMA
        and q.shape[0] * q.shape[1] * q.shape[2] // k.shape[1] > FEW
        and _attend_tma.fits(splits, q, k, v, spans, *optional)
    ):
        _attend_tma.launch(*workspace[:4], q, k, v, spans, *optional[:5])
        if splits > 1:
            _launch_combine(combine, *workspace[:4], q, k)
    else:
        _launch_into(*workspace, q, k, v, spans, *optional)
    return workspace.out, workspace.lse


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty(q.shape[:3], dtype=torch.float32, device=q.device),
    )


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor spans, Tensor? cos, Tensor? sin, Tensor? ids,"
    " Tensor? starts, Tensor? biases, Tensor? k_scale, Tensor? v_scale, int tile"
)
_attend = register(f"attend({_ARGUMENTS}) -> (Tensor, Tensor)", _launch, _fake)
_attend_ = register(
    "attend_(Tensor(a!) out, Tensor(b!) lse, Tensor(c!) parts, Tensor(d!) part_lse,"
    f" Tensor(e!) counts, {_ARGUMENTS}) -> ()",
    _launch_into,
    lambda *_: None,
)

# --- public ---


@documented(reference.attend_spans)
def attend_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    rotation: QueryRotation | None = None,
    scales: MemoryScales | None = None,
    return_lse: bool = False,
    validate: bool = False,
    workspace: AttentionWorkspace | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if not on_triton(q) or (differentiable and workspace is None):
        return reference.attend_spans(
            q, k, v, spans, rotation, scales, return_lse, validate, workspace
        )
    check_attention(q, k, v, spans, rotation, scales, workspace)
    _check_kernel(q, k, v, spans, rotation, scales, workspace, differentiable)
    if validate:
        check_read(k.shape[0], spans, None if rotation is None else rotation.starts)
    rotate = (None,) * 5 if rotation is None else rotation
    scale = (None, None, 1) if scales is None else scales
    if workspace is None:
        out, lse = _attend(q, k, v, spans, *rotate, *scale)
    else:
        return_lse = bool(return_lse)  # which may fail: before anything is written
        _attend_(*workspace, q, k, v, spans, *rotate, *scale)
        out, lse = workspace.out, workspace.lse
    return (out, lse) if return_lse else out


@documented(reference.attention_workspace)
def attention_workspace(q: Tensor, k: Tensor, splits: int | None = None) -> AttentionWorkspace:
    if not on_triton(q):
        return reference.attention_workspace(q, k, splits)
    check_workspace(q, k, splits)
    return _allocate(q, k, _choose_splits(q, k) if splits is None else int(splits), lasting=True)


def _check_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    rotation: QueryRotation | None,
    scales: MemoryScales | None,
    workspace: AttentionWorkspace | None,
    differentiable: bool,
) -> None:
    """Raise for what the references can do and the kernel cannot, with every reason."""
    reasons = []
    if differentiable:
        reasons.append("a workspace excludes gradients")
    if q.dtype == torch.float64:
        reasons.append("float64 has no kernel")
    if any(t.stride(-1) != 1 and t.shape[-1] > 1 for t in (q, k, v)):
        reasons.append(
            f"D must be contiguous, got strides {q.stride()} of q, {k.stride()} of k, {v.stride()}"
            " of v"
        )
    if k.stride() != v.stride():
        reasons.append(f"k and v must have one layout, got {k.stride()} and {v.stride()}")
    if q.shape[-1] > 256:
        reasons.append(f"D must be at most 256, got {q.shape[-1]}")
    if rotation is not None and 2 * rotation.cos.shape[1] != q.shape[-1]:
        reasons.append(
            f"the whole head must be rotated, got {2 * rotation.cos.shape[1]} of {q.shape[-1]}"
        )
    if rotation is not None and (
        rotation.cos.stride() != rotation.sin.stride() or rotation.cos.stride(-1) != 1
    ):
        reasons.append(
            f"cos and sin must have one layout, R/2 contiguous, got {rotation.cos.stride()} and"
            f" {rotation.sin.stride()}"
        )
    if spans.stride(-1) != 1:
        reasons.append(f"start and end of a span must be adjacent, got strides {spans.stride()}")
    tight = [] if scales is None else [scales.keys, scales.values]
    if rotation is not None and rotation.starts is not None and rotation.biases is not None:
        tight += [rotation.starts, *rotation.biases[:1]]
    if any(not t.is_contiguous() for t in tight):
        reasons.append("scales, starts and rows of biases must be contiguous")
    if workspace is not None:
        used = workspace if workspace.parts.shape[0] > 1 else (*workspace[:2], workspace.counts)
        if any(not t.is_contiguous() for t in used):
            reasons.append(
                "the workspace must be contiguous, as attention_workspace makes it, got strides"
                f" {[t.stride() for t in used]}"
            )
    if scales is not None and q.is_cuda and not has_float8(q.get_device()):
        reasons.append("float8 needs a GPU of compute capability 8.9")
    if reasons:
        raise ValueError(
            f"attend_spans: on a GPU {'; '.join(reasons)}: or use"
            " comemo_kernels.reference.attend_spans"
        )
