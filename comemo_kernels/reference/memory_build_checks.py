"""Argument checks of the memory build: `build_memory` and `project_memory`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels._op import check_count, has_float8
from comemo_kernels._writes import check_writable
from comemo_kernels.attention_types import MemoryScales
from comemo_kernels.reference.dtypes import DTYPES, FLOAT8


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
    _check_media("build_memory", media)
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
    shapes = (f"keys {(C, G, D)}", media)
    _check_each("build_memory", "kv_weights", kv_weights, (2 * G * D, d), media.dtype, *shapes)
    norms = () if norm_weights is None else norm_weights
    _check_each("build_memory", "norm_weights", norms, (d,), media.dtype, *shapes)
    _check_each("build_memory", "keys", keys, (C, G, D), held, *shapes)
    _check_each("build_memory", "values", values, (C, G, D), held, *shapes)
    _check_table("build_memory", media, cos, sin, ids, D)
    _check_learning(media, kv_weights, norm_weights)
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
    reasons = _reasons(media, cos, sin, keys[0].shape[-1])
    weights = [*kv_weights, *(() if norm_weights is None else norm_weights)]
    layouts = {t.stride() for t in (*keys, *values)}
    if len(layouts) > 1 or keys[0].stride(-1) != 1 or not all(t.is_contiguous() for t in weights):
        reasons.append(
            "keys and values must have one layout, D contiguous, and weights be contiguous, got"
            f" strides {sorted(layouts)} and {[t.stride() for t in weights]}"
        )
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


def check_projection(
    media: Tensor,
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    heads: int,
) -> None:
    """Raise the errors of `project_memory` that do not depend on the device."""
    verb, L = "project_memory", len(kv_weights)
    _check_media(verb, media)
    if L == 0 or (norm_weights is not None and len(norm_weights) != L):
        counts = [L, *(() if norm_weights is None else (len(norm_weights),))]
        raise ValueError(
            f"{verb}: kv_weights and norm_weights must be of one length, that of the layers, got"
            f" {counts}"
        )
    check_count(verb, "heads", heads, 1)
    d, D = media.shape[1], 2 * cos.shape[-1] if cos.ndim else 0
    _check_table(verb, media, cos, sin, ids, D)
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(
            f"{verb}: cos and sin must not require grad, got {cos.requires_grad} and"
            f" {sin.requires_grad}: there is no gradient for them"
        )
    shapes = (f"{heads} heads of {D}", media)
    _check_each(verb, "kv_weights", kv_weights, (2 * heads * D, d), media.dtype, *shapes)
    norms = () if norm_weights is None else norm_weights
    _check_each(verb, "norm_weights", norms, (d,), media.dtype, *shapes)


def check_projection_kernel(
    media: Tensor,
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """Raise for what the reference supports and the kernels do not, with every reason."""
    reasons = _reasons(media, cos, sin, 2 * cos.shape[1])
    weights = [*kv_weights, *(() if norm_weights is None else norm_weights)]
    if not all(t.is_contiguous() for t in weights):
        reasons.append(f"weights must be contiguous, got strides {[t.stride() for t in weights]}")
    if reasons:
        raise ValueError(
            f"project_memory: on a GPU {'; '.join(reasons)}: or use"
            " comemo_kernels.reference.project_memory"
        )


def _reasons(media: Tensor, cos: Tensor, sin: Tensor, D: int) -> list[str]:
    """What the kernels do not support, whatever they write."""
    reasons = []
    if media.dtype == torch.float64:
        reasons.append("float64 has no kernel")
    if media.stride(-1) != 1 or cos.stride() != sin.stride() or cos.stride(-1) != 1:
        reasons.append(
            f"media, cos and sin must be contiguous along their last dimension, got strides"
            f" {media.stride()}, {cos.stride()} and {sin.stride()}"
        )
    if D > 128:
        reasons.append(f"D must be at most 128, got {D}")
    return reasons


def _check_learning(
    media: Tensor, kv_weights: Sequence[Tensor], norm_weights: Sequence[Tensor] | None
) -> None:
    norms = () if norm_weights is None else norm_weights
    learning = {"media": (media,), "kv_weights": kv_weights, "norm_weights": norms}
    found = [name for name, held in learning.items() if any(t.requires_grad for t in held)]
    if torch.is_grad_enabled() and found:
        raise ValueError(
            "build_memory: media and weights must not require grad where gradients are enabled, got"
            f" {', '.join(found)} that do: no gradients are computed, project_memory computes them"
        )


def _check_media(verb: str, media: Tensor) -> None:
    if media.ndim != 2 or media.dtype not in DTYPES:
        raise ValueError(
            f"{verb}: media must be [M, d] of float16, bfloat16, float32 or float64, got"
            f" {media.dtype} {tuple(media.shape)}"
        )


def _check_each(
    verb: str,
    name: str,
    tensors: Sequence[Tensor],
    wanted: tuple[int, ...],
    dtype: torch.dtype,
    shapes: str,
    media: Tensor,
) -> None:
    for x in tensors:
        if x.shape != wanted or x.dtype != dtype or x.device != media.device:
            raise ValueError(
                f"{verb}: {name} must be {dtype} {wanted} on {media.device} for media"
                f" {tuple(media.shape)} and {shapes}, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )


def _check_table(verb: str, media: Tensor, cos: Tensor, sin: Tensor, ids: Tensor, D: int) -> None:
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
            f"{verb}: cos and sin must be [P, {D}/2] of one floating dtype on"
            f" {media.device}, got {cos.dtype} {tuple(cos.shape)} on {cos.device} and {sin.dtype}"
            f" {tuple(sin.shape)} on {sin.device}"
        )
    M = len(media)
    if ids.shape != (M,) or ids.dtype != torch.int32 or ids.device != media.device:
        raise ValueError(
            f"{verb}: ids must be int32 {(M,)} on {media.device}, got {ids.dtype}"
            f" {tuple(ids.shape)} on {ids.device}"
        )
