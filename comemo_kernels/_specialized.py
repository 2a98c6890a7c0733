"""Attention of whole prompts by specialised warps: one loads, the others multiply.

The same as `attention._attend_kernel` where a prompt reads one image, or rotated queries any span:
Triton's compiler lets one warp group load keys and values by tensor descriptors (TMA) while two
multiply, if queries are loaded by one too. They are rotated in a launch of their own, which moves
4 * rows * D bytes more, 1 % of what 8,192 queries of 13,312 keys take. `attention.WARP_SPECIALIZE`
turns it on.
Source: FlashAttention-3 (arXiv:2407.08608) for the division of work.

Letters: B batch, N tokens, H query heads, M memory, G key heads, D head dimension.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels import _descriptors
from comemo_kernels._blocks import offset_of
from comemo_kernels._blocks_attention import load_rotated, narrow_ids
from comemo_kernels._op import INTERPRET, Kernel

# --- kernel ---


@triton.jit(
    do_not_specialize=[
        *("q_stride_b", "q_stride_n", "q_stride_h", "ids_stride_b", "ids_stride_n"),
        *("biases_stride_b", "table_stride", "num_tokens", "num_heads", "num_positions"),
    ]
)
def _turn_kernel(
    y_ptr,  # [B, N, H, D], contiguous
    q_ptr,  # [B, N, H, D], D contiguous
    cos_ptr,  # [P, D/2]
    sin_ptr,
    ids_ptr,  # [B, N]
    biases_ptr,  # [B, 1]
    q_stride_b: tl.int64,
    q_stride_n: tl.int64,
    q_stride_h: tl.int64,
    ids_stride_b: tl.int64,
    ids_stride_n: tl.int64,
    biases_stride_b: tl.int64,
    table_stride: tl.int64,
    num_tokens,  # N
    num_heads,  # H
    num_positions,  # P
    BIASED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program rotates one head of BLOCK_M tokens of a batch row."""
    pid = tl.program_id(0)
    head, rest = pid % num_heads, pid // num_heads
    blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch, token = rest // blocks, rest % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = token < num_tokens
    ids = tl.load(ids_ptr + batch * ids_stride_b + token * ids_stride_n, mask=mask, other=0)
    ids = narrow_ids(ids)
    if BIASED:
        ids -= tl.load(biases_ptr + batch * biases_stride_b)
    q_rows = q_ptr + offset_of(batch, q_stride_b, True) + offset_of(token, q_stride_n, True)
    q_rows += offset_of(head, q_stride_h, True)
    y = load_rotated(
        *(q_rows, mask, ids, cos_ptr, sin_ptr, table_stride, num_positions, HALF, True, 2 * HALF)
    )
    row = (batch * num_tokens + token).to(tl.int64) * num_heads + head
    y_ptrs = y_ptr + row[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(y_ptrs, y, mask=mask[:, None])


@triton.jit(
    do_not_specialize=[
        *("q_stride_b", "q_stride_n", "q_stride_h", "kv_stride_m", "kv_stride_g"),
        *("spans_stride_b", "num_tokens", "num_keys", "num_heads", "group", "scale_log2"),
    ]
)
def _specialized_kernel(
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
    # The compiler specialises neither around an early return nor with a loop for what is left.
    pid = tl.program_id(0)
    blocks = tl.cdiv(num_tokens, BLOCK_M)
    pid_m, rest = pid % blocks, pid // blocks
    head, batch = rest % num_heads, rest // num_heads
    spans_ptr += batch * spans_stride_b
    start = tl.maximum(tl.load(spans_ptr), 0).to(tl.int32)
    length = tl.maximum(tl.minimum(tl.load(spans_ptr + 1), num_keys).to(tl.int32) - start, 0)
    q_rows = q_ptr + offset_of(batch, q_stride_b, True) + offset_of(head, q_stride_h, True)
    first = offset_of(start, kv_stride_m, True) + offset_of(head // group, kv_stride_g, True)
    q_tiles = tl.make_tensor_descriptor(q_rows, [num_tokens, D], [q_stride_n, 1], [BLOCK_M, D])
    k_tiles = tl.make_tensor_descriptor(k_ptr + first, [length, D], [kv_stride_m, 1], [BLOCK_N, D])
    v_tiles = tl.make_tensor_descriptor(v_ptr + first, [length, D], [kv_stride_m, 1], [BLOCK_N, D])
    q = q_tiles.load([pid_m * BLOCK_M, 0])
    offs_n = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    for i in tl.range(0, tl.cdiv(length, BLOCK_N), warp_specialize=True):
        key = i * BLOCK_N
        k = k_tiles.load([key, 0])
        s = tl.dot(q, tl.trans(k)) * scale_log2
        s = tl.where((key + offs_n < length)[None, :], s, float("-inf"))
        largest = tl.maximum(peak, tl.max(s, 1))
        p = tl.math.exp2(s - largest[:, None])
        alpha = tl.math.exp2(peak - largest)
        total = total * alpha + tl.sum(p, 1)
        v = v_tiles.load([key, 0])
        acc = tl.dot(p.to(q_ptr.dtype.element_ty), v, acc * alpha[:, None])
        peak = largest

    lse = peak + tl.math.log2(total)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    token = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = token < num_tokens
    row = (batch * num_tokens + token).to(tl.int64) * num_heads + head
    LN2: tl.constexpr = 0.6931471805599453
    tl.store(lse_ptr + row, lse * LN2, mask=mask)
    offs_d = tl.arange(0, D)
    tl.store(out_ptr + row[:, None] * D + offs_d[None, :], acc, mask=mask[:, None])


turn_queries = Kernel(_turn_kernel, [{"BLOCK_M": 32, "num_warps": 4}])
attend_specialized = Kernel(
    _specialized_kernel,
    [
        {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    ],
)

# --- launch ---


def fits(
    q: Tensor,
    k: Tensor,
    spans: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    ids: Tensor | None,
    starts: Tensor | None,
    biases: Tensor | None,
    k_scale: Tensor | None,
    *_: Any,
) -> bool:
    """Whether this kernel can do it, by what the host knows."""
    table_stride = 0 if cos is None else cos.stride(0)
    return (
        _descriptors.AVAILABLE
        and (INTERPRET or torch.cuda.get_device_capability(q.get_device()) == (9, 0))
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] in (64, 128)
        and spans.shape[1] == 1
        and (starts is None or starts.shape[0] <= 1)
        and k_scale is None
        and all(stride % 8 == 0 for stride in (*q.stride()[:3], *k.stride()[:2], table_stride))
        and not (q.data_ptr() % 16 or k.data_ptr() % 16)
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
) -> tuple[Tensor, Tensor]:
    """Write `out` and `lse`, and return them."""
    (B, N, H, D), (M, G, _) = q.shape, k.shape
    if cos is not None and sin is not None and ids is not None:
        biased = starts is not None and biases is not None and starts.shape[0] > 0
        y = torch.empty_like(out)
        turn_queries.launch(
            *(B * H * -(-N // turn_queries.config["BLOCK_M"]), y, q, cos, sin, ids),
            *(biases if biased else ids, *q.stride()[:3]),
            *(ids.stride(0) if ids.shape[0] > 1 else 0, ids.stride(1)),
            *(biases.stride(0) if biased and biases is not None and len(biases) > 1 else 0,),
            *(cos.stride(0), N, H, cos.shape[0], biased, D // 2),
        )
        q = y
    with _descriptors.allocated():
        attend_specialized.launch(
            *(B * H * -(-N // attend_specialized.config["BLOCK_M"]), out, lse, q, k, v, spans),
            *(*q.stride()[:3], *k.stride()[:2], spans.stride(0), N, M, H, H // G),
            *(1.4426950408889634 / D**0.5, D),
        )
    return out, lse
