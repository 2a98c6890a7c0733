"""What arguments of the image memory must hold: sizes, places, spans, what is built."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels._checks import DTYPES, FLOAT8
from comemo_kernels._op import check_count
from comemo_kernels._writes import check_writable
from comemo_kernels.attention_types import MemoryScales

INTEGERS = {torch.int32, torch.int64}


def at_hand(values: Tensor) -> list[int]:
    """What a tensor holds, if nobody has to wait for it: of a GPU, and while compiling, nothing."""
    known = values.device.type == "cpu" and not torch.compiler.is_compiling()
    return values.tolist() if known else []


def check_sizes(verb: str, name: str, sizes: Sequence[int], low: int) -> None:
    """Raise ValueError in the name of function `verb` unless all are counts from `low` on."""
    for i, size in enumerate(sizes):
        check_count(verb, f"{name}[{i}]", size, low)


def check_narrow(verb: str, name: str, ids: Tensor, low: int = -(2**31)) -> None:
    """Raise for ids that do not lie in [low, 2^31) of int32, as far as they are at hand."""
    listed = at_hand(ids)
    if listed and (min(listed) < low or max(listed) >= 2**31):
        raise ValueError(
            f"{verb}: {name} must lie in [{low}, 2^31), got {min(listed)} to {max(listed)}"
        )


def check_spans(verb: str, spans: Tensor | None) -> None:
    """Raise for what is no span of each prompt or token; None is nobody's."""
    if spans is not None and (
        spans.ndim != 3 or spans.shape[2] != 2 or spans.dtype not in INTEGERS
    ):
        raise ValueError(
            f"{verb}: spans must be int32 or int64 [B, 1, 2] or [B, N, 2], got {spans.dtype}"
            f" {tuple(spans.shape)}"
        )


def check_biases(verb: str, biases: Tensor, images: int) -> Tensor:
    """int32 [1 or B, I] of biases [I] or [B, I] that are those of `images` images."""
    if biases.ndim not in (1, 2) or biases.shape[-1] != images or biases.dtype not in INTEGERS:
        raise ValueError(
            f"{verb}: biases must be for the {images} images, int32 or int64 [I] or [B, I], got"
            f" {biases.dtype} {tuple(biases.shape)}"
        )
    check_narrow(verb, "biases", biases.flatten(), 0)
    return biases.reshape(-1, images).int()


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
    """Raise the errors of `build_memory`, before anything is written."""
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
            f"build_memory: {M} rows from row {row} on must lie in the capacity {C} of the memory"
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
