"""The launches of the tile projection that `comemo_kernels.aot` compiles."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from comemo_kernels import _gelu_gradient, _gemm, _unshuffle_norm, tiles
from comemo_kernels._op import Kernel
from comemo_kernels.aot_case import EVERY, NVIDIA, Case


def tiles_cases() -> list[Case]:
    def projected(
        dtype: torch.dtype,
        gradients: bool,
        T: int = 13,
        C: int = 1024,
        d: int = 2048,
        to: tuple[bool, bool] = (True, True),  # tokens, and the norm's weight and bias
    ) -> None:
        new = functools.partial(torch.empty, device="meta", dtype=dtype)
        W, R, n = C * 4, T * 256, 2
        tokens, weights = new(T, 1025, C), (new(W), new(W), new(d, W), new(d), new(d, d), new(d))
        if gradients:
            _, normed, stats, _ = tiles._launch(tokens, *weights, n, False, 1e-5, True)
            _gelu_gradient._launch(new(R, d), new(R, d))
            inputs = (normed, tokens, weights[0], stats, n, False)
            _unshuffle_norm._launch_fold_norm_gradient(*inputs, *to)
        else:
            rows = new(R, dtype=torch.int64)
            tiles._launch_into(new(R, d), new(R, d), rows, tokens, *weights, n, False, 1e-5)

    def of(kernel: Kernel, name: str, run: Callable[[], Any], dot: bool = False) -> Case:
        configs = len(kernel.configs) if name == "bf16" else 1
        spills = {"sm_100": 64} if dot and configs > 1 else {}  # of 128 x 256 outputs
        if kernel is _unshuffle_norm.fold_norm_gradient:
            spills = {"sm_80": 8}  # by triton 3.6 only
        elif kernel is _unshuffle_norm.fold_norm_gradient_wide:
            spills = {"sm_80": 32, "sm_90": 80, "sm_100": 96}
        found = Case(kernel, name, run, configs, dot, NVIDIA if dot else EVERY, spills)
        if dot:
            stage = lambda c: (c["BLOCK_M"] + c["BLOCK_N"]) * c["BLOCK_K"] * 2  # noqa: E731
            found = replace(found, stage=stage, blocks=2)
        elif kernel is _unshuffle_norm.fold_norm_gradient:
            found = replace(found, blocks=2)
        return replace(found, aligned="uneven" not in name or dot)

    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for gradients in (False, True):
            # With this many tiles the last wave is split.
            run = functools.partial(projected, dtype, gradients, 17 if name == "fp32" else 13)
            title = name + ", gradients" * gradients
            product = _gemm.product_exact if name == "fp32" else _gemm.product
            found += [
                of(_unshuffle_norm.fold_norm, title, run),
                of(product, title, run, name != "fp32"),
                of(_gemm.add_parts, title, run),
            ]
            if gradients:
                found += [
                    of(_unshuffle_norm.fold_norm_gradient, name, run),
                    of(_gelu_gradient.gelu_gradient, name, run),
                ]
    odd = functools.partial(projected, torch.bfloat16, False, 1, 1020, 2040)
    found += [
        of(_unshuffle_norm.fold_norm, "bf16 uneven", odd),
        of(_gemm.product, "bf16 uneven", odd, True),
    ]
    for to, title in (((True, False), "tokens"), ((False, True), "norm")):
        wide = functools.partial(projected, torch.float32, True, 1, 3200, 64, to)
        found.append(of(_unshuffle_norm.fold_norm_gradient_wide, f"fp32 wide, {title}", wide))
    return [*found, of(_unshuffle_norm.fold_norm_wide, "fp32 wide", wide)]
