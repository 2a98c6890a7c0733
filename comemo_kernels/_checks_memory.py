"""What arguments of the image memory must hold: sizes, places, spans."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels._op import check, check_count

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
    check(
        not listed or (min(listed) >= low and max(listed) < 2**31),
        f"{verb}: {name} must lie in [{low}, 2^31), got {min(listed, default=0)} to"
        f" {max(listed, default=0)}",
    )


def check_spans(verb: str, spans: Tensor | None) -> None:
    """Raise for what is no span of each prompt or token; None is nobody's."""
    if spans is None:
        return
    check(
        spans.ndim == 3 and spans.shape[2] == 2 and spans.dtype in INTEGERS,
        f"{verb}: spans must be int32 or int64 [B, 1, 2] or [B, N, 2], got {spans.dtype}"
        f" {tuple(spans.shape)}",
    )


def check_biases(verb: str, biases: Tensor, images: int) -> Tensor:
    """int32 [1 or B, I] of biases [I] or [B, I] that are those of `images` images."""
    check(
        biases.ndim in (1, 2) and biases.shape[-1] == images and biases.dtype in INTEGERS,
        f"{verb}: biases must be for the {images} images, int32 or int64 [I] or [B, I], got"
        f" {biases.dtype} {tuple(biases.shape)}",
    )
    check_narrow(verb, "biases", biases.flatten(), 0)
    return biases.reshape(-1, images).int()
