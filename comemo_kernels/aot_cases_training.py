"""The launches of training, beside those of attention, that `comemo_kernels.aot` compiles."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from comemo_kernels import _rms_norm_gradient, _swiglu
from comemo_kernels._op import Kernel
from comemo_kernels.aot_case import NVIDIA, Case, empty

HALF = torch.bfloat16
ROWS = 4096
SIZES = ((2048, 8192), (4096, 14336))  # d and F of the 2B and of the 9B model
DTYPES = ((HALF, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32"))


def training_cases() -> Iterator[Case]:
    for dtype, name in DTYPES:
        for d, wide in SIZES:
            yield from _norm_cases(dtype, f"{name} {d}", d)
            yield from _swiglu_cases(dtype, f"{name} {wide}", wide)
    # Frozen norms, and folded ones; memory_build adds no residual.
    for title, *flags in (
        ("frozen", True, True, True, False),
        ("folded", False, False, True, False),
        ("media", True, False, True, True),
        ("weight alone", True, False, False, True),
    ):
        run = functools.partial(_norm, HALF, 2048, *flags)
        yield Case(_rms_norm_gradient.rms_norm_gradient, f"bf16 2048, {title}", run)
    widest = _rms_norm_gradient.rms_norm_gradient_widest
    for dtype, name in DTYPES[::2]:
        for title, *to in (("x", True, False), ("weight", False, True)):
            run = functools.partial(_norm, dtype, 16384, True, True, *to)
            spills = dict.fromkeys(NVIDIA, 64) if name == "fp32" and title == "x" else {}
            yield Case(widest, f"{name} 16384, {title}", run, spills=spills)
    for title, *flags in (
        ("frozen", True, True, False, False),
        ("gate alone", True, False, False, True),
    ):
        run = functools.partial(_swiglu_gradient, HALF, 8192, *flags)
        yield Case(_swiglu.swiglu_gradient, f"bf16 8192, {title}", run)


def _every(kernel: Kernel, name: str, run: Callable[[], Any], first: str, blocks: int) -> Case:
    """In every configuration if it is the first case; `blocks` run at once on a multiprocessor."""
    return Case(kernel, name, run, len(kernel.configs) if name == first else 1, blocks=blocks)


def _norm_cases(dtype: torch.dtype, name: str, d: int) -> Iterator[Case]:
    run = functools.partial(_norm, dtype, d, True, True, True, True)
    if d > _rms_norm_gradient.NARROW:
        yield _every(_rms_norm_gradient.rms_norm_gradient_wide, name, run, "bf16 4096", 2)
    else:
        yield _every(_rms_norm_gradient.rms_norm_gradient, name, run, "bf16 2048", 4)


def _swiglu_cases(dtype: torch.dtype, name: str, wide: int) -> Iterator[Case]:
    def forward() -> None:
        _swiglu._launch(empty(ROWS, wide, dtype=dtype), empty(ROWS, wide, dtype=dtype))

    yield _every(_swiglu.swiglu, name, forward, "bf16 8192", 8)
    run = functools.partial(_swiglu_gradient, dtype, wide, True, True, True, True)
    yield _every(_swiglu.swiglu_gradient, name, run, "bf16 8192", 4)


def _norm(
    dtype: torch.dtype, d: int, weighted: bool, added: bool, to_x: bool, to_weight: bool
) -> None:
    x = empty(ROWS, d, dtype=dtype)
    weight, plus = empty(d, dtype=dtype) if weighted else None, x if added else None
    _rms_norm_gradient._launch(x, x, weight, plus, 1e-5, to_x, to_weight)


def _swiglu_gradient(
    dtype: torch.dtype, wide: int, gated: bool, to_inner: bool, to_product: bool, to_gate: bool
) -> None:
    g, gate = empty(ROWS, wide, dtype=dtype), empty(1, dtype=dtype) if gated else None
    _swiglu._launch_gradient(g, g, g, gate, to_inner, to_product, to_gate)
