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

from typing import Any, NamedTuple

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


class _Inputs(NamedTuple):
    """What the gradient depends on, in the operator's order."""

    dout: Tensor  # [B, N, H, D], contiguous
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None
    spans: Tensor
    cos: Tensor | None
    sin: Tensor | None
    ids: Tensor | None
    starts: Tensor | None
    biases: Tensor | None
    gate: Tensor | None

    @property
    def images(self) -> int:
        """Images with ids of their own."""
        return 0 if self.starts is None else self.starts.shape[0]

    def prompt(self, b: int) -> "_Inputs":
        """The inputs of one prompt."""
        shared = {"k", "v", "cos", "sin", "starts", "gate"}
        named = self._asdict().items()
        return _Inputs(
            *(t if n in shared or t is None or len(t) == 1 else t[b : b + 1] for n, t in named)
        )


class _Gradients(NamedTuple):
    dq: Tensor  # [B, N, H, D], or of no prompt
    dk: Tensor  # [M, G, D], or of no key
    dv: Tensor
    delta: Tensor  # [G, R] float32


def _launch(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, to_q, to_kv = arguments
    inputs, found = _Inputs(*given), _Gradients(*_fake(*arguments))
    if not inputs.q.numel() or not inputs.k.numel():
        for grad in found:
            grad.zero_()
    elif inputs.images > 1 and inputs.biases is not None and len(inputs.biases) > 1:
        _launch_each(found, inputs, to_q, to_kv)
    else:
        _launch_frame(found, inputs, to_q, to_kv)
    return found


def _launch_each(found: _Gradients, inputs: _Inputs, to_q: bool, to_kv: bool) -> None:
    """Each prompt has a frame of its own: one after the other, with sums in float32."""
    dq, dk, dv, delta = found
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (dk, dv)]
    own = [torch.empty_like(x) for x in sums]
    deltas = []
    for b in range(len(inputs.q)):
        rows = torch.empty_like(delta.view(len(delta), len(inputs.q), -1)[:, b])
        rows = rows.contiguous()
        part = _Gradients(dq[b : b + 1], own[0], own[1], rows)
        _launch_frame(part, inputs.prompt(b), to_q, to_kv)
        deltas.append(rows)
        if to_kv:
            torch._foreach_add_(sums, own)
    torch.cat(deltas, 1, out=delta)
    dk.copy_(sums[0])
    dv.copy_(sums[1])


def _launch_frame(found: _Gradients, inputs: _Inputs, to_q: bool, to_kv: bool) -> None:
    """Write the gradients of prompts in which each image has one id."""
    dout, q, k, v, out, lse, dlse, spans, cos, sin, ids, starts, biases, gate = inputs
    (B, N, H, D), (M, G, _) = q.shape, k.shape
    rows, group, half, images = B * N * H // G, H // G, -(-D // 2), inputs.images
    rotate, block_d = cos is not None, max(16, 2 * padded(half))
    table = (q, q) if cos is None or sin is None else (cos, sin)
    ids, starts, biases = (q if t is None else t for t in (ids, starts, biases))
    table_stride, positions = (table[0].stride(0), table[0].shape[0]) if rotate else (0, 0)
    place_strides = (
        ids.stride(0) if ids.shape[0] > 1 else 0,
        ids.stride(1),
        biases.stride(0) if images and biases.shape[0] > 1 else 0,
        table_stride,
    )
    spans_strides = (spans.stride(0), spans.stride(1) if spans.shape[1] > 1 else 0)

    if rotate:
        turned = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        q = turned = q.contiguous()
    lse2 = torch.empty_like(found.delta)
    gradient_rows.launch(
        G * -(-rows // gradient_rows.config["BLOCK_M"]),
        *(turned, lse2, found.delta, q, out, dout, lse, lse if dlse is None else dlse),
        *(*table, ids, biases, *q.stride()[:3], *place_strides, N, rows, G, group, positions),
        *(rotate, images > 0, dlse is not None, D, half),
        _are_whole(*q.stride()[:3], table_stride),
        block_d,
    )
    if images > 1:
        rebased = torch.empty_like(k, memory_format=torch.contiguous_format)
        gradient_rebase.launch(
            G * -(-M // gradient_rebase.config["BLOCK_M"]),
            *(rebased, k, *table, starts, biases, *k.stride()[:2], table_stride),
            *(M, G, positions, images, D, half, _are_whole(*k.stride()[:2], table_stride)),
            block_d,
        )
        k = rebased

    for_q, for_kv = _kernels_for(q)
    strides = (*k.stride()[:2], *v.stride()[:2])
    common = (turned, dout, k, v, lse2, found.delta)
    sizes, scales = (rows, M, G, group, positions), (LOG2E / D**0.5, D**-0.5)
    shape = (group > 1, D, half, _are_whole(*strides, table_stride))
    gates = (q if gate is None else gate, *table)
    if to_q:
        for_q.launch(
            G * -(-rows // for_q.config["BLOCK_M"]),
            *(found.dq, *common, spans, *gates, ids, biases, *strides, *spans_strides),
            *(*place_strides, N, *sizes, *scales, rotate, images > 0, gate is not None, *shape),
            block_d,
        )
    if to_kv:
        block_m, block_n = for_kv.config["BLOCK_M"], for_kv.config["BLOCK_N"]
        blocks_m, blocks_n = -(-rows // block_m), -(-M // block_n)
        bounds, limits, runs = (
            torch.empty(*size, dtype=torch.int32, device=q.device)
            for size in ((blocks_m, 4), (2, rows), (blocks_n, 1 + 2 * RUNS))
        )
        numbers = (*spans_strides, N, rows, M, group, block_m)
        gradient_bounds.launch(blocks_m, bounds, limits, spans, *numbers)
        gradient_runs.launch(blocks_n, runs, bounds, blocks_m, RUNS, block_n)
        for_kv.launch(
            G * blocks_n,
            *(found.dk, found.dv, *common, limits, bounds, runs, *gates, starts, biases),
            *(*strides, table_stride, *sizes, images, *scales, images > 1, gate is not None),
            *(*shape, RUNS, block_d),
        )


def _are_whole(*strides: int) -> bool:
    """Whether rows begin at multiples of 128 bits of a 16-bit dtype."""
    return all(stride % 8 == 0 for stride in strides)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, to_q, to_kv = arguments
    q, k = _Inputs(*given).q, _Inputs(*given).k
    (B, N, H, D), (M, G, _) = q.shape, k.shape
    keys = (M if to_kv else 0, G, D)
    return (
        q.new_empty(B if to_q else 0, N, H, D),
        k.new_empty(keys),
        k.new_empty(keys),
        q.new_empty(G, B * N * H // G, dtype=torch.float32),
    )


attend_gradient_op = register(
    "attend_gradient(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? dlse, Tensor spans, Tensor? cos, Tensor? sin, Tensor? ids, Tensor? starts,"
    " Tensor? biases, Tensor? gate, bool to_q, bool to_kv) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)
