"""What arguments must hold, whoever computes: the errors that kernels and references share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels._op import check, check_count
from comemo_kernels._writes import check_writable
from comemo_kernels.attention_types import AttentionWorkspace, MemoryScales, QueryRotation
from comemo_kernels.grids import Grid, ImageGrids, check_grid, check_tile_order

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
MASKS = DTYPES | {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
FLOAT8 = torch.float8_e4m3fn


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
        k.shape[:-2] != tokens or k.shape[-1] != D or k.dtype != q.dtype or k.device != device
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


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    rotation: QueryRotation | None,
    scales: MemoryScales | None,
    workspace: AttentionWorkspace | None,
) -> None:
    """Raise the errors of `attend_spans` that do not depend on where it runs."""
    if q.ndim != 4 or q.dtype not in DTYPES or not q.shape[3]:
        raise ValueError(
            "attend_spans: q must be [B, N, H, D], D not 0, of float16, bfloat16, float32 or"
            f" float64, got {q.dtype} {tuple(q.shape)}"
        )
    B, N, H, D = q.shape
    device = q.device
    if (
        k.ndim != 3
        or k.shape != v.shape
        or k.shape[2] != D
        or k.shape[1] == 0
        or H % k.shape[1]
        or k.dtype != v.dtype
        or k.device != device
        or v.device != device
    ):
        raise ValueError(
            f"attend_spans: k and v must be [M, G, {D}] with G dividing {H}, of one dtype, on"
            f" {device}, got {k.dtype} {tuple(k.shape)} on {k.device} and {v.dtype}"
            f" {tuple(v.shape)} on {v.device}"
        )
    if k.dtype != (FLOAT8 if scales is not None else q.dtype):
        raise ValueError(
            f"attend_spans: k and v must be of {q.dtype} as q, or of {FLOAT8} with scales, got"
            f" {k.dtype} with" + ("out scales" if scales is None else " scales")
        )
    if (
        tuple(spans.shape) not in ((B, N, 2), (B, 1, 2))
        or spans.dtype not in (torch.int32, torch.int64)
        or spans.device != device
    ):
        raise ValueError(
            f"attend_spans: spans must be int32 or int64 {(B, N, 2)} or {(B, 1, 2)} on {device},"
            f" got {spans.dtype} {tuple(spans.shape)} on {spans.device}"
        )
    M, G = k.shape[:2]
    if scales is not None:
        check_count("attend_spans", "scales.tile", scales.tile, 1)
        tiles = -(-M // scales.tile)
        for name, scale in (("keys", scales.keys), ("values", scales.values)):
            if scale.shape != (tiles, G) or scale.dtype != torch.float32 or scale.device != device:
                raise ValueError(
                    f"attend_spans: scales.{name} must be float32 {(tiles, G)} on {device}, for"
                    f" {M} rows in tiles of {scales.tile}, got {scale.dtype} {tuple(scale.shape)}"
                    f" on {scale.device}"
                )
    if rotation is not None:
        _check_rotation(rotation, q)
    if workspace is not None:
        out, lse, parts, part_lse, counts = workspace
        rows, splits = (G, B * N * H // G), parts.shape[0] if parts.ndim else 0
        needed = math.prod(rows) if splits > 1 else 0
        if (
            (out.shape, out.dtype) != (q.shape, q.dtype)
            or lse.shape != q.shape[:3]
            or splits == 0
            or parts.shape[1:] != (*rows, D)
            or part_lse.numel() < splits * needed
            or counts.numel() < needed
            or [t.dtype for t in workspace[1:]] != [torch.float32] * 3 + [torch.int32]
            or any(t.device != device for t in workspace)
        ):
            told = [f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in workspace]
            raise ValueError(
                f"attend_spans: the workspace must be that of attention_workspace for {q.dtype}"
                f" {tuple(q.shape)} on {device} and {G} key heads, got {', '.join(told)}"
            )


def check_workspace(q: Tensor, k: Tensor, splits: int | None) -> None:
    """Raise the errors of `attention_workspace`."""
    if q.ndim != 4 or k.ndim != 3 or not k.shape[1] or q.shape[2] % k.shape[1]:
        raise ValueError(
            "attention_workspace: q must be [B, N, H, D] and k [M, G, D] with G dividing H, got"
            f" {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if splits is not None:
        check_count("attention_workspace", "splits", splits, 1, 2**16)


def _check_rotation(rotation: QueryRotation, q: Tensor) -> None:
    B, N, _, D = q.shape
    cos, sin, ids, starts, biases = rotation
    if (
        cos.ndim != 2
        or cos.shape != sin.shape
        or cos.dtype != sin.dtype
        or cos.dtype not in DTYPES
        or cos.device != q.device
        or sin.device != q.device
        or not cos.shape[0]
        or not 0 < 2 * cos.shape[1] <= D
    ):
        raise ValueError(
            "attend_spans: rotation.cos and .sin must be [P, R/2] of a floating dtype with R at"
            f" most {D}, on {q.device}, got {cos.dtype} {tuple(cos.shape)} on {cos.device} and"
            f" {sin.dtype} {tuple(sin.shape)} on {sin.device}"
        )
    if (
        ids.shape not in ((B, N), (1, N))
        or ids.dtype not in (torch.int32, torch.int64)
        or ids.device != q.device
    ):
        raise ValueError(
            f"attend_spans: rotation.positions must be int32 or int64 {(B, N)} on {q.device}, got"
            f" {ids.dtype} {tuple(ids.shape)} on {ids.device}"
        )
    if (starts is None) != (biases is None) or (
        starts is not None
        and biases is not None
        and (
            starts.ndim != 1
            or biases.shape not in ((B, len(starts)), (1, len(starts)))
            or {starts.dtype, biases.dtype} != {torch.int32}
            or {starts.device, biases.device} != {q.device}
        )
    ):
        told = [None if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (starts, biases)]
        raise ValueError(
            f"attend_spans: rotation.starts and .biases must be int32 [I] and [{B} or 1, I] on"
            f" {q.device}, or both None, got {told[0]} and {told[1]}"
        )


def check_read(M: int, spans: Tensor, starts: Tensor | None) -> None:
    """Raise the errors of `attend_spans` that depend on values: a GPU has to be waited for."""
    if spans.numel() and not bool(((spans >= 0) & (spans <= M)).all()):
        low, high = (int(bound) for bound in spans.aminmax())
        raise ValueError(
            f"attend_spans: spans must lie in [0, {M}], the memory, got {low} to {high}"
        )
    if starts is not None and len(starts):
        listed = starts.tolist()
        if listed[0] != 0 or listed != sorted(set(listed)):
            raise ValueError(f"attend_spans: rotation.starts must ascend from 0, got {listed}")
