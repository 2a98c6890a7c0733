"""Checks of sizes, ids, spans and biases of the image memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels._op import check_count
from comemo_kernels.reference.dtypes import INTEGERS


def known_values(values: Tensor) -> list[int]:
    """The values of a CPU tensor; none of a GPU tensor, which would sync, or while compiling."""
    known = values.device.type == "cpu" and not torch.compiler.is_compiling()
    return values.tolist() if known else []


def check_sizes(verb: str, name: str, sizes: Sequence[int], low: int) -> None:
    """Raise ValueError, naming function `verb`, unless all sizes are integers of at least `low`."""
    for i, size in enumerate(sizes):
        check_count(verb, f"{name}[{i}]", size, low)


def check_narrow(verb: str, name: str, ids: Tensor, low: int = -(2**31)) -> None:
    """Raise for ids on a CPU that are not in [low, 2^31)."""
    listed = known_values(ids)
    if listed and (min(listed) < low or max(listed) >= 2**31):
        raise ValueError(
            f"{verb}: {name} must be in [{low}, 2^31), got {min(listed)} to {max(listed)}"
        )


def check_spans(verb: str, spans: Tensor | None) -> None:
    """Raise unless there is a span for each prompt or each token; None is allowed."""
    if spans is not None and (
        spans.ndim != 3 or spans.shape[2] != 2 or spans.dtype not in INTEGERS
    ):
        raise ValueError(
            f"{verb}: spans must be int32 or int64 [B, 1, 2] or [B, N, 2], got {spans.dtype}"
            f" {tuple(spans.shape)}"
        )


def check_biases(verb: str, biases: Tensor, images: int) -> Tensor:
    """Check biases [I] or [B, I] of `images` images, and return them as int32 [1 or B, I]."""
    if biases.ndim not in (1, 2) or biases.shape[-1] != images or biases.dtype not in INTEGERS:
        raise ValueError(
            f"{verb}: biases must be for the {images} images, int32 or int64 [I] or [B, I], got"
            f" {biases.dtype} {tuple(biases.shape)}"
        )
    check_narrow(verb, "biases", biases.flatten(), 0)
    return biases.reshape(-1, images).int()
