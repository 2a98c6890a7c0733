"""Attention kernel for prefill on Hopper, with keys and values loaded by TMA.

It computes what `_attend_kernel` does, for prompts that read one span each, and overlaps the GEMMs
of one key block with the softmax of the next. A launch of its own rotates the queries, so that the
tensor cores read them from shared memory as loaded. If a prompt reads several images, another
launch rotates its keys into scratch memory, from the ids of their images to those of the prompt,
relative to the first image that the span reads: then no query is rotated again at the border of an
image.
Traffic on top of the attention's: 4 * rows * D bytes for the queries, and 4 * keys * G * D for the
keys of several images, in bfloat16: 36 us for 13,312 keys of 16 heads at 3.0 TB/s.

They overlap by instruction order: the second GEMM of a block is waited for after the softmax of the
next block. `attention.USE_TMA` enables the kernel, where the keys are not split.
Source: FlashAttention-3 (arXiv:2407.08608) for the overlap.

Letters: B batch, N tokens, H query heads, M memory, G key heads, D head dimension, I images.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels import _descriptors
from comemo_kernels._blocks import offset_of
from comemo_kernels._blocks_attention import (
    LOG2E,
    image_of,
    load_rotated,
    narrow_ids,
)
from comemo_kernels._op import INTERPRET, Kernel, is_hopper, jit

# --- kernels ---


@jit
def _turn_kernel(
    y_ptr,  # [B, N, H, D], contiguous
    x_ptr,  # [B, N, H, D], D contiguous: queries, or keys as one batch row
    cos_ptr,  # [P, D/2]
    sin_ptr,
    ids_ptr,  # [B, N] of queries
    starts_ptr,  # [I]
    biases_ptr,  # [B or 1, I]
    spans_ptr,  # [B, 1, 2]
    x_stride_b: tl.int64,
    x_stride_n: tl.int64,
    x_stride_h: tl.int64,
    ids_stride_b: tl.int64,
    ids_stride_n: tl.int64,
    biases_stride_b: tl.int64,
    spans_stride_b: tl.int64,
    table_stride: tl.int64,
    num_tokens,  # N
    num_heads,  # H
    num_keys,  # M
    num_positions,  # P
    num_images,  # I
    KEYS: tl.constexpr,  # x are keys, rotated by the bias of their image; else queries, by their id
    BIASED: tl.constexpr,  # subtract the bias of the first image that the span reads
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program rotates one head of BLOCK_M tokens of a batch row."""
    pid = tl.program_id(0)
    head, rest = pid % num_heads, pid // num_heads
    blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch, token = rest // blocks, rest % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = token < num_tokens
    biases_ptr += batch * biases_stride_b
    spans_ptr += batch * spans_stride_b
    if KEYS:  # keys outside the span may be uninitialised and are left out
        mask &= (token >= tl.load(spans_ptr)) & (token < tl.load(spans_ptr + 1))
        ids = tl.load(biases_ptr + image_of(starts_ptr, token, num_images), mask=mask, other=0)
    else:
        ids = tl.load(ids_ptr + batch * ids_stride_b + token * ids_stride_n, mask=mask, other=0)
        ids = narrow_ids(ids)
    if BIASED:
        start = tl.minimum(tl.maximum(tl.load(spans_ptr), 0), num_keys).to(tl.int32)
        first = tl.full([1], 0, tl.int32) + start
        ids -= tl.max(tl.load(biases_ptr + image_of(starts_ptr, first, num_images)), 0)
    x_rows = x_ptr + offset_of(batch, x_stride_b, True) + offset_of(token, x_stride_n, True)
    x_rows += offset_of(head, x_stride_h, True)
    table = (cos_ptr, sin_ptr, table_stride, num_positions)
    y = load_rotated(x_rows, mask, ids, table, HALF, True, 2 * HALF)
    row = (batch * num_tokens + token).to(tl.int64) * num_heads + head
    y_ptrs = y_ptr + row[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(y_ptrs, y, mask=mask[:, None])


@triton.jit
def _weigh(s, peak, total, scale_log2, MASKED: tl.constexpr):
    """Softmax weights of scores [BLOCK_M, BLOCK_N], rescaling of acc, new peak and new total."""
    largest = tl.maximum(peak, tl.max(s, 1) * scale_log2)
    shift = largest
    if MASKED:  # a row may have seen no key: -inf minus -inf would be NaN
        shift = tl.where(largest == float("-inf"), 0.0, largest)
    p = tl.math.exp2(s * scale_log2 - shift[:, None])
    alpha = tl.math.exp2(peak - shift)
    return p, alpha, largest, total * alpha + tl.sum(p, 1)


@jit
def _tma_kernel(
    out_ptr,  # [B, N, H, D], contiguous
    lse_ptr,  # [B, N, H], contiguous
    q_ptr,  # [B, N, H, D], D contiguous, rotated
    k_ptr,  # [M, G, D], D contiguous
    v_ptr,  # [M, G, D], D contiguous
    spans_ptr,  # [B, 1, 2]
    q_stride_b: tl.int64,
    q_stride_n: tl.int64,
    q_stride_h: tl.int64,
    kv_stride_m: tl.int64,
    kv_stride_g: tl.int64,
    v_stride_m: tl.int64,
    v_stride_g: tl.int64,
    spans_stride_b: tl.int64,
    num_tokens,  # N
    num_keys,  # M
    num_heads,  # H
    group,  # H / G
    scale_log2,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program attends BLOCK_M tokens of one head and batch row to the row's span."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(num_tokens, BLOCK_M)
    pid_m, rest = pid % blocks, pid // blocks
    head, batch = rest % num_heads, rest // num_heads
    spans_ptr += batch * spans_stride_b
    start = tl.maximum(tl.load(spans_ptr), 0).to(tl.int32)
    end = tl.minimum(tl.load(spans_ptr + 1), num_keys).to(tl.int32)
    length = tl.maximum(end - start, 0)
    # A descriptor needs at least one row: for an empty span any valid one.
    start = tl.minimum(start, num_keys - 1)
    rows = tl.maximum(length, 1)
    q_rows = q_ptr + offset_of(batch, q_stride_b, True) + offset_of(head, q_stride_h, True)
    k_rows = k_ptr + offset_of(start, kv_stride_m, True)
    k_rows += offset_of(head // group, kv_stride_g, True)
    v_rows = v_ptr + offset_of(start, v_stride_m, True)
    v_rows += offset_of(head // group, v_stride_g, True)
    q_tiles = tl.make_tensor_descriptor(q_rows, [num_tokens, D], [q_stride_n, 1], [BLOCK_M, D])
    k_tiles = tl.make_tensor_descriptor(k_rows, [rows, D], [kv_stride_m, 1], [BLOCK_N, D])
    v_tiles = tl.make_tensor_descriptor(v_rows, [rows, D], [v_stride_m, 1], [BLOCK_N, D])
    q = q_tiles.load([pid_m * BLOCK_M, 0])
    offs_n = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    # Scores are computed a block ahead. The compiler leaves the second GEMM of an iteration in
    # flight until it waits for the first GEMM of the next, after the softmax.
    s = tl.dot(q, tl.trans(k_tiles.load([0, 0])))
    last = tl.maximum(tl.cdiv(length, BLOCK_N) - 1, 0)
    for i in tl.range(0, last):
        p, alpha, peak, total = _weigh(s, peak, total, scale_log2, False)
        p = p.to(q_ptr.dtype.element_ty)
        s = tl.dot(q, tl.trans(k_tiles.load([(i + 1) * BLOCK_N, 0])))
        v = v_tiles.load([i * BLOCK_N, 0])
        acc = tl.dot(p, v, acc * alpha[:, None])
    # Only the last block has keys past the end.
    s = tl.where((last * BLOCK_N + offs_n < length)[None, :], s, float("-inf"))
    p, alpha, peak, total = _weigh(s, peak, total, scale_log2, True)
    v = v_tiles.load([last * BLOCK_N, 0])
    acc = tl.dot(p.to(q_ptr.dtype.element_ty), v, acc * alpha[:, None])

    lse = peak + tl.math.log2(total)
    # The one row that was loaded for an empty span may hold anything.
    seen = total != 0.0
    acc = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
    token = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = token < num_tokens
    offs_d = tl.arange(0, D)
    row = (batch * num_tokens + token).to(tl.int64) * num_heads + head
    LN2: tl.constexpr = 0.6931471805599453
    tl.store(lse_ptr + row, lse * LN2, mask=mask)
    tl.store(out_ptr + row[:, None] * D + offs_d[None, :], acc, mask=mask[:, None])


turn = Kernel(_turn_kernel, [{"BLOCK_M": 32, "num_warps": 4}])
attend_tma = Kernel(
    _tma_kernel,
    [
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    ],
)

# --- launch ---


def fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    ids: Tensor | None,
    starts: Tensor | None,
    biases: Tensor | None,
    k_scale: Tensor | None,
    *_: Any,
) -> bool:
    """Whether this kernel supports the call, as far as the host knows."""
    table_stride = 0 if cos is None else cos.stride(0)
    return (
        _descriptors.AVAILABLE
        and (INTERPRET or is_hopper(q.get_device()))
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] in (64, 128)
        and spans.shape[1] == 1
        and k_scale is None
        and k.shape[0] > 0
        and all(stride % 8 == 0 for stride in (*q.stride()[:3], *k.stride()[:2], table_stride))
        and not (q.data_ptr() % 16 or k.data_ptr() % 16 or v.data_ptr() % 16)
    )


def launch(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    ids: Tensor | None,
    starts: Tensor | None,
    biases: Tensor | None,
) -> None:
    """Write `out` and `lse`."""
    (B, N, H, D), (M, G, _) = q.shape, k.shape
    if B > 1 and starts is not None and starts.shape[0] > 1:
        # Each prompt may have the images at other ids: rotate keys for one prompt at a time.
        for b in range(B):
            own_out, own_lse, own_q, own_spans, own_ids, own_biases = (
                t if t is None or t.shape[0] == 1 else t[b : b + 1]
                for t in (out, lse, q, spans, ids, biases)
            )
            rotation = (cos, sin, own_ids, starts, own_biases)
            launch(own_out, own_lse, own_q, k, v, own_spans, *rotation)
        return
    if cos is not None and sin is not None and ids is not None:
        images = 0 if starts is None else starts.shape[0]
        placed = (ids, ids) if starts is None or biases is None else (starts, biases)
        ids_stride, biases_stride = (t.stride(0) if t.shape[0] > 1 else 0 for t in (ids, placed[1]))
        strides = (ids_stride, ids.stride(1), biases_stride, spans.stride(0), cos.stride(0))
        pointers = (cos, sin, ids, *placed, spans)

        def rotated(x: Tensor, keys: bool) -> Tensor:
            """x [B, N, H, D] at other ids."""
            y = torch.empty_like(x, memory_format=torch.contiguous_format)
            rows, tokens, heads = x.shape[:3]
            programs = rows * heads * -(-tokens // turn.config["BLOCK_M"])
            sizes = (tokens, heads, M, cos.shape[0], images)
            constants = (keys, images > 0, D // 2)
            turn.launch(programs, y, x, *pointers, *x.stride()[:3], *strides, *sizes, *constants)
            return y

        q = rotated(q, False)
        if images > 1:
            k = rotated(k[None], True)[0]
    programs = B * H * -(-N // attend_tma.config["BLOCK_M"])
    tensors = (out, lse, q, k, v, spans)
    kv_strides = (*k.stride()[:2], *v.stride()[:2])
    numbers = (*q.stride()[:3], *kv_strides, spans.stride(0), N, M, H, H // G)
    with _descriptors.allocated():
        attend_tma.launch(programs, *tensors, *numbers, LOG2E / D**0.5, D)
