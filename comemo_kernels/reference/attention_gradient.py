"""Gradient of attention over the image memory, in PyTorch, in bounded memory.

    p = softmax(s);  dp = do v^T;  ds = p * (dp - rowsum(p * dp) + dlse);  dv = p^T do
    dq = ds k;  dk = ds^T q                                       s = rotate(q) k^T / sqrt(D)

Scores are computed again, for few rows at a time. Source: FlashAttention (arXiv:2205.14135).

Letters: R rows of a group, H heads, G key heads, D head dimension, M memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comemo_kernels.attention_types import QueryRotation
from comemo_kernels.reference.attention_groups import Group, Piece, rotate_by_distance, span_groups

# Scores of a chunk: MOST elements, but at least those of FEW rows, and at most those of MANY.
MOST, FEW, MANY = 2**21, 64, 256


def span_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    rotation: QueryRotation | None,
    dout: Tensor | None,
    dlse: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v, if `needed`, for those of the output and of the log-sum-exp.

    Besides its results it holds one span's keys and values, and for some rows two matrices of
    scores: of MOST elements, or if that is more, for FEW rows of all heads. Rows of the memory that
    nobody reads are not touched. The same input gives the same bits.
    """
    if dout is None and dlse is None:
        return None, None, None
    (B, N, H, D), (M, G, _) = q.shape, k.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    dq = q.new_zeros(B * N, H, D) if needed[0] else None
    dk, dv = (k.new_zeros(M, G, D, dtype=exact) if need else None for need in needed[1:])
    queries = q.reshape(B * N, H, D)
    dout = None if dout is None else dout.reshape(B * N, H, D)
    dlse = None if dlse is None else dlse.reshape(B * N, H, 1)
    for group in span_groups(q, M, spans, rotation):
        start, end = group.start, group.end
        span = _Span(
            group,
            rotation,
            [k[piece.start : piece.end].transpose(0, 1).to(exact) for piece in group.pieces],
            v[start:end].transpose(0, 1).to(exact),
            None if dk is None else dk[start:end].transpose(0, 1),
            None if dv is None else dv[start:end].transpose(0, 1),
        )
        R = B * N if group.rows is None else len(group.rows)
        step = min(max(MOST // (H * (end - start)), FEW), MANY)
        for first in range(0, R, step):
            part = slice(first, first + step)
            at = part if group.rows is None else group.rows[part]
            given = (None if t is None else t[at] for t in (dout, dlse))
            found = span.add(dq is not None, part, queries[at], *given)
            if dq is not None and found is not None:
                dq[at] = found.to(q.dtype)
    if dq is not None:
        dq = dq.view(B, N, H, D)
    dk, dv = (None if grad is None else grad.to(k.dtype) for grad in (dk, dv))
    return dq, dk, dv


@dataclass
class _Span:
    """A group of queries, its keys and values [G, keys, D] at least in float32, their gradients."""

    group: Group
    rotation: QueryRotation | None
    keys: list[Tensor]  # of each piece
    values: Tensor
    dk: Tensor | None
    dv: Tensor | None

    def add(
        self,
        to_q: bool,
        part: slice,  # of the group's queries
        q: Tensor,  # [R, H, D]
        dout: Tensor | None,
        dlse: Tensor | None,  # [R, H, 1]
    ) -> Tensor | None:
        """Add to the gradients of keys and values; the gradient of q."""
        scale, pieces = 1 / math.sqrt(q.shape[-1]), self.group.pieces
        turned = [self.heads(self.turn(q, piece, part)) * scale for piece in pieces]
        scores = [x @ k.transpose(1, 2) for x, k in zip(turned, self.keys, strict=True)]
        joined = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
        del scores  # so that there are two matrices at a time
        weights = joined.softmax(-1)
        del joined
        if dout is not None:
            dout = self.heads(dout)
            if self.dv is not None:
                self.dv.baddbmm_(weights.transpose(1, 2), dout)
        if self.dk is None and not to_q:
            return None
        if dout is None:
            dscores = torch.zeros_like(weights)
        else:
            dscores = (dout @ self.values.transpose(1, 2)).mul_(weights)
        # In this order it is exactly 0 for one key.
        dscores.addcmul_(weights, dscores.sum(-1, keepdim=True), value=-1)
        if dlse is not None:
            dscores.addcmul_(weights, self.heads(dlse))
        dq = None
        for piece, x, k in zip(pieces, turned, self.keys, strict=True):
            own = slice(piece.start - self.group.start, piece.end - self.group.start)
            if self.dk is not None:
                self.dk[:, own].baddbmm_(dscores[..., own].transpose(1, 2), x)
            if to_q:
                dx = self.tokens(dscores[..., own] @ k, len(q)) * scale
                dx = self.turn(dx, piece, part, back=True)
                dq = dx if dq is None else dq + dx
        return dq

    def turn(self, x: Tensor, piece: Piece, part: slice, back: bool = False) -> Tensor:
        """Rotate [R, H, D] for the keys of a piece, or back."""
        if piece.distance is None or self.rotation is None:
            return x
        distance = piece.distance[part]
        return rotate_by_distance(x, -distance if back else distance, *self.rotation[:2])

    def heads(self, x: Tensor) -> Tensor:
        """[R, H, ...] as [G, H/G * R, ...], at least in float32."""
        grouped = x.to(self.values.dtype).unflatten(1, (len(self.values), -1))
        return grouped.permute(1, 2, 0, 3).flatten(1, 2)

    def tokens(self, x: Tensor, R: int) -> Tensor:
        """[G, H/G * R, D] as [R, H, D]"""
        return x.unflatten(1, (-1, R)).permute(2, 0, 1, 3).flatten(1, 2)
