"""Attention over the image memory, in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo_kernels._op import check


def attend_images(q: Tensor, k: Tensor, v: Tensor, spans: Tensor) -> Tensor:
    """Every query reads its own span of the image memory: softmax(q k^T / sqrt(D)) v.

    Spans are the only mask: packed samples, ragged batches, prompts that share one memory.
    Queries of equal span are computed together, so beams read their memory once.

    Args:
        q: [B, N, H, D], rotated.
        k, v: [M, G, D], k rotated; H a multiple of G.
        spans: integers [B, N, 2] or [B, 1, 2], half-open [start, end) in [0, M].

    Returns:
        [B, N, H, D]; zeros, with zero gradients, where a span is empty.

    Raises:
        ValueError: shapes that do not fit, or (where that needs no synchronisation) a span
            outside the memory.
    """
    B, N, H, D = q.shape
    M, G = k.shape[:2]
    check(
        k.shape == v.shape == (M, G, D) and G > 0 and H % G == 0,
        f"attend_images: k {tuple(k.shape)} and v {tuple(v.shape)} must be [M, G, {D}] with G"
        f" dividing {H}",
    )
    check(
        tuple(spans.shape) in ((B, N, 2), (B, 1, 2)),
        f"attend_images: spans {tuple(spans.shape)} must be {(B, N, 2)} or {(B, 1, 2)}",
    )
    if spans.is_cuda or torch.compiler.is_compiling():
        return _attend_masked(q, k, v, spans)  # the values of the spans are not at hand
    spans = spans.expand(B, N, 2).reshape(-1, 2)
    distinct, owner = torch.unique(spans, dim=0, return_inverse=True)
    check(
        not len(spans) or bool((distinct >= 0).all() and (distinct <= M).all()),
        f"attend_images: spans must lie in [0, {M}], got {distinct.tolist()}",
    )
    flat = q.reshape(B * N, H, D)
    out = torch.zeros_like(flat)
    for index, (start, end) in enumerate(distinct.tolist()):
        if start >= end:
            continue
        if len(distinct) == 1:  # one span: no gathering
            return _attend(flat, k[start:end], v[start:end]).view(B, N, H, D)
        rows = (owner == index).nonzero().squeeze(1)
        out = out.index_copy(0, rows, _attend(flat[rows], k[start:end], v[start:end]))
    return out.view(B, N, H, D)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[R, H, D] queries over [M, G, D] keys, all heads in one SDPA call."""
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # [1, H, R, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, spans: Tensor) -> Tensor:
    B, N, H, D = q.shape
    place = torch.arange(k.shape[0], device=q.device)
    seen = (place >= spans[..., :1]) & (place < spans[..., 1:])  # [B, N or 1, M]
    seen = seen.expand(B, N, -1).reshape(B * N, -1)
    # An empty span attends to everything and is then zeroed: softmax over nothing is NaN.
    some = seen.any(-1, keepdim=True)
    out = _attend(q.reshape(B * N, H, D), k, v, seen | ~some)
    return torch.where(some[..., None], out, 0).view(B, N, H, D)
