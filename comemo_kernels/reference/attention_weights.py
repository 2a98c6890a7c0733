"""Attention weights of queries over the image memory, from the log-sum-exp of their scores."""

import math

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels.attention_types import MemoryScales, QueryRotation
from comemo_kernels.reference.attention import unscaled
from comemo_kernels.reference.attention_checks import check_attention, check_read
from comemo_kernels.reference.attention_groups import rotate_by_distance, span_groups

ROWS = 16  # queries per block of scores


@public
def span_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    spans: Tensor,
    rotation: QueryRotation | None = None,
    scales: MemoryScales | None = None,
) -> Tensor:
    """How much each query reads of each row of the image memory, the mean over heads.

    exp(rotate(q) k^T / sqrt(D) - lse) for the keys of a query's span, for a few queries whose
    reading is to be shown: a whole row of each is returned. Scores are in memory for 16 queries at
    a time, and heads are added up at once. It runs in PyTorch on every device, and waits for a GPU
    to know the spans.

    Args:
        q: [B, N, H, D], as for `attend_spans`.
        k: [M, G, D] of the dtype of q, or float8_e4m3fn with `scales`; H a multiple of G. k is
            rotated.
        lse: float32 or float64 [B, N, H], which `attend_spans` returns for the same arguments with
            `return_lse=True`.
        spans: int32 or int64 [B, N, 2] or [B, 1, 2], half-open [start, end) in [0, M].
        rotation: how q is rotated; None if it is rotated already.
        scales: scales of a float8 memory.

    Returns:
        float32 [B, N, M] (float64 of float64), 0 outside the span. A row sums to 1, but for the
        rounding of lse, or to 0 where the span is empty. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a span outside the memory, or images
            that do not ascend.
    """
    check_attention(q, k, k, spans, rotation, scales, None)
    if lse.shape != q.shape[:3] or lse.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"span_weights: lse must be float32 or float64 {tuple(q.shape[:3])}, got {lse.dtype}"
            f" {tuple(lse.shape)}"
        )
    if lse.device != q.device:
        raise ValueError(f"span_weights: lse must be on {q.device}, got {lse.device}")
    check_read(k.shape[0], spans, None if rotation is None else rotation.starts)
    with torch.no_grad():
        return _span_weights(q, k, lse, spans, rotation, scales)


def _span_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    spans: Tensor,
    rotation: QueryRotation | None,
    scales: MemoryScales | None,
) -> Tensor:
    (B, N, H, D), (M, G) = q.shape, k.shape[:2]
    exact = torch.promote_types(q.dtype, torch.float32)
    k = unscaled(k, k, scales, exact)[0]
    queries, norms = q.reshape(B * N, H, D), lse.reshape(B * N, G, H // G).to(exact)
    weights = torch.zeros(B * N, M, dtype=exact, device=q.device)
    for group in span_groups(q, M, spans, rotation):
        rows = torch.arange(B * N, device=q.device) if group.rows is None else group.rows
        for start, end, distance in group.pieces:
            keys = k[start:end].to(exact).permute(1, 2, 0)[:, None]  # [G, 1, D, m]
            for first in range(0, len(rows), ROWS):
                block = slice(first, first + ROWS)
                own = queries[rows[block]]
                if distance is not None and rotation is not None:
                    own = rotate_by_distance(own, distance[block], rotation.cos, rotation.sin)
                own = own.to(exact).unflatten(1, (G, H // G)).permute(1, 2, 0, 3)
                scores = own @ keys / math.sqrt(D)  # [G, H/G, rows, m]
                scores -= norms[rows[block]].permute(1, 2, 0)[..., None]
                weights[rows[block], start:end] = scores.exp_().mean((0, 1))
    return weights.view(B, N, M)
