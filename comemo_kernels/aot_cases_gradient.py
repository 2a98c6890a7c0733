"""The launches of attention's gradient that `comemo_kernels.aot` compiles."""

import functools
from collections.abc import Iterator
from typing import Any

import torch

from comemo_kernels import _attend_gradient as gradient
from comemo_kernels._op import Config
from comemo_kernels.aot_case import HOPPER, NVIDIA, Case, empty

HALF = torch.bfloat16
ROTATIONS = (("", None), (" one image", 1), (" several images", 4))


def gradient_cases() -> Iterator[Case]:
    for kind, images in ROTATIONS:
        yield from _cases(f"bf16{kind}", functools.partial(_launch, HALF, images))
    yield from _cases("bf16 gated", functools.partial(_launch, HALF, 1, gated=True), every=True)
    yield from _cases("bf16 grouped", functools.partial(_launch, HALF, 1, heads=4))
    yield from _cases("bf16 own ids", functools.partial(_launch, HALF, 4, prompts=2))
    yield from _cases("fp16", functools.partial(_launch, torch.float16, 1))
    for name, dtype, D in (("bf16 wide", HALF, 256), ("fp32", torch.float32, 128)):
        run = functools.partial(_launch, dtype, 4, D=D)
        for kernel in gradient._kernels_for(empty(1, D, dtype=dtype)):
            chips = NVIDIA[:2] if kernel is gradient.gradient_keys_wide else NVIDIA
            few = {"sm_80": 16, "sm_90": 16}  # by triton 3.6
            spills = few if dtype == torch.float32 else {}
            yield Case(kernel, name, run, 1, dtype == HALF, chips, spills)
    run = functools.partial(_launch, HALF, 4)
    for kernel in (gradient.gradient_bounds, gradient.gradient_runs, gradient.gradient_rebase):
        yield Case(kernel, "bf16 several images", run, spills={"sm_80": 8})  # by triton 3.6
    for name, dtype in (("bf16", HALF), ("fp16", torch.float16), ("fp32", torch.float32)):
        yield Case(gradient.gradient_rows, name, functools.partial(_launch, dtype, 1))


def _cases(name: str, run: Any, every: bool = False) -> Iterator[Case]:
    """A launch of the two GEMM kernels; `every` configuration of them, or the first."""
    queries, keys = gradient.gradient_queries, gradient.gradient_keys
    other = [chip for chip in NVIDIA if chip not in HOPPER]
    for kernel, tiles, chips in (
        (queries, "BLOCK_N", NVIDIA),
        (keys, "BLOCK_M", HOPPER),
        (gradient.gradient_keys_small, "BLOCK_M", tuple(other)),
    ):
        configs = len(kernel.configs) if every else 1
        stage = functools.partial(_stage_of, tiles)
        # Registers are full. On sm_90 by triton 3.6 addresses of results wait outside the loop.
        most = {"bf16": 72, "bf16 own ids": 112}.get(name, 32)
        spills = {"sm_80": most, "sm_90": 40, "sm_100": 8}
        yield Case(kernel, name, run, configs, True, chips, spills, stage=stage)


def _stage_of(tiles: str, config: Config) -> int:
    """Bytes of shared memory: two tiles of 16-bit numbers."""
    return 2 * config[tiles] * 128 * 2


def _launch(
    dtype: torch.dtype,
    images: int | None,
    gated: bool = False,
    heads: int = 16,
    prompts: int = 1,
    D: int = 128,
) -> None:
    """A packed row of 4,096 tokens and 16 query heads; `images` None does not rotate queries."""
    B, N, M, H = prompts, 4096 // prompts, 3328, 16
    q, k = empty(B, N, H, D, dtype=dtype), empty(M, heads, D, dtype=dtype)
    rotation: list[Any] = [None] * 5
    if images is not None:
        table, ids = empty(4096, D // 2), empty(B, N, dtype=torch.int64)
        starts = empty(images, dtype=torch.int32)
        rotation = [table, table, ids, starts, empty(prompts, images, dtype=torch.int32)]
    spans, gate = empty(B, N, 2, dtype=torch.int64), empty(1, dtype=dtype) if gated else None
    lse = empty(B, N, H)
    gradient._launch(q, q, k, k, q, lse, None, spans, *rotation, gate, True, True)
