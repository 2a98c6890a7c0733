"""Attention of Mllama over the keys and values in a KV cache of transformers.

That holds [B, G, S, D]: one memory for each prompt. `attend_spans` reads one memory [M, G, D] for
all prompts. One prompt is a view of it. Keys that were just projected are [B, S, G, D] in memory:
their B * S rows are one memory, and the spans of prompt b are moved by b * S. Those of a cache are
contiguous as [B, G, S, D]: their B * G * S rows are one memory with one head, and each key head is
a prompt of its own. Nothing is copied but the queries of several prompts.

Letters: B batch, N tokens, H query heads, G key heads, S vision tokens, D head dimension, d width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels import operations as ops
from comemo_kernels._op import on_triton


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Tensor]) -> Tensor:
    """Each query's softmax over the keys of all its spans.

    Args:
        q: [B, N, H, D].
        k, v: [B, G, S, D] in the dtype of q.
        spans: int64 [B or 1, N or 1, 2] each, disjoint, in [0, S].

    Returns:
        [B, N, H, D] in the dtype of q.
    """
    H = q.shape[2]
    B, G, S, D = k.shape
    one = _as_one(k, v, spans)
    if one is not None:
        return _attend(q, *one)
    if on_triton(q):
        heads = q.unflatten(2, (G, H // G)).transpose(1, 2).flatten(0, 1)  # [B * G, N, H/G, D]
        keys, values = k.reshape(B * G * S, 1, D), v.reshape(B * G * S, 1, D)
        moved = [_move(span.expand(B, -1, -1).repeat_interleave(G, 0), S) for span in spans]
        out = _attend(heads, keys, values, moved)
        return out.unflatten(0, (B, G)).transpose(1, 2).flatten(2, 3)
    prompts = []
    for b in range(B):  # PyTorch's attention takes all heads of a prompt at once
        own = [span[b : b + 1] if len(span) > 1 else span for span in spans]
        keys, values = k[b].transpose(0, 1), v[b].transpose(0, 1)
        prompts.append(_attend(q[b : b + 1], keys, values, own))
    return torch.cat(prompts)


def attend_and_add(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[Tensor],
    weight: Tensor,
    gate: Tensor,
) -> Tensor:
    """x + tanh(gate) * (attend(q, k, v) weight^T), fused where spans and memory are one.

    Args:
        x: [B, N, d] in the dtype of q.
        q, k, v, spans: as for `attend`.
        weight: [d, H * D].
        gate: [1].

    Returns:
        [B, N, d].
    """
    one = _as_one(k, v, spans) if len(spans) == 1 else None
    if one is not None:
        k, v, (span,) = one
        return ops.attend_gated(x, q, k, v, span.expand(len(q), -1, -1), weight, gate)
    return ops.gated_residual(x, attend(q, k, v, spans).flatten(2), weight, gate)


def _as_one(
    k: Tensor, v: Tensor, spans: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Sequence[Tensor]] | None:
    """Keys and values of all prompts as one memory, and spans of it; None if it takes a copy."""
    B, _, S, _ = k.shape
    if B == 1:
        return k[0].transpose(0, 1), v[0].transpose(0, 1), spans
    if any(t.stride(0) != S * t.stride(2) for t in (k, v)):
        return None
    k, v = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))
    return k, v, [_move(span.expand(B, -1, -1), S) for span in spans]


def _move(spans: Tensor, S: int) -> Tensor:
    """Spans [P, N, 2] moved by S for each prompt."""
    return spans + S * torch.arange(len(spans), device=spans.device)[:, None, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Tensor]) -> Tensor:
    """`attend_spans` for several spans of each query: their softmaxes, weighted by their sums."""
    spans = [span.expand(len(q), -1, -1) for span in spans]
    if len(spans) == 1:
        return ops.attend_spans(q, k, v, spans[0])
    outs, sums = zip(
        *(ops.attend_spans(q, k, v, span, return_lse=True) for span in spans), strict=True
    )
    shares = torch.stack(sums).softmax(0)[..., None]  # [spans, B, N, H, 1]
    return (torch.stack(outs).to(shares.dtype) * shares).sum(0).to(q.dtype)
