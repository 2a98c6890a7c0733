"""What arguments must hold, whoever computes: the errors that kernels and references share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels._op import check
from comemo_kernels.grids import Grid, ImageGrids, check_grid

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def check_rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | ImageGrids | None,
    inplace: bool,
    validate: bool,
) -> None:
    """Raise the errors of `apply_rotary` that do not depend on where it runs.

    Conditions first and messages only if one fails: this runs on every call of a decode step.
    """
    shape, table, device = q.shape, cos.shape, q.device
    if len(shape) not in (3, 4) or q.dtype not in DTYPES:
        raise ValueError(
            "apply_rotary: q must be [B, N, H, D] or [T, H, D] of float16, bfloat16, float32 or"
            f" float64, got {q.dtype} {tuple(shape)}"
        )
    tokens, D, half = shape[:-2], shape[-1], table[-1] if table else 0
    if k is not None and (
        k.shape != (*tokens, k.shape[-2], D) or k.dtype != q.dtype or k.device != device
    ):
        raise ValueError(
            "apply_rotary: k must be as q [B, N, H, D] but for the number of heads, got"
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
            "apply_rotary: cos and sin must be of one shape, floating dtype and device, that"
            f" of q; got {cos.dtype} {tuple(cos.shape)} on {cos.device} and"
            f" {sin.dtype} {tuple(sin.shape)} on {sin.device} for q on {device}"
        )
    if not 0 < 2 * half <= D:
        raise ValueError(
            f"apply_rotary: cos {tuple(cos.shape)} must rotate an even number of the {D} elements"
            f" of a head of q {tuple(shape)}, got {2 * half}: of a table that repeats its halves"
            " give the first, cos[..., : D // 2]"
        )
    if inplace and any(
        stride == 0 and size > 1
        for x in (q, k)
        if x is not None
        for size, stride in zip(x.shape, x.stride(), strict=True)
    ):
        raise ValueError(
            "apply_rotary: what is written in place must not be expanded, got strides"
            f" {q.stride()} of q" + ("" if k is None else f", {k.stride()} of k")
        )
    if positions is None:
        if table[:-1] != tokens and (len(shape) == 3 or table[:-1] != (1, shape[1])):
            raise ValueError(
                f"apply_rotary: without positions cos must be {[*tokens, half]}, a row for each"
                f" token of q, got {list(table)}"
            )
        return
    if len(table) != 2:
        raise ValueError(
            "apply_rotary: with positions cos must be [P, R/2], a row for each id, got"
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
                f"apply_rotary: ids must lie in [0, {cos.shape[0]}), the rows of cos, got"
                f" {low} to {high}"
            )


def pack_prompt_grids(
    image_mask: Tensor,
    attention_mask: Tensor,
    grids: Sequence[Grid] | Tensor,
    side: int,
    tile_order: str,
    thumbnail: bool,
) -> ImageGrids:
    """Grids of `rope_dhr_positions` on the device of its masks, arguments checked."""
    if (
        image_mask.ndim != 2
        or image_mask.dtype != torch.bool
        or image_mask.shape != attention_mask.shape
        or image_mask.device != attention_mask.device
    ):
        raise ValueError(
            "rope_dhr_positions: image_mask and attention_mask must have one shape [B, N] and"
            f" device, the first of bool, got {image_mask.dtype} {tuple(image_mask.shape)} on"
            f" {image_mask.device} and {tuple(attention_mask.shape)} on {attention_mask.device}"
        )
    listed = grids.tolist() if isinstance(grids, Tensor) else grids
    for grid in listed:
        check_grid("rope_dhr_positions", grid, side)
    pairs = [(int(cols), int(rows)) for cols, rows in listed]
    return ImageGrids.pack(
        pairs, side=side, tile_order=tile_order, thumbnail=thumbnail, device=image_mask.device
    )


def check_prompt_grids(image_mask: Tensor, packed: ImageGrids, whole: Tensor) -> None:
    """Raise the errors of `rope_dhr_positions` that depend on what the masks hold."""
    found = int(image_mask.sum())
    check(
        found == packed.end,
        f"rope_dhr_positions: {len(packed.table)} grids of {packed.end} image tokens for prompts"
        f" that hold {found}",
    )
    check(
        bool(whole.all()),
        "rope_dhr_positions: each image must be one run of image tokens in one prompt, got prompts"
        f" {(~whole).any(-1).nonzero().flatten().tolist()} with torn ones, grids"
        f" {packed.table[:, 2:].tolist()}",
    )
