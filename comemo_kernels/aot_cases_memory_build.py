"""The launches of the memory build that `comemo_kernels.aot` compiles."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from comemo_kernels import _descriptors, _memory_build_tma, memory_build
from comemo_kernels._memory_build_gemm import project_exact, project_media
from comemo_kernels._memory_build_gradient import launch_turn_back, turn_back
from comemo_kernels._memory_build_rows import norm_media, scale_memory
from comemo_kernels.aot_case import FLOAT8, HOPPER, NVIDIA, Case


def memory_build_cases() -> list[Case]:
    def memory(dtype: torch.dtype, exact: bool, eight: bool) -> None:
        M, d, L, G, D = 3328, 2048, 6, 16, 128
        new = functools.partial(torch.empty, device="meta")
        held = [new(M, G, D, dtype=torch.float8_e4m3fn if eight else dtype)] * L
        table, ids = new(4096, D // 2), new(M, dtype=torch.int32)
        media, weights = new(M, d, dtype=dtype), [new(2 * G * D, d, dtype=dtype)] * L
        norms = [new(d, dtype=dtype)] * L if exact else []
        scales = [new(M // 256, G)] * L if eight else []
        arguments = (media, weights, norms, table, table, ids, held, held, scales, scales)
        memory_build._launch(*arguments, 256 if eight else 1, 0, 1e-5)

    def of(name: str, run: Callable[[], Any], configs: int = 1) -> Case:
        # Of 128 x 256 outputs; on sm_80 by triton 3.6 only.
        spills = {"sm_80": 40, "sm_100": 104} if configs > 1 else {}
        stage = lambda c: (c["BLOCK_M"] + 2 * c["BLOCK_C"]) * c["BLOCK_K"] * 2  # noqa: E731
        case = Case(project_media, name, run, configs, True, NVIDIA, spills)
        return replace(case, stage=stage, blocks=2)

    half, found = torch.bfloat16, []
    for exact, name in ((True, "exact"), (False, "folded")):
        run = functools.partial(memory, half, exact, False)
        found += [
            Case(norm_media, f"bf16 {name}", run, len(norm_media.configs)),
            of(f"bf16 {name}", run, len(project_media.configs)),
        ]
        run = functools.partial(memory, torch.float32, exact, False)
        found.append(Case(project_exact, f"fp32 {name}", run, chips=NVIDIA))
        run = functools.partial(memory, torch.float16, exact, False)
        found.append(of(f"fp16 {name}", run))
    run = functools.partial(memory, half, True, True)
    found.append(Case(scale_memory, "bf16 to fp8", run, chips=FLOAT8))

    def gradient(dtype: torch.dtype, G: int, given: str) -> None:
        M, D, new = 3328, 128, functools.partial(torch.empty, device="meta")
        table, dy = new(4096, D // 2), new(M, G, D, dtype=dtype)
        pair = [dy if name in given else None for name in ("keys", "values")]
        launch_turn_back(table, table, new(M, dtype=torch.int32), *pair)

    for name, *of_what in (
        ("bf16", half, 16, "keys and values"),
        ("bf16 of 9B", half, 32, "keys and values"),
        ("bf16 keys", half, 16, "keys"),
        ("bf16 values", half, 16, "values"),
        ("fp32", torch.float32, 16, "keys and values"),
    ):
        found.append(Case(turn_back, name, functools.partial(gradient, *of_what)))

    def by_tma(dtype: torch.dtype, exact: bool, D: int) -> None:
        M, d, L, G = 3328, 2048, 6, 2048 // D
        new = functools.partial(torch.empty, device="meta")
        x, table, address = new(L, M, d, dtype=dtype), new(4096, D // 2), new(L, 4).long()
        given = (x if exact else x[0], new(M), new(M).int(), table, table, address)
        _memory_build_tma.launch(*given, (G * D, D), M, (G, D), 0)

    kernel, stage = _memory_build_tma.project_tma, lambda c: (c["BLOCK_M"] + c["BLOCK_N"]) * 128
    every = len(kernel.configs)
    for name, configs, *of_what in (
        ("bf16 exact", every, half, True, 128),
        ("bf16 folded", every, half, False, 128),
        ("bf16 exact, 64 wide", 1, half, True, 64),
        ("fp16 exact", 1, torch.float16, True, 128),
    ):
        run = functools.partial(by_tma, *of_what)
        found.append(Case(kernel, name, run, configs, True, HOPPER, stage=stage))
    return found if _descriptors.AVAILABLE else [c for c in found if c.kernel is not kernel]
