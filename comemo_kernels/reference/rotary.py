"""Rotation of queries and keys, in PyTorch."""

from typing import Any

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._checks import check_rotary
from comemo_kernels.grids import ImageGrids


@public
def apply_rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | ImageGrids | None = None,
    inplace: bool = False,
    published: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotate the halves of each head of queries and keys (rotate-half, as in Llama).

    On a GPU it is one launch for both, reading and writing each once.

    Args:
        q: [B, N, H, D] or, packed, [T, H, D]; float16, bfloat16, float32 or float64. On a GPU D
            must be contiguous; the other strides are free, as of a view into a packed qkv or of
            `x.transpose(1, 2)`.
        k: [B, N, G, D] or [T, G, D], the dtype of `q`; None to rotate `q` alone.
        cos, sin: floating point, of angles in radians. With `positions` [P, R/2], a row for each
            id; without [B or 1, N, R/2] or [T, R/2], a row for each token. The first R of D are
            rotated, the others copied. Of a table that repeats its halves, as transformers has,
            give the first half: `cos[..., : D // 2]`.
        positions: int32 or int64 [B or 1, N] or [T] ids in any order, each in [0, P); or
            `ImageGrids`, from which a kernel derives the ids itself; None: see cos.
        inplace: write into `q` and `k` and return them; autograd follows.
        published: round cos and sin to the dtype of `q` first, as the published model does.
        validate: whether to look for ids beyond the table, for which the host waits for the GPU.
            Without it such a token's rotated part becomes NaN.

    Returns:
        q and k (None if None was given), rotated, in their dtype; computed in float32, of float64
        in float64. Differentiable in q and k.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit; what cannot be written in
            place: an expanded tensor, a leaf that requires grad or a view of one, one of several
            views that learn, an inference tensor outside of inference mode; grids whose tokens
            overrun the sequence; ids beyond the table if `validate`; on a GPU a table that
            requires grad. Nothing is written then.
    """
    check_rotary(q, k, cos, sin, positions, inplace, validate)
    exact = torch.promote_types(q.dtype, torch.float32)
    tokens = q.shape[:-2]
    ids = positions
    if isinstance(positions, ImageGrids):
        ids = positions.position_ids(tokens.numel()).view(tokens)
    if ids is not None:
        cos, sin = _rows(cos, ids), _rows(sin, ids)
    if published:
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    cos, sin = cos.to(exact).unsqueeze(-2), sin.to(exact).unsqueeze(-2)  # [B, N, 1, R/2]
    return tuple(None if x is None else rotate_halves(x, cos, sin, inplace) for x in (q, k))  # type: ignore[return-value]


def _rows(table: Tensor, ids: Any) -> Tensor:
    """[..., R/2] rows of `table` [P, R/2] for integers `ids` [...]; NaN for ids beyond it."""
    known = (ids >= 0) & (ids < table.shape[0])
    rows = table[torch.where(known, ids, 0).long()]
    return torch.where(known[..., None], rows, float("nan"))


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, inplace: bool = False) -> Tensor:
    """The first R of D elements of [..., H, D] turned by rows [..., 1, R/2], the rest copied."""
    R = 2 * cos.shape[-1]
    x1, x2 = x[..., :R].to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)
    if inplace:
        x[..., :R].copy_(rotated)
        return x
    return rotated if x.shape[-1] == R else torch.cat([rotated, x[..., R:]], dim=-1)
