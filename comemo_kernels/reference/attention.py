"""Attention over the image memory, in PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._once import once
from comemo_kernels._writes import check_writable
from comemo_kernels.attention_types import AttentionWorkspace, MemoryScales, QueryRotation
from comemo_kernels.reference.attention_checks import (
    check_attention,
    check_read,
    check_workspace,
)
from comemo_kernels.reference.attention_gradient import span_gradients
from comemo_kernels.reference.attention_groups import rotate_by_distance, span_groups

ROWS = 256  # queries per block of scores, where SDPA cannot be used


@public
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
    """Attend each query to its own span of the image memory: softmax(q k^T / sqrt(D)) v.

    Spans are the only mask. They express packed samples (varlen), ragged batches, prompts that
    share one memory, and images that only later tokens see. On a GPU a block of queries reads
    shared keys once (beams, draft tokens, a batch on one image), and with few queries the keys are
    split over the multiprocessors (split-K); the result is deterministic.

    Under autograd it saves its inputs, and on a GPU its results, but no scores: these are computed
    again. Gradients are deterministic, too; a float8 memory is converted for them first. Keys that
    nobody reads get zeros. On a GPU with several images, in half precision, ids and biases must be
    less than P from the bias of the first image, else gradients are NaN.
    Source: CoMemo (arXiv:2506.06279); FlashAttention-2 (arXiv:2307.08691) for the gradients.

    Args:
        q: [B, N, H, D]; float16, bfloat16 or float32, on a CPU also float64.
        k, v: [M, G, D] of the dtype of q, or float8_e4m3fn with `scales`; H a multiple of G; on a
            GPU D contiguous, other strides free. k is rotated.
        spans: int32 or int64 [B, N, 2] or [B, 1, 2], half-open [start, end) in [0, M].
        rotation: how q is rotated on load; None if it is rotated already.
        scales: scales of a float8 memory.
        return_lse: whether to return the log-sum-exp of the scores too.
        validate: whether to check that spans are in the memory and images ascend, which syncs with
            the GPU; on a CPU they are always checked. Without it nothing outside the memory is
            read either.
        workspace: from `attention_workspace`, for a call that allocates nothing; not with
            gradients.

    Returns:
        [B, N, H, D] in the dtype of q; zeros, with zero gradients, where a span is empty. With
        `return_lse` also float32 [B, N, H] (float64 of float64), natural logarithm, -inf where a
        span is empty. Both differentiable in q, k and v, once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a span outside the memory or images
            that do not ascend, if checked; on a GPU strides or float64 that the kernels do not
            support, or a GPU without float8.
    """
    check_attention(q, k, v, spans, rotation, scales, workspace)
    if workspace is not None:
        learns = any(t.requires_grad for t in (q, k, v))
        written = {"workspace.out": workspace.out, "workspace.lse": workspace.lse}
        check_writable("attend_spans", written, learns)
    starts = None if rotation is None else rotation.starts
    # Whether values of spans may be read: on a CPU; and in float64, where the result is the truth
    # that a GPU is tested against and a sync does not matter. `_attend_masked` rotates keys by
    # their biases, which is only as exact as the table.
    known = not torch.compiler.is_compiling() and (not q.is_cuda or q.dtype == torch.float64)
    if validate or known:
        check_read(k.shape[0], spans, starts)
    table = () if rotation is None else rotation[:2]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if known and learns and not any(t.requires_grad for t in table):
        k_scale, v_scale, tile = (None, None, 1) if scales is None else scales
        out, lse = _AttendSpans.apply(
            return_lse, tile, q, k, v, spans, k_scale, v_scale, *(rotation or ())
        )
    else:
        attend = _attend_spans if known else _attend_masked
        k, v = unscaled(k, v, scales, q.dtype)
        out, lse = attend(q, k, v, spans, rotation, return_lse)
    if workspace is not None:
        out = workspace.out.copy_(out)
        if lse is not None:
            lse = workspace.lse.copy_(lse)
    return (out, lse) if lse is not None else out


@public
def attention_workspace(q: Tensor, k: Tensor, splits: int | None = None) -> AttentionWorkspace:
    """Buffers with which `attend_spans` allocates nothing, for queries like `q` and keys like `k`.

    Args:
        q: [B, N, H, D]; only shape, dtype and device matter.
        k: [M, G, D]; of a memory that grows, its whole capacity.
        splits: number of programs that share the keys of a block; None chooses it by the shapes
            and the GPU.

    Returns:
        Tensors on the device of q, for one call at a time.

    Raises:
        ValueError: H that is not a multiple of G, or fewer than one split.
    """
    check_workspace(q, k, splits)
    (B, N, H, D), G = q.shape, k.shape[1]
    unused = torch.empty(1, device=q.device)  # PyTorch's attention allocates by itself
    return AttentionWorkspace(
        out=torch.empty_like(q, memory_format=torch.contiguous_format),
        lse=torch.empty(B, N, H, device=q.device),
        parts=unused.expand(1, G, B * N * H // G, D),
        part_lse=unused,
        counts=unused.int(),
    )


def unscaled(
    k: Tensor, v: Tensor, scales: MemoryScales | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values in `dtype`: those of a float8 memory times the scales of their tiles."""
    if scales is None:
        return k, v
    held = ((k, scales.keys), (v, scales.values))
    keys, values = (_unscale(x, scale, scales.tile, dtype) for x, scale in held)
    return keys, values


def _unscale(x: Tensor, scale: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
    """Float8 [M, G, D] times the scales of its tiles, in `dtype`."""
    exact = torch.promote_types(dtype, torch.float32)
    factors = scale.repeat_interleave(tile, 0)[: x.shape[0], :, None]
    return (x.to(exact) * factors.to(exact)).to(dtype)


def _attend_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    rotation: QueryRotation | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend queries with the same span and biases together, so that beams read memory once."""
    B, N, H, D = q.shape
    flat = q.reshape(B * N, H, D)
    out = torch.zeros_like(flat, memory_format=torch.contiguous_format)
    lse = flat.new_full((B * N, H), -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, start, end, images in span_groups(q, k.shape[0], spans, rotation):
        queries = flat if rows is None else flat[rows]
        pieces = []
        for first, last, distance in images:
            piece = queries
            if distance is not None and rotation is not None:
                piece = rotate_by_distance(queries, distance, rotation.cos, rotation.sin)
            pieces.append((piece, first, last))
        if len(pieces) == 1 and not return_lse:
            read = _attend(pieces[0][0], k[start:end], v[start:end])
        else:
            read, found = _attend_pieces(pieces, k, v[start:end])
            lse = found if rows is None else lse.index_copy(0, rows, found)
        out = read if rows is None else out.index_copy(0, rows, read)
    return out.view(B, N, H, D), lse.view(B, N, H) if return_lse else None


class _AttendSpans(torch.autograd.Function):
    """`_attend_spans` whose gradient computes the scores again."""

    @staticmethod
    def forward(ctx, return_lse, tile, q, k, v, spans, k_scale, v_scale, *rotation):
        ctx.set_materialize_grads(False)
        rotated = QueryRotation(*rotation) if rotation else None
        scales = None if k_scale is None else MemoryScales(k_scale, v_scale, tile)
        out, lse = _attend_spans(q, *unscaled(k, v, scales, q.dtype), spans, rotated, return_lse)
        ctx.save_for_backward(q, k, v, spans, k_scale, v_scale, *rotation)
        ctx.tile = tile
        return out, lse

    @staticmethod
    @once("attend_spans")
    def backward(ctx, saved, dout, dlse):
        q, k, v, spans, k_scale, v_scale, *rotation = saved
        rotated = QueryRotation(*rotation) if rotation else None
        scales = None if k_scale is None else MemoryScales(k_scale, v_scale, ctx.tile)
        k, v = unscaled(k, v, scales, q.dtype)
        needed = ctx.needs_input_grad[2:5]
        grads = span_gradients(q, k, v, spans, rotated, dout, dlse, needed)
        return None, None, *grads, None, None, None, *[None] * len(rotation)


def _attend_pieces(
    pieces: list[tuple[Tensor, int, int]], k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """One softmax over several ranges of keys, each with queries [R, H, D] of its own rotation."""
    (R, H, D), G = pieces[0][0].shape, k.shape[1]
    values = v.transpose(0, 1).unsqueeze(1)  # [G, 1, M, D]
    outs, lses = [], []
    for first in range(0, R, ROWS):
        scores = torch.cat(
            [
                q[first : first + ROWS].unflatten(1, (G, H // G)).permute(1, 2, 0, 3)
                @ k[start:end].permute(1, 2, 0).unsqueeze(1)
                for q, start, end in pieces
            ],
            dim=-1,
        )  # [G, H/G, rows, M]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / math.sqrt(D)
        weights = scores.softmax(-1).to(v.dtype)
        outs.append((weights @ values).permute(2, 0, 1, 3).flatten(1, 2))
        lses.append(scores.logsumexp(-1).permute(2, 0, 1).flatten(1, 2))
    return torch.cat(outs), torch.cat(lses)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Queries [R, H, D] over keys [M, G, D], all heads in one SDPA call."""
    if len(q) == 1 and mask is None and q.dtype == torch.bfloat16 and not q.is_cuda:
        # PyTorch's product of one row takes four times as long as that of two.
        return _attend(q.expand(2, -1, -1), k, v)[:1]
    grouped = bool(q.shape[1] != k.shape[1])  # SDPA rejects the symbol that torch.compile has here
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # [1, H, R, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def _attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    rotation: QueryRotation | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same without reading values, so without a sync: a dense mask, keys rotated by biases."""
    B, N, H, D = q.shape
    place = torch.arange(k.shape[0], device=q.device)
    if rotation is not None:
        ids = rotation.positions.expand(B, N)
        q = rotate_by_distance(q, ids, rotation.cos, rotation.sin)
        if rotation.starts is not None and rotation.biases is not None and len(rotation.starts):
            image = torch.searchsorted(rotation.starts, place.int(), right=True) - 1
            biases = rotation.biases[:, image.clamp(min=0)]  # [B or 1, M]
            if len(biases) > 1:
                parts = []
                for b in range(B):  # each prompt with its own rotation of the keys
                    own = rotate_by_distance(k, biases[b], rotation.cos, rotation.sin)
                    rows = slice(b, b + 1)
                    parts.append(_attend_masked(q[rows], own, v, spans[rows], None, return_lse))
                outs, lses = zip(*parts, strict=True)
                return torch.cat(outs), torch.cat(lses) if return_lse else None
            k = rotate_by_distance(k, biases[0], rotation.cos, rotation.sin)
    seen = (place >= spans[..., :1]) & (place < spans[..., 1:])  # [B, N or 1, M]
    seen = seen.expand(B, N, -1).reshape(B * N, k.shape[0])
    # A softmax over nothing is NaN: an empty span attends to everything and is then zeroed.
    some = seen.any(-1, keepdim=True)
    # Memory rows that no query reads may be uninitialised, and NaN * 0 is NaN.
    read = seen.any(0)[:, None, None]
    k, v = (torch.where(read, x, 0) for x in (k, v))
    flat = q.reshape(B * N, H, D)
    out = _attend(flat, k, v, seen | ~some)
    out = torch.where(some[..., None], out, 0).view(B, N, H, D)
    lse = None
    if return_lse:
        grouped = flat.unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("rgjd,mgd->rgjm", grouped, k).flatten(1, 2) / math.sqrt(D)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.masked_fill(~seen[:, None], -math.inf)
        lse = scores.logsumexp(-1).view(B, N, H)
    return out, lse
