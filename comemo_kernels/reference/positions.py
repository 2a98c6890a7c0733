"""Position ids and rotary angles, in PyTorch."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._op import check, check_count
from comemo_kernels.grids import (
    Grid,
    ImageGrids,
    check_grid,
    check_tile_order,
    image_tokens,
    thumbnail_cells,
)
from comemo_kernels.reference.dtypes import MASKS


@public
def image_position_ids(
    grid: Grid,
    side: int = 16,
    tile_order: str = "row",
    bias: int = 0,
    thumbnail: bool = True,
) -> Tensor:
    """RoPE-DHR position ids of one image's tokens: tiles row-major, then the thumbnail.

    A tile token gets the id of the thumbnail cell that covers the same place:
    `f(j, r, rows) * S + f(i, c, cols)` for tile column i, tile row j, raster row r, raster
    column c, with `f(k, t, n) = max(S*((S-1)*k + t) - 1, 0) // ((S-1)*n)`.
    Source: CoMemo (arXiv:2506.06279); exact integers instead of the published float linspace.

    Args:
        grid: (cols, rows) of tiles; an image of at most one tile has only the thumbnail's raster.
        side: S, tokens along a tile's side.
        tile_order: "row" gives tile t the ids of its own place; "column" gives it those of column
            t // rows, row t % rows, as in the published code.
        bias: id of the image's first thumbnail token.
        thumbnail: whether images of more than one tile carry a thumbnail.

    Returns:
        int64 [image_tokens(grid, side, thumbnail)], each in [bias, bias + S*S).

    Raises:
        ValueError: a negative grid, a side below 1 or an unknown tile order.
    """
    check_grid("image_position_ids", grid, side)
    check_tile_order("image_position_ids", tile_order)
    check_count("image_position_ids", "bias", bias, -(2**31))
    cols, rows = map(int, grid)
    tokens = image_tokens(grid, side, thumbnail)
    return bias + thumbnail_cells(torch.arange(tokens), cols, rows, side, tile_order)


@public
def rope_dhr_positions(
    image_mask: Tensor,
    attention_mask: Tensor,
    grids: Sequence[Grid] | Tensor,
    side: int = 16,
    tile_order: str = "row",
    thumbnail: bool = True,
    validate: bool = True,
) -> Tensor:
    """RoPE-DHR position ids of whole prompts.

    Text counts 0, 1, ...; an image whose first token would have id `bias` uses the ids
    [bias, bias + S*S) for any number of tiles; padding gets 0. On a GPU it is one launch.
    Source: CoMemo (arXiv:2506.06279).

    Args:
        image_mask: bool [B, N], True at image tokens.
        attention_mask: [B, N], 0 at padding.
        grids: (cols, rows) of every image, in reading order, prompt after prompt; a list, or
            integers [I, 2], best on the CPU, because a tensor on a GPU syncs.
        side, tile_order, thumbnail: see `image_position_ids`.
        validate: whether to check that the grids fit the mask, which syncs with the GPU; without
            it the ids of prompts that do not fit are meaningless.

    Returns:
        int64 [B, N] on the masks' device.

    Raises:
        ValueError: masks of different shapes or devices; an unknown tile order; with `validate`,
            grids with another number of image tokens than the prompts, or an image split by text
            or by the end of a prompt.
    """
    packed = pack_prompt_grids(image_mask, attention_mask, grids, side, tile_order, thumbnail)
    B, N = image_mask.shape
    text = attention_mask.bool() & ~image_mask
    text_before = text.cumsum(1) - text.long()
    if not len(packed.table):
        ids = text_before
        whole = ~image_mask
    else:
        # If no image is split, counts are enough: the number of image tokens of all prompts ahead
        # of a token tells which images are complete there.
        seen = image_mask.reshape(-1).long().cumsum(0).view(B, N) - image_mask.long()
        offset, _, cols, rows = packed.table.long().t().contiguous()  # [I] each
        image = (torch.searchsorted(offset, seen, right=True) - 1).clamp(min=0)  # [B, N]
        place = seen - offset[image]  # in its image, of an image token
        complete = image + (~image_mask & (place > 0)).long()
        before = seen[:, :1]  # in all previous prompts
        ahead = image[:, :1] + (before > offset[image[:, :1]]).long()
        cells = thumbnail_cells(place, cols[image], rows[image], side, tile_order)
        ids = text_before + side**2 * (complete - ahead) + torch.where(image_mask, cells, 0)
        follows = F.pad(image_mask[:, :-1], (1, 0))  # the previous token is an image token
        whole = ~image_mask | (((place == 0) | follows) & (seen < packed.end))
    if validate:
        check_prompt_grids(image_mask, packed, whole)
    return torch.where(text | image_mask, ids, 0)


@public
def rotary_table(
    position_ids: Tensor,
    dim: int,
    theta: float = 10000.0,
    factor: float | None = None,
    length: Tensor | None = None,
    max_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's rotary angles.

    With `factor`, dynamic NTK scaling: if `length` > `max_length`, theta is multiplied by
    `(factor * length / max_length - (factor - 1)) ** (dim / (dim - 2))`. It depends on this call
    only, not on earlier prompts.

    Args:
        position_ids: [B, N] integers (floats for interpolated positions).
        dim: D, even.
        theta: base of the angles.
        factor: dynamic NTK factor, or None.
        length: [B] tokens or positions of each prompt; needed with `factor`.
        max_length: largest length without scaling.

    Returns:
        cos, sin: float32 [B, N, D/2] of angles in radians.

    Raises:
        ValueError: a `dim` that is odd or below 2, with `factor` below 4; a `theta` that is not
            positive; ids or lengths of a wrong shape; `factor` without `length` and `max_length`.
    """
    _check_angles(position_ids, dim, theta, factor, length, max_length)
    exponent = torch.arange(0, dim, 2, device=position_ids.device).float() / dim  # [D/2]
    if factor is None:
        frequency = (1.0 / theta**exponent)[None]  # [1, D/2]
    else:
        assert length is not None
        growth = (factor * length.double() / max_length - (factor - 1)).clamp(min=1.0)
        base = theta * growth ** (dim / (dim - 2))  # [B], exactly theta without scaling
        frequency = 1.0 / base.float()[:, None] ** exponent
    angle = position_ids.float()[:, :, None] * frequency[:, None]
    return angle.cos(), angle.sin()


def _check_angles(
    position_ids: Tensor,
    dim: int,
    theta: float,
    factor: float | None,
    length: Tensor | None,
    max_length: int,
) -> None:
    """Raise the errors of `rotary_table`."""
    # Dynamic scaling divides by dim - 2.
    check_count("rotary_table", "dim", dim, 2 if factor is None else 4, 2**16)
    if dim % 2:
        raise ValueError(f"rotary_table: dim must be even, got {dim}")
    if not 0 < theta < math.inf:
        raise ValueError(f"rotary_table: theta must be positive and finite, got {theta}")
    if position_ids.ndim != 2 or position_ids.is_complex():
        raise ValueError(
            "rotary_table: position_ids must be [B, N], integers or floats, got"
            f" {position_ids.dtype} {tuple(position_ids.shape)}"
        )
    if factor is None:
        return
    if not 0 < factor < math.inf:
        raise ValueError(f"rotary_table: factor must be positive and finite, got {factor}")
    if length is None:
        raise ValueError("rotary_table: factor needs the length of each prompt, got None")
    prompts = len(position_ids)
    if (
        length.shape not in ((prompts,), (1,))
        or length.is_complex()
        or length.device != position_ids.device
    ):
        raise ValueError(
            f"rotary_table: length must be [{prompts}], one for each prompt, on"
            f" {position_ids.device}, got {length.dtype} {tuple(length.shape)} on {length.device}"
        )
    check_count("rotary_table", "max_length, which factor needs,", max_length, 1)


def pack_prompt_grids(
    image_mask: Tensor,
    attention_mask: Tensor,
    grids: Sequence[Grid] | Tensor,
    side: int,
    tile_order: str,
    thumbnail: bool,
) -> ImageGrids:
    """Check the arguments of `rope_dhr_positions`; return its grids on the masks' device."""
    if (
        image_mask.ndim != 2
        or image_mask.dtype != torch.bool
        or attention_mask.dtype not in MASKS
        or image_mask.shape != attention_mask.shape
        or image_mask.device != attention_mask.device
    ):
        raise ValueError(
            "rope_dhr_positions: image_mask and attention_mask must have one shape [B, N] and"
            f" device, the first of bool, got {image_mask.dtype} {tuple(image_mask.shape)} on"
            f" {image_mask.device} and {tuple(attention_mask.shape)} on {attention_mask.device}"
        )
    check_tile_order("rope_dhr_positions", tile_order)
    if isinstance(grids, Tensor) and grids.ndim != 2:
        raise ValueError(
            "rope_dhr_positions: grids must be a list of (cols, rows) or [I, 2], got"
            f" {tuple(grids.shape)}"
        )
    listed = grids.tolist() if isinstance(grids, Tensor) else grids
    for grid in listed:
        check_grid("rope_dhr_positions", grid, side)
    pairs = [(int(cols), int(rows)) for cols, rows in listed]
    return ImageGrids.pack(
        pairs, side=side, tile_order=tile_order, thumbnail=thumbnail, device=image_mask.device
    )


def check_prompt_grids(image_mask: Tensor, packed: ImageGrids, whole: Tensor) -> None:
    """Raise the errors of `rope_dhr_positions` that depend on values of the masks."""
    found = int(image_mask.sum())
    check(
        found == packed.end,
        f"rope_dhr_positions: {len(packed.table)} grids of {packed.end} image tokens for prompts"
        f" that hold {found}",
    )
    check(
        bool(whole.all()),
        "rope_dhr_positions: each image must be one run of image tokens in one prompt, got prompts"
        f" {(~whole).any(-1).nonzero().flatten().tolist()} with split ones, grids"
        f" {packed.table[:, 2:].tolist()}",
    )
