"""Keys and values of image tokens, in PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._op import check_count, has_float8
from comemo_kernels._writes import check_writable
from comemo_kernels.attention_types import MemoryScales
from comemo_kernels.reference.attention import rotate_by_distance
from comemo_kernels.reference.dtypes import DTYPES, FLOAT8
from comemo_kernels.reference.norms import rms_norm

FLOAT8_MAX = 448.0  # of float8_e4m3fn


@torch.no_grad()
@public
def build_memory(
    media: Tensor,
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[MemoryScales] | None = None,
    row: int = 0,
    eps: float = 1e-5,
) -> None:
    """Write keys and values of image tokens, for every layer, into rows of the image memory.

    k, v = split(rms_norm(media) W^T), k rotated by `ids`. On a GPU one GEMM builds all layers.
    A NaN in a value is written as 0, so that it cannot reach tokens that do not read this row; its
    key is NaN then too, which reaches those that do. Source: CoMemo (arXiv:2506.06279).

    Args:
        media: [M, d] projected image tokens; float16, bfloat16 or float32, on a CPU also float64.
        kv_weights: of each layer [2 * G * D, d], the rows of keys first; on a GPU contiguous.
        norm_weights: of each layer [d]; None if they are folded into `kv_weights`.
        cos, sin: [P, D/2], a row for each id from 0 to P - 1. A larger id gives NaN.
        ids: int32 [M], of any sign: index of each token in its image, or in its prompt.
        keys, values: of each layer [C, G, D], written from `row` on; the dtype of media, or
            float8_e4m3fn with `scales`; all with the same strides, D at most 128 on a GPU.
        scales: of each layer, written for the tiles that are built: they map the largest element
            of a tile and head to the largest float8.
        row: first row to write; with `scales` the first row of a tile.
        eps: of the norm.

    Returns:
        None.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; more rows than the capacity C; keys
            or values that cannot be written or share memory; on a GPU layouts, float64 or gradients
            that the kernels do not support. Nothing is written then.
    """
    check_build(media, kv_weights, norm_weights, cos, sin, ids, keys, values, scales, row)
    M, (_, G, D) = media.shape[0], keys[0].shape
    rows = slice(row, row + M)
    normed = rms_norm(media, None, eps)
    for layer, weight in enumerate(kv_weights):
        x = normed if norm_weights is None else norm_weights[layer] * normed
        k, v = rearrange(F.linear(x, weight), "m (kv g d) -> kv m g d", kv=2, g=G)
        k, v = rotate_by_distance(k, ids, cos, sin), v.masked_fill(v.isnan(), 0)
        if scales is None:
            keys[layer][rows], values[layer][rows] = k, v
            continue
        scale = scales[layer]
        for x, held, factors in ((k, keys, scale.keys), (v, values, scale.values)):
            exact = F.pad(x.float(), (0, 0, 0, 0, 0, -M % scale.tile))
            tiles = exact.view(-1, scale.tile, G, D)
            largest = tiles.abs().amax((1, 3)) / FLOAT8_MAX  # [T, G]
            largest = torch.where(largest == 0, 1.0, largest)
            first = row // scale.tile
            factors[first : first + len(tiles)] = largest
            scaled = (tiles / largest[:, None, :, None]).view(-1, G, D)[:M]
            held[layer][rows] = scaled.to(FLOAT8)


def check_build(
    media: Tensor,
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[MemoryScales] | None,
    row: int,
) -> None:
    """Raise the errors of `build_memory`."""
    if media.ndim != 2 or media.dtype not in DTYPES:
        raise ValueError(
            "build_memory: media must be [M, d] of float16, bfloat16, float32 or float64, got"
            f" {media.dtype} {tuple(media.shape)}"
        )
    (M, d), L = media.shape, len(kv_weights)
    counts = [L if x is None else len(x) for x in (norm_weights, keys, values, scales)]
    if L == 0 or set(counts) != {L}:
        raise ValueError(
            "build_memory: kv_weights, norm_weights, keys, values and scales must be of one length,"
            f" that of the layers, got {[L, *counts]}"
        )
    if keys[0].ndim != 3:
        raise ValueError(f"build_memory: keys must be [C, G, D], got {tuple(keys[0].shape)}")
    C, G, D = keys[0].shape
    held = FLOAT8 if scales is not None else media.dtype
    for wanted, dtype, name, tensors in (
        ((2 * G * D, d), media.dtype, "kv_weights", kv_weights),
        ((d,), media.dtype, "norm_weights", () if norm_weights is None else norm_weights),
        ((C, G, D), held, "keys", keys),
        ((C, G, D), held, "values", values),
    ):
        for x in tensors:
            if x.shape != wanted or x.dtype != dtype or x.device != media.device:
                raise ValueError(
                    f"build_memory: {name} must be {dtype} {wanted} on {media.device} for media"
                    f" {tuple(media.shape)} and keys {(C, G, D)}, got {x.dtype} {tuple(x.shape)} on"
                    f" {x.device}"
                )
    if (
        cos.ndim != 2
        or cos.shape != sin.shape
        or not cos.shape[0]
        or 2 * cos.shape[1] != D
        or {cos.device, sin.device} != {media.device}
        or cos.dtype != sin.dtype
        or cos.dtype not in DTYPES
    ):
        raise ValueError(
            f"build_memory: cos and sin must be [P, {D}/2] of one floating dtype on {media.device},"
            f" got {cos.dtype} {tuple(cos.shape)} on {cos.device} and {sin.dtype}"
            f" {tuple(sin.shape)} on {sin.device}"
        )
    if ids.shape != (M,) or ids.dtype != torch.int32 or ids.device != media.device:
        raise ValueError(
            f"build_memory: ids must be int32 {(M,)} on {media.device}, got {ids.dtype}"
            f" {tuple(ids.shape)} on {ids.device}"
        )
    if not 0 <= row <= row + M <= C:
        raise ValueError(
            f"build_memory: {M} rows from row {row} on must fit the capacity {C} of the memory"
        )
    held = [] if scales is None else [t for scale in scales for t in scale[:2]]
    named = {"keys": keys, "values": values, "scales": held}
    check_writable(
        "build_memory",
        {f"{name}[{i}]": t for name, held in named.items() for i, t in enumerate(held)},
    )
    for scale in scales or ():
        check_count("build_memory", "the tile of scales", scale.tile, 1)
        wanted = (-(-C // scale.tile), G)
        if (
            scale.tile != (scales or ())[0].tile
            or row % scale.tile
            or any(
                x.shape != wanted or x.dtype != torch.float32 or x.device != media.device
                for x in scale[:2]
            )
        ):
            raise ValueError(
                f"build_memory: scales must be float32 {wanted} on {media.device} of one tile that"
                f" divides row {row}, got {tuple(scale.keys.shape)} and"
                f" {tuple(scale.values.shape)} of tile {scale.tile}"
            )


def check_build_kernel(
    media: Tensor,
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[MemoryScales] | None,
) -> None:
    """Raise for what the reference supports and the kernels do not, with every reason."""
    reasons = []
    weights = [*kv_weights, *(() if norm_weights is None else norm_weights)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (media, *weights)):
        reasons.append("no gradients are computed")
    if media.dtype == torch.float64:
        reasons.append("float64 has no kernel")
    layouts = {t.stride() for t in (*keys, *values)}
    if len(layouts) > 1 or keys[0].stride(-1) != 1 or not all(t.is_contiguous() for t in weights):
        reasons.append(
            "keys and values must have one layout, D contiguous, and weights be contiguous, got"
            f" strides {sorted(layouts)} and {[t.stride() for t in weights]}"
        )
    if media.stride(-1) != 1 or cos.stride() != sin.stride() or cos.stride(-1) != 1:
        reasons.append(
            f"media, cos and sin must be contiguous along their last dimension, got strides"
            f" {media.stride()}, {cos.stride()} and {sin.stride()}"
        )
    if keys[0].shape[-1] > 128:
        reasons.append(f"D must be at most 128, got {keys[0].shape[-1]}")
    if scales is not None:
        if not all(t.is_contiguous() for scale in scales for t in scale[:2]):
            reasons.append("scales must be contiguous")
        if media.is_cuda and not has_float8(media.get_device()):
            reasons.append("float8 needs a GPU of compute capability 8.9")
    if reasons:
        raise ValueError(
            f"build_memory: on a GPU {'; '.join(reasons)}: or use"
            " comemo_kernels.reference.build_memory"
        )
