"""Gradient of attention over the image memory: the operator.

Five launches, deterministic: rows and the blocks that meet (`_attend_gradient_rows`), queries
(`_attend_gradient_queries`), keys and values (`_attend_gradient_keys`). Each of the two GEMM
kernels computes the scores again from the saved log-sum-exp: 14 * rows * keys * D FLOPs for each
head, 7/5 of a single pass, which would need atomics. Several images take one more launch, which
rotates the keys into the frame of the prompt's first image.
Scratch: q' like q, two numbers per row, k' like k for several images, a few numbers per block.

Letters: B batch, N tokens, H query heads, M memory, G key heads, D head dimension, R rows of one
key head (B * N * H / G), P rows of the rotary table, I images.
"""

import torch
from torch import Tensor

from comemo_kernels._attend_gradient_keys import (
    gradient_keys,
    gradient_keys_exact,
    gradient_keys_small,
    gradient_keys_wide,
)
from comemo_kernels._attend_gradient_queries import (
    gradient_queries,
    gradient_queries_exact,
    gradient_queries_wide,
)
from comemo_kernels._attend_gradient_rows import (
    RUNS,
    gradient_bounds,
    gradient_rebase,
    gradient_rows,
    gradient_runs,
)
from comemo_kernels._blocks_attention import LOG2E
from comemo_kernels._op import Kernel, has_warp_groups, padded, register

NARROW = 128  # elements of a head that the first kernels support


def _kernels_for(q: Tensor) -> tuple[Kernel, Kernel]:
    """Kernels of queries, and of keys and values."""
    if q.dtype == torch.float32:
        return gradient_queries_exact, gradient_keys_exact
    if q.shape[-1] > NARROW:
        return gradient_queries_wide, gradient_keys_wide
    hopper = has_warp_groups(q.get_device())
    return gradient_queries, gradient_keys if hopper else gradient_keys_small


def _launch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    spans: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    ids: Tensor | None,
    starts: Tensor | None,
    biases: Tensor | None,
    gate: Tensor | None,
    to_q: bool,
    to_kv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _fake(dout, q, k, v, *[None] * 10, to_q, to_kv)
    dq, dk, dv, delta = grads
    if not q.numel() or not k.numel():
        for grad in grads:
            grad.zero_()
        return grads
    images = 0 if starts is None or biases is None else starts.shape[0]
    inputs = (dout, q, k, v, out, lse, dlse, spans, cos, sin, ids, starts, biases, gate)
    if images > 1 and biases is not None and biases.shape[0] > 1:
        # Each prompt has a frame of its own: one after the other, with sums in float32.
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in (dk, dv)]
        own_kv = [torch.empty_like(x) for x in sums]
        parts = []
        for b in range(len(q)):
            own = [
                x[b : b + 1] if x is not None and i in BATCHED and len(x) > 1 else x
                for i, x in enumerate(inputs)
            ]
            part = torch.empty_like(delta[:, : delta.shape[1] // len(q)]).contiguous()
            _launch_frame(dq[b : b + 1] if to_q else dq, *own_kv, part, *own, to_q, to_kv)
            torch._foreach_add_(sums, own_kv)
            parts.append(part)
        torch.cat(parts, 1, out=delta)
        if to_kv:
            dk.copy_(sums[0])
            dv.copy_(sums[1])
    else:
        _launch_frame(*grads, *inputs, to_q, to_kv)
    return grads


BATCHED = (0, 1, 4, 5, 6, 7, 10, 12)  # inputs with a row for each prompt


def _launch_frame(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    delta: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    spans: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    ids: Tensor | None,
    starts: Tensor | None,
    biases: Tensor | None,
    gate: Tensor | None,
    to_q: bool,
    to_kv: bool,
) -> None:
    """Write the gradients of prompts whose images have the same ids in all of them."""
    (B, N, H, D), (M, G, _) = q.shape, k.shape
    rows, group, half = B * N * H // G, H // G, -(-D // 2)
    rotate, images = cos is not None, 0 if starts is None else starts.shape[0]
    table = (q, q) if cos is None or sin is None else (cos, sin)
    placed = [q if t is None else t for t in (ids, starts, biases)]
    ids_strides = (placed[0].stride(0) if placed[0].shape[0] > 1 else 0, placed[0].stride(1))
    biases_stride = placed[2].stride(0) if images and placed[2].shape[0] > 1 else 0
    spans_strides = (spans.stride(0), spans.stride(1) if spans.shape[1] > 1 else 0)
    table_stride, positions = (table[0].stride(0), table[0].shape[0]) if rotate else (0, 0)
    block_d = max(16, 2 * padded(half))
    turned = torch.empty_like(q, memory_format=torch.contiguous_format) if rotate else q
    if not rotate:
        q = turned = q.contiguous()
    lse2 = torch.empty_like(delta)

    aligned = all(stride % 8 == 0 for stride in (*q.stride()[:3], table_stride))
    tensors = (turned, lse2, delta, q, out, dout, lse, lse if dlse is None else dlse, *table)
    strides = (*q.stride()[:3], *ids_strides, biases_stride, table_stride)
    sizes = (N, rows, G, group, positions)
    constants = (rotate, images > 0, dlse is not None, D, half, aligned, block_d)
    programs = G * -(-rows // gradient_rows.config["BLOCK_M"])
    gradient_rows.launch(programs, *tensors, placed[0], placed[2], *strides, *sizes, *constants)
    if images > 1:
        aligned = all(stride % 8 == 0 for stride in (*k.stride()[:2], table_stride))
        rebased = torch.empty_like(k, memory_format=torch.contiguous_format)
        programs = G * -(-M // gradient_rebase.config["BLOCK_M"])
        numbers = (*k.stride()[:2], table_stride, M, G, positions, images)
        gradient_rebase.launch(
            programs, rebased, k, *table, *placed[1:], *numbers, D, half, aligned, block_d
        )
        k = rebased
    for_q, for_kv = _kernels_for(q)
    strides = (*k.stride()[:2], *v.stride()[:2])
    aligned = all(stride % 8 == 0 for stride in (*strides, table_stride))
    numbers = (rows, M, G, group, positions)
    scales = (LOG2E / D**0.5, D**-0.5)
    gates = (q if gate is None else gate,)
    common = (turned, dout, k, v, lse2, delta)
    shape = (group > 1, D, half, aligned)
    if to_q:
        programs = G * -(-rows // for_q.config["BLOCK_M"])
        tensors = (dq, *common, spans, *gates, *table, placed[0], placed[2])
        all_strides = (*strides, *spans_strides, *ids_strides, biases_stride, table_stride)
        constants = (rotate, images > 0, gate is not None, *shape, block_d)
        for_q.launch(programs, *tensors, *all_strides, N, *numbers, *scales, *constants)
    if to_kv:
        blocks_m = -(-rows // for_kv.config["BLOCK_M"])
        blocks_n = -(-M // for_kv.config["BLOCK_N"])
        int32 = {"dtype": torch.int32, "device": q.device}
        bounds = torch.empty(blocks_m, 4, **int32)
        limits = torch.empty(2, rows, **int32)
        runs = torch.empty(blocks_n, 1 + 2 * RUNS, **int32)
        block = for_kv.config["BLOCK_M"]
        gradient_bounds.launch(
            blocks_m, bounds, limits, spans, *spans_strides, N, rows, M, group, block
        )
        gradient_runs.launch(blocks_n, runs, bounds, blocks_m, RUNS, for_kv.config["BLOCK_N"])
        tensors = (dk, dv, *common, limits, bounds, runs, *gates, *table, *placed[1:])
        all_numbers = (*strides, table_stride, *numbers, images, *scales)
        constants = (images > 1, gate is not None, *shape, RUNS, block_d)
        for_kv.launch(G * blocks_n, *tensors, *all_numbers, *constants)


def _fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, to_q, to_kv = rest
    (B, N, H, D), (M, G, _) = q.shape, k.shape
    return (
        q.new_empty(B if to_q else 0, N, H, D),
        k.new_empty(M if to_kv else 0, G, D),
        v.new_empty(M if to_kv else 0, G, D),
        q.new_empty(G, B * N * H // G, dtype=torch.float32),
    )


attend_gradient_op = register(
    "attend_gradient(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? dlse, Tensor spans, Tensor? cos, Tensor? sin, Tensor? ids, Tensor? starts,"
    " Tensor? biases, Tensor? gate, bool to_q, bool to_kv) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)
