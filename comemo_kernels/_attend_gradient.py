"""Gradient of attention over the image memory: the operator.

Five launches, deterministic: rows and the blocks that meet (`_attend_gradient_rows`), queries
(`_attend_gradient_queries`), keys and values (`_attend_gradient_keys`). Each of the two GEMM
kernels computes the scores again from the saved log-sum-exp: 14 * rows * keys * D FLOPs for each
head, 7/5 of a single pass, which would need atomics. Several images take one more launch, which
rotates the keys into the frame of the first image; or, in float32 and for prompts with ids of their
own, all launches for each image.
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
    elif inputs.images > 1 and not _share_frame(inputs):
        _launch_each(found, inputs, to_q, to_kv)
    else:
        _launch_frame(found, inputs, to_q, to_kv)
    return found


def _share_frame(inputs: _Inputs) -> bool:
    """Whether all images are read in the frame of the first.

    Not in float32, where a rotation by two rows of the table costs digits, and not if prompts have
    the images at ids of their own.
    """
    assert inputs.biases is not None
    return len(inputs.biases) == 1 and inputs.q.dtype != torch.float32


def _launch_each(found: _Gradients, inputs: _Inputs, to_q: bool, to_kv: bool) -> None:
    """Each image in a frame of its own: one after the other, with sums in float32."""
    starts, biases = inputs.starts, inputs.biases
    assert starts is not None
    assert biases is not None
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in found[:3]]
    own = _Gradients(*map(torch.empty_like, (*sums, found.delta)))
    ends = torch.cat([starts[1:], starts.new_full((1,), len(inputs.k))])
    for i in range(inputs.images):
        spans = torch.minimum(torch.maximum(inputs.spans, starts[i]), ends[i])
        unread = spans[..., :1] >= spans[..., 1:]
        image = inputs._replace(
            spans=spans,
            lse=inputs.lse.masked_fill(unread, float("-inf")),
            starts=starts[i : i + 1],
            biases=biases[:, i : i + 1].contiguous(),
        )
        _launch_frame(own, image, to_q, to_kv)
        torch._foreach_add_(sums, list(own[:3]))
    for grad, total in zip(found[:3], sums, strict=True):
        grad.copy_(total)
    whole = inputs._replace(cos=None, sin=None, ids=None, starts=None, biases=None)
    _prepare_rows(found.delta, whole, _Plan.of(whole))


class _Plan(NamedTuple):
    """Launch arguments that several kernels share, for prompts in one frame."""

    rows: int  # R
    images: int
    rotate: bool
    table: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor, Tensor]  # ids, starts, biases
    table_stride: int
    positions: int  # P
    place_strides: tuple[int, ...]  # of ids, biases and the table
    spans_strides: tuple[int, int]
    block_d: int

    @classmethod
    def of(cls, inputs: _Inputs) -> "_Plan":
        q, spans, images = inputs.q, inputs.spans, inputs.images
        (B, N, H, D), G = q.shape, inputs.k.shape[1]
        table, table_stride, positions = (q, q), 0, 0
        if inputs.cos is not None and inputs.sin is not None:
            table = (inputs.cos, inputs.sin)
            table_stride, positions = table[0].stride(0), table[0].shape[0]
        ids, starts, biases = (
            q if t is None else t for t in (inputs.ids, inputs.starts, inputs.biases)
        )
        ids_stride = ids.stride(0) if ids.shape[0] > 1 else 0
        biases_stride = biases.stride(0) if images and biases.shape[0] > 1 else 0
        return cls(
            rows=B * N * H // G,
            images=images,
            rotate=inputs.cos is not None,
            table=table,
            places=(ids, starts, biases),
            table_stride=table_stride,
            positions=positions,
            place_strides=(ids_stride, ids.stride(1), biases_stride, table_stride),
            spans_strides=(spans.stride(0), spans.stride(1) if spans.shape[1] > 1 else 0),
            block_d=max(16, 2 * padded(-(-D // 2))),
        )


def _launch_frame(found: _Gradients, inputs: _Inputs, to_q: bool, to_kv: bool) -> None:
    """Write the gradients of prompts in which each image has one id."""
    plan = _Plan.of(inputs)
    turned, lse2 = _prepare_rows(found.delta, inputs, plan)
    k, v = inputs.k, inputs.v
    if plan.images > 1:
        k = _rebase_keys(k, plan)
    (N, H, D), (M, G, _) = inputs.q.shape[1:], k.shape
    for_q, for_kv = _kernels_for(inputs.q)
    strides = (*k.stride()[:2], *v.stride()[:2])
    operands = (turned, inputs.dout, k, v, lse2, found.delta)
    sizes = (plan.rows, M, G, H // G, plan.positions)
    scales = (LOG2E / D**0.5, D**-0.5)
    shape = (H > G, D, -(-D // 2), _are_whole(*strides, plan.table_stride))
    gate, gated = (inputs.q, False) if inputs.gate is None else (inputs.gate, True)
    ids, starts, biases = plan.places
    tensors: tuple[Tensor, ...]
    constants: tuple[Any, ...]
    if to_q:
        tensors = (found.dq, *operands, inputs.spans, gate, *plan.table, ids, biases)
        all_strides = (*strides, *plan.spans_strides, *plan.place_strides)
        constants = (plan.rotate, plan.images > 0, gated, *shape, plan.block_d)
        programs = G * -(-plan.rows // for_q.config["BLOCK_M"])
        for_q.launch(programs, *tensors, *all_strides, N, *sizes, *scales, *constants)
    if to_kv:
        block_n = for_kv.config["BLOCK_N"]
        meeting = _find_blocks(inputs, plan, for_kv.config["BLOCK_M"], block_n)
        tensors = (found.dk, found.dv, *operands, *meeting, gate, *plan.table, starts, biases)
        numbers = (*strides, plan.table_stride, *sizes, plan.images, *scales)
        constants = (plan.images > 1, gated, *shape, RUNS, plan.block_d)
        for_kv.launch(G * -(-M // block_n), *tensors, *numbers, *constants)


def _prepare_rows(delta: Tensor, inputs: _Inputs, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Rotated queries, contiguous, and their log-sum-exp in base 2; writes delta."""
    q, dlse = inputs.q, inputs.dlse
    (_, N, H, D), G = q.shape, inputs.k.shape[1]
    lse2 = torch.empty_like(delta)
    if plan.rotate:
        turned = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        turned = q = q.contiguous()
    lses = (inputs.lse, inputs.lse if dlse is None else dlse)
    ids, _, biases = plan.places
    tensors = (turned, lse2, delta, q, inputs.out, inputs.dout, *lses, *plan.table, ids, biases)
    numbers = (*q.stride()[:3], *plan.place_strides, N, plan.rows, G, H // G, plan.positions)
    aligned = _are_whole(*q.stride()[:3], plan.table_stride)
    flags = (plan.rotate, plan.images > 0, dlse is not None)
    programs = G * -(-plan.rows // gradient_rows.config["BLOCK_M"])
    constants = (*flags, D, -(-D // 2), aligned, plan.block_d)
    gradient_rows.launch(programs, *tensors, *numbers, *constants)
    return turned, lse2


def _rebase_keys(k: Tensor, plan: _Plan) -> Tensor:
    """Keys in the frame of the prompt's first image, contiguous."""
    (M, G, D), strides = k.shape, (*k.stride()[:2], plan.table_stride)
    rebased = torch.empty_like(k, memory_format=torch.contiguous_format)
    tensors = (rebased, k, *plan.table, *plan.places[1:])
    constants = (D, -(-D // 2), _are_whole(*strides), plan.block_d)
    programs = G * -(-M // gradient_rebase.config["BLOCK_M"])
    numbers = (*strides, M, G, plan.positions, plan.images)
    gradient_rebase.launch(programs, *tensors, *numbers, *constants)
    return rebased


def _find_blocks(
    inputs: _Inputs, plan: _Plan, block_m: int, block_n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Limits of each row, bounds of row blocks, ranges of row blocks for each block of keys."""
    (_, N, H, _), (M, G, _) = inputs.q.shape, inputs.k.shape
    blocks_m, blocks_n = -(-plan.rows // block_m), -(-M // block_n)
    limits, bounds, runs = (
        torch.empty(*size, dtype=torch.int32, device=inputs.q.device)
        for size in ((2, plan.rows), (blocks_m, 4), (blocks_n, 1 + 2 * RUNS))
    )
    numbers = (*plan.spans_strides, N, plan.rows, M, H // G, block_m)
    gradient_bounds.launch(blocks_m, bounds, limits, inputs.spans, *numbers)
    gradient_runs.launch(blocks_n, runs, bounds, blocks_m, RUNS, block_n)
    return limits, bounds, runs


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
