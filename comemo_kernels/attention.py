"""Attention over the image memory, from one query to a whole prompt: the operation.

    out = softmax(rotate(q, id - bias) k^T / sqrt(D)) v        over the keys [start, end) of a span

`_attend_kernel` computes it with three block sizes: prefill, decode step of a batch, decode step of
one conversation. With few row blocks the keys are split over programs (split-K), and
`_attend_combine` adds the splits in order: the same input gives the same bits. `_attend_tma` is the
kernel for prefill on Hopper. FLOPs, traffic and sources are in those files.

Letters: B batch, N tokens, H query heads, M memory, G key heads, D head dimension, R rows of one
key head (B * N * H / G), P rows of the rotary table, I images, T tiles.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from comemo_kernels import _attend_tma, reference
from comemo_kernels._attend_combine import combine, combine_early, launch_combine
from comemo_kernels._attend_gradient import attend_gradient_op
from comemo_kernels._attend_kernel import attend_exact, attend_few, attend_many, attend_one
from comemo_kernels._blocks_attention import LOG2E
from comemo_kernels._once import once
from comemo_kernels._op import (
    Kernel,
    documented,
    launches_early,
    multiprocessors,
    on_triton,
    padded,
    register,
)
from comemo_kernels.attention_types import AttentionWorkspace, MemoryScales, QueryRotation
from comemo_kernels.reference.attention import unscaled
from comemo_kernels.reference.attention_checks import (
    check_attention,
    check_attention_kernel,
    check_read,
    check_workspace,
)

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides

ONE, FEW = 4, 64  # most rows of a key head for attend_one and for attend_few
MAX_SPLITS = 64
USE_TMA = True  # for prompts that `_attend_tma` accepts

# --- choice of kernel ---


def _kernel_for(dtype: torch.dtype, rows: int) -> Kernel:
    if dtype == torch.float32:
        return attend_exact
    return attend_one if rows <= ONE else attend_few if rows <= FEW else attend_many


def _choose_splits(q: Tensor, k: Tensor) -> int:
    """Number of programs that share the keys of a row block, so that no multiprocessor is idle."""
    (B, N, H, _), (M, G, _) = q.shape, k.shape
    rows = B * N * H // G
    kernel, slots = _kernel_for(q.dtype, rows), multiprocessors(q.get_device())
    programs = max(-(-rows // kernel.config["BLOCK_M"]) * G, 1)
    if rows <= FEW:
        slots *= 2  # two blocks of few rows fit on a multiprocessor
    elif 5 * programs >= 4 * slots:
        return 1
    blocks = -(-M // kernel.config["BLOCK_N"])
    most = max(1, min(slots // programs, blocks // 2, MAX_SPLITS))  # at least two key blocks each
    return -(-blocks // -(-blocks // most)) if blocks else 1  # the fewest of the same longest split


# --- operator ---


@functools.lru_cache(maxsize=1024)
def _plan(
    q: Layout,
    k: Layout,
    spans: Layout,
    table: Layout | None,
    ids: Layout | None,
    biases: Layout | None,
    rotate: str,
    scaled: bool,
    tile: int,
    splits: int,
    block: int,  # BLOCK_M
    block_keys: int,  # BLOCK_N
) -> tuple[int, tuple[Any, ...], tuple[Any, ...]]:
    """Programs, numbers and compile-time values of a launch, in the kernel's order."""
    (B, N, H, D), (M, G) = q[0], k[0][:2]
    rows = B * N * H // G
    blocks = -(-rows // block)
    table_stride = positions = ids_stride_b = ids_stride_n = biases_stride_b = images = 0
    if table is not None and ids is not None:
        positions, table_stride = table[0][0], table[1][0]
        ids_stride_b, ids_stride_n = ids[1][0] if ids[0][0] > 1 else 0, ids[1][1]
    if biases is not None and rotate in ("one", "several"):
        biases_stride_b = biases[1][0] if biases[0][0] > 1 else 0
        images = biases[0][1] if rotate == "several" else 0
    spans_stride_n = spans[1][1] if spans[0][1] > 1 else 0
    strides = (*q[1][:3], *k[1][:2])
    small = (spans[1][0], spans_stride_n, table_stride, ids_stride_b, ids_stride_n, biases_stride_b)
    sizes = (N, rows, M, G, H // G, positions, images, tile, blocks, splits)
    aligned = all(stride % 8 == 0 for stride in (*strides, table_stride))
    aligned &= not scaled or all(stride % 16 == 0 for stride in k[1][:2])
    half = -(-D // 2)
    wide = max(16, 2 * padded(half))
    tiled = scaled and tile % block_keys == 0
    constants = (rotate, scaled, tiled, D, half, aligned, splits > 1, wide)
    return blocks * G * splits, (*strides, *small, *sizes, LOG2E / D**0.5), constants


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
        (q.shape, q.stride()),
        (k.shape, k.stride()),
        (spans.shape, spans.stride()),
        None if cos is None else (cos.shape, cos.stride()),
        None if ids is None else (ids.shape, ids.stride()),
        None if biases is None else (biases.shape, biases.stride()),
        rotate,
        k_scale is not None,
        tile,
        splits,
        kernel.config["BLOCK_M"],
        kernel.config["BLOCK_N"],
    )
    pointers = [out, lse, parts, part_lse, counts, q, k, v, spans]
    pointers += [q if t is None else t for t in tensors]
    kernel.launch(programs, *pointers, *numbers, *constants)
    if splits > 1 and not kernel.config["FUSED"]:
        early = kernel.config["EARLY"] and launches_early(q.get_device())
        launch_combine(combine_early if early else combine, out, lse, parts, part_lse, H)


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
    # With few queries, rotating the keys of several images first costs more than it gains.
    whole = splits == 1 and q.shape[0] * q.shape[1] * q.shape[2] // k.shape[1] > FEW
    if USE_TMA and whole and _attend_tma.fits(q, k, v, spans, *optional):
        _attend_tma.launch(*workspace[:2], q, k, v, spans, *optional[:5])
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
attend_op = register(f"attend({_ARGUMENTS}) -> (Tensor, Tensor)", _launch, _fake)
_attend_ = register(
    "attend_(Tensor(a!) out, Tensor(b!) lse, Tensor(c!) parts, Tensor(d!) part_lse,"
    f" Tensor(e!) counts, {_ARGUMENTS}) -> ()",
    _launch_into,
    lambda *_: None,
)


class _AttendSpans(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spans, cos, sin, ids, starts, biases):
        rest = (spans, cos, sin, ids, starts, biases)
        out, lse = attend_op(q, k, v, *rest, None, None, 1)
        ctx.save_for_backward(q, k, v, out, lse, *rest)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once("attend_spans")
    def backward(ctx, saved, dout, dlse):
        q, k, v, out, lse, *rest = saved
        to_q, to_k, to_v = ctx.needs_input_grad[:3]
        if dout is None and dlse is None:
            return (None,) * 9
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        inputs = (dout, q, k, v, out, lse, dlse, *rest, None, to_q, to_k or to_v)
        dq, dk, dv, _ = attend_gradient_op(*inputs)
        grads = (dq if to_q else None, dk if to_k else None, dv if to_v else None)
        return *grads, *[None] * 6


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
    if not on_triton(q):
        return reference.attend_spans(
            q, k, v, spans, rotation, scales, return_lse, validate, workspace
        )
    check_attention(q, k, v, spans, rotation, scales, workspace)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    check_attention_kernel(q, k, v, spans, rotation, scales, workspace, differentiable)
    if validate:
        check_read(k.shape[0], spans, None if rotation is None else rotation.starts)
    rotate = (None,) * 5 if rotation is None else rotation
    scale = (None, None, 1) if scales is None else scales
    if differentiable:
        if scales is not None:
            k, v = unscaled(k, v, scales, q.dtype)
        out, lse = _AttendSpans.apply(q, k, v, spans, *rotate)
    elif workspace is None:
        out, lse = attend_op(q, k, v, spans, *rotate, *scale)
    else:
        return_lse = bool(return_lse)  # may raise, so it comes before anything is written
        _attend_(*workspace, q, k, v, spans, *rotate, *scale)
        out, lse = workspace.out, workspace.lse
    return (out, lse) if return_lse else out


@documented(reference.attention_workspace)
def attention_workspace(q: Tensor, k: Tensor, splits: int | None = None) -> AttentionWorkspace:
    if not on_triton(q):
        return reference.attention_workspace(q, k, splits)
    check_workspace(q, k, splits)
    return _allocate(q, k, _choose_splits(q, k) if splits is None else int(splits), lasting=True)
