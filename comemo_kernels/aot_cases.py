"""What `comemo_kernels.aot` compiles: every kernel, dtype, variant and configuration that ships."""

import functools
import itertools
from typing import Any

import torch

from comemo_kernels import _rows_kernel, positions, rotary
from comemo_kernels._op import Config
from comemo_kernels.aot_case import Case, empty
from comemo_kernels.aot_cases_attention import attention_cases
from comemo_kernels.aot_cases_gradient import gradient_cases
from comemo_kernels.aot_cases_memory_build import memory_build_cases
from comemo_kernels.aot_cases_tiles import tiles_cases
from comemo_kernels.aot_cases_training import training_cases


def cases() -> list[Case]:
    """Everything that ships: each kernel, each dtype and variant, each configuration once."""
    found = [*_rotary_cases(), *_positions_cases(), *_fused_linear_cases()]
    return [
        *found,
        *attention_cases(),
        *gradient_cases(),
        *memory_build_cases(),
        *tiles_cases(),
        *training_cases(),
    ]


def _rotary_cases() -> list[Case]:
    def rotate(kind: str, dtype: torch.dtype, inverse: bool = False, D: int = 128) -> None:
        B, N, P, images = 2, 4096, 4096, 4
        q, k = empty(B, N, 16, D, dtype=dtype), empty(B, N, 8, D, dtype=dtype)
        table = empty(B, N, 64, dtype=dtype) if kind == "table" else empty(P, 64)
        positions = {
            "table": None,
            "int32": empty(B, N, dtype=torch.int32),
            "int64": empty(B, N, dtype=torch.int64),
            "grids": empty(images, 4, dtype=torch.int32),
        }[kind]
        side = 16 if kind == "grids" else 0
        rotary._launch([q, k], table, table, positions, side, True, True, inverse, inverse)

    half = torch.bfloat16

    def of_rotary(name: str, *args: Any, configs: int = 1, **kwargs: Any) -> Case:
        run = functools.partial(rotate, *args, **kwargs)
        blocks = 8 if args[1] == half and not kwargs.get("inverse") else 1  # 1,024 threads
        return Case(rotary.rotary_kernel, name, run, configs, blocks=blocks)

    every = len(rotary.rotary_kernel.configs)
    found = [
        of_rotary("bf16 table", "table", half, configs=every),
        of_rotary("bf16 int64 ids", "int64", half, configs=every),
        of_rotary("bf16 grids", "grids", half, configs=every),
        of_rotary("bf16 int32 ids", "int32", half),
        of_rotary("bf16 gradient, published", "int64", half, inverse=True),
        of_rotary("bf16 grids gradient, published", "grids", half, inverse=True),
        of_rotary("bf16 128 of 192", "int64", half, D=192),
    ]
    for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32"), (torch.float64, "fp64")):
        found += [of_rotary(f"{name} {kind}", kind, dtype) for kind in ("table", "int64", "grids")]
    return found


def _positions_cases() -> list[Case]:
    def number(attention: torch.dtype, column: bool) -> None:
        mask = empty(2, 4096, dtype=torch.bool)
        grids = empty(4, 4, dtype=torch.int32)
        positions._launch(mask, mask.to(attention), grids, 13312, 16, column, True)

    kernel, found = positions.rope_dhr_kernel, []
    for mask, column in ((torch.int64, True), (torch.bool, False)):
        name = f"{str(mask).removeprefix('torch.')} mask"
        run = functools.partial(number, mask, column)
        found.append(Case(kernel, name, run, len(kernel.configs)))
    return found


def _fused_linear_cases() -> list[Case]:
    def launch(verb: str, dtype: torch.dtype, K: int, folded: bool) -> None:
        x, weight = empty(1, K, dtype=dtype), empty(2048, K, dtype=dtype)
        residual = empty(1, 2048, dtype=dtype)
        norm, gate = (None if folded else weight.new_empty(n) for n in (K, 1))
        if verb == "residual":
            _rows_kernel._launch(x, None, weight, None, residual, gate, None)
        else:
            up = weight if verb == "swiglu" else None
            _rows_kernel._launch(x, norm, weight, up, None, None, 1e-5)

    found = []
    one, two = _rows_kernel.one_weight_kernel, _rows_kernel.two_weights_kernel
    for verb, folded in itertools.product(("norm", "swiglu", "residual"), (False, True)):
        kernel = two if verb == "swiglu" else one
        for name, dtype, K in (
            ("bf16", torch.bfloat16, 2048),
            ("bf16 uneven", torch.bfloat16, 2056),
            ("fp16", torch.float16, 2048),
            ("fp32", torch.float32, 2048),
        ):
            run = functools.partial(launch, verb, dtype, K, folded)
            configs = len(kernel.configs) if name == "bf16" else 1
            spills = {"sm_80": 8} if (verb, folded, name) == ("norm", True, "fp32") else {}
            title = f"{name} rows, {verb}" + ", folded" * folded
            rows = 2 if verb == "swiglu" else 1
            # `PARTED` of the kernel.
            most = 128 if (verb, name) == ("swiglu", "fp32") else 512
            stage = functools.partial(_stage_of_rows, rows, most)
            found.append(Case(kernel, title, run, configs, spills=spills, stage=stage))
    return found


def _stage_of_rows(weights: int, most: int, config: Config) -> int:
    """Bytes of shared memory: x and weights, at most so many of a row."""
    rows = _rows_kernel.ROWS + weights * config["BLOCK_O"]
    return rows * min(most, config["BLOCK_BYTES"])
