"""Rotation of queries and keys, in PyTorch."""

from typing import Any

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._writes import check_writable
from comemo_kernels.grids import ImageGrids
from comemo_kernels.reference.blocks import blocks
from comemo_kernels.reference.dtypes import DTYPES


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

    On a GPU one launch reads and writes both once.

    Args:
        q: [B, N, H, D] or, packed, [T, H, D]; float16, bfloat16, float32 or float64. On a GPU D
            must be contiguous; the other strides are free, e.g. a view into a packed qkv or
            `x.transpose(1, 2)`.
        k: [B, N, G, D] or [T, G, D], the dtype of `q`; None to rotate `q` alone.
        cos, sin: floating point, of angles in radians. With `positions` [P, R/2], a row for each
            id; without [B or 1, N, R/2] or [T, R/2], a row for each token. The first R of D are
            rotated, the others copied. If the table repeats its halves, as in transformers, pass
            the first half: `cos[..., : D // 2]`.
        positions: int32 or int64 [B or 1, N] or [T] ids in any order, each in [0, P); or
            `ImageGrids`, from which a kernel derives the ids itself; None: see cos.
        inplace: write into `q` and `k` and return them; autograd follows.
        published: round cos and sin to the dtype of `q` first, as the published model does.
        validate: whether to check that all ids are in the table, which syncs with the GPU. Without
            it the rotated part of a token with another id becomes NaN.

    Returns:
        q and k (None if k is None), rotated, in their dtype; computed in float32, or in float64 if
        they are float64. Differentiable in q and k.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit; tensors that cannot be
            written in place: expanded, a leaf that requires grad or a view of one, one of several
            views that require grad, an inference tensor outside inference mode; grids with more
            tokens than the sequence; ids outside the table if `validate`; on a GPU a table that
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
    """Rows [..., R/2] of `table` [P, R/2] for integers `ids` [...]; NaN for ids outside it."""
    known = (ids >= 0) & (ids < table.shape[0])
    rows = table[torch.where(known, ids, 0).long()]
    return torch.where(known[..., None], rows, float("nan"))


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, inplace: bool = False) -> Tensor:
    """Rotate the first R of D elements of [..., H, D] by rows [..., 1, R/2]; copy the rest."""
    parts = blocks(x, -3, cos, sin) if len(x.shape) > 2 else None
    if parts is None:
        return _rotate_halves(x, cos, sin, inplace)
    out = x if inplace else torch.empty_like(x, memory_format=torch.contiguous_format)
    for part in parts:
        c, s = (t if t.shape[-3] == 1 else t[..., part, :, :] for t in (cos, sin))
        out[..., part, :, :] = _rotate_halves(x[..., part, :, :], c, s, False)
    return out


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, inplace: bool) -> Tensor:
    R = 2 * cos.shape[-1]
    x1, x2 = x[..., :R].to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)
    if inplace:
        x[..., :R].copy_(rotated)
        return x
    return rotated if x.shape[-1] == R else torch.cat([rotated, x[..., R:]], dim=-1)


def check_rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | ImageGrids | None,
    inplace: bool,
    validate: bool,
) -> None:
    """Raise the errors of `apply_rotary` that do not depend on the device.

    Messages are built only if a condition fails: this runs on every call of a decode step.
    """
    shape, table, device = q.shape, cos.shape, q.device
    if len(shape) not in (3, 4) or q.dtype not in DTYPES:
        raise ValueError(
            "apply_rotary: q must be [B, N, H, D] or [T, H, D] of float16, bfloat16, float32 or"
            f" float64, got {q.dtype} {tuple(shape)}"
        )
    tokens, D, half = shape[:-2], shape[-1], table[-1] if table else 0
    if k is not None and (
        k.shape[:-2] != tokens or k.shape[-1] != D or k.dtype != q.dtype or k.device != device
    ):
        raise ValueError(
            "apply_rotary: k must be like q [B, N, H, D] except for the number of heads, got"
            f" {k.dtype} {tuple(k.shape)} on {k.device} for {q.dtype} {tuple(shape)} on {device}"
        )
    if (
        table != sin.shape
        or cos.dtype != sin.dtype
        or cos.dtype not in DTYPES
        or cos.device != device
        or sin.device != device
    ):
        raise ValueError(
            "apply_rotary: cos and sin must have one shape and floating dtype and the device of q,"
            f" got {cos.dtype} {tuple(cos.shape)} on {cos.device} and"
            f" {sin.dtype} {tuple(sin.shape)} on {sin.device} for q on {device}"
        )
    if not 0 < 2 * half <= D:
        raise ValueError(
            f"apply_rotary: cos {tuple(cos.shape)} must rotate an even number of the {D} elements"
            f" of a head of q {tuple(shape)}, got {2 * half}: if the table repeats its halves,"
            " pass the first, cos[..., : D // 2]"
        )
    if inplace:
        learns = q.requires_grad or cos.requires_grad or sin.requires_grad
        check_writable("apply_rotary", {"q": q, "k": k}, learns)
    if positions is None:
        if table[:-1] != tokens and (len(shape) == 3 or table[:-1] != (1, shape[1])):
            raise ValueError(
                f"apply_rotary: without positions cos must be {[*tokens, half]}, a row for each"
                f" token of q, got {list(table)}"
            )
        return
    if len(table) != 2 or not table[0]:
        raise ValueError(
            "apply_rotary: with positions cos must be [P, R/2], a row for each id, P not 0, got"
            f" {tuple(table)}"
        )
    if isinstance(positions, ImageGrids):
        positions.check_length("apply_rotary", tokens.numel())
        if positions.table.device != device:
            raise ValueError(
                f"apply_rotary: positions must be on the device of q, {device}, got"
                f" {positions.table.device}"
            )
        ids = positions.position_ids(tokens.numel()) if validate else None
    else:
        ids = positions
        if not isinstance(ids, Tensor):
            raise ValueError(
                "apply_rotary: positions must be a tensor of ids, ImageGrids or None, got"
                f" {type(ids).__name__}"
            )
        if (
            ids.dtype not in (torch.int32, torch.int64)
            or ids.device != device
            or (ids.shape != tokens and (len(shape) == 3 or ids.shape != (1, shape[1])))
        ):
            raise ValueError(
                f"apply_rotary: positions must be int32 or int64 {list(tokens)} on {device}, got"
                f" {ids.dtype} {list(ids.shape)} on {ids.device}"
            )
    if validate and ids is not None and ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"apply_rotary: ids must be in [0, {cos.shape[0]}), the rows of cos, got"
                f" {low} to {high}"
            )


def check_rotary_kernel(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | ImageGrids | None
) -> None:
    """Raise for strides that the reference supports and the kernel does not."""
    k = q if k is None else k
    if q.stride(-1) != 1 or k.stride(-1) != 1 or cos.stride(-1) != 1:
        raise ValueError(
            "apply_rotary: the last dimension must be contiguous, got strides"
            f" {q.stride()} of q, {k.stride()} of k, {cos.stride()} of cos"
        )
    if cos.stride() != sin.stride():
        raise ValueError(
            f"apply_rotary: cos and sin must have the same strides, got {cos.stride()} and"
            f" {sin.stride()}"
        )
    if isinstance(positions, ImageGrids) and not positions.table.is_contiguous():
        raise ValueError(
            "apply_rotary: the table of ImageGrids must be contiguous, got strides"
            f" {positions.table.stride()}"
        )
