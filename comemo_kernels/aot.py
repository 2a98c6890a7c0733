"""Compile every kernel ahead of time, for GPUs that need not be there, and read what came out.

`python -m comemo_kernels.aot [--out FILE.csv]` prints a table and fails where a limit is broken:
spills, more shared memory than a block may have, no HGMMA on sm_90 where a dot should be one.
The launchers run on tensors without storage, under a driver that only names an architecture: what
is compiled is what would be launched, and no signature is written down twice.
"""

import argparse
import contextlib
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from comemo_kernels import glue, positions, rotary
from comemo_kernels._op import Config, Kernel


class Chip(NamedTuple):
    target: GPUTarget
    shared: int  # bytes of shared memory that one block may use


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Case:
    """A launch to compile: real shapes and dtypes, no storage."""

    kernel: Kernel
    name: str
    launch: Callable[[], Any]
    configs: int = 1  # how many of the shipped configurations, the first ones, it stands for
    dot: bool = False  # whether it multiplies matrices


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case for a chip."""

    kernel: str
    case: str
    config: str
    chip: str
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack, or registers on AMD
    shared: int  # bytes of a block
    instructions: int
    wide: int  # loads and stores of 128 bits
    hgmma: int  # warp-group matrix instructions
    faults: tuple[str, ...]  # limits that are broken


def cases() -> list[Case]:
    """Everything that ships: each kernel, each dtype and variant, each configuration once."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

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

    def number(attention: torch.dtype, column: bool) -> None:
        mask = empty(2, 4096, dtype=torch.bool)
        grids = empty(4, 4, dtype=torch.int32)
        positions._launch(mask, mask.to(attention), grids, 13312, 16, column, True)

    def of_rotary(name: str, *args: Any, configs: int = 1, **kwargs: Any) -> Case:
        return Case(rotary.rotary_kernel, name, lambda: rotate(*args, **kwargs), configs)

    half, every = torch.bfloat16, len(rotary.rotary_kernel.configs)
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
    numbering = positions.rope_dhr_kernel
    for attention, column in ((torch.int64, True), (torch.bool, False)):
        name = f"{str(attention).removeprefix('torch.')} mask"
        launch = lambda a=attention, c=column: number(a, c)  # noqa: E731
        found.append(Case(numbering, name, launch, len(numbering.configs)))
    found += _glue_cases()
    return found


def _glue_cases() -> list[Case]:
    def launch(verb: str, dtype: torch.dtype, K: int) -> None:
        x, norm, weight, residual, gate = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((1, K), (K,), (2048, K), (1, 2048), (1,))
        )
        if verb == "residual":
            glue._launch(x, None, weight, None, residual, gate, 0.0)
        else:
            glue._launch(x, norm, weight, weight if verb == "swiglu" else None, None, None, 1e-5)

    found = []
    for verb in ("norm", "swiglu", "residual"):
        kernel = glue.two_weights_kernel if verb == "swiglu" else glue.one_weight_kernel
        for name, dtype, K in (
            ("bf16", torch.bfloat16, 2048),
            ("bf16 uneven", torch.bfloat16, 2056),
            ("fp16", torch.float16, 2048),
            ("fp32", torch.float32, 2048),
        ):
            run = lambda verb=verb, dtype=dtype, K=K: launch(verb, dtype, K)  # noqa: E731
            configs = len(kernel.configs) if name == "bf16" else 1
            found.append(Case(kernel, f"{name} rows, {verb}", run, configs))
    return found


class OfflineDriver:
    """What Triton asks of a driver, answered for a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"offline {self.target.arch}"  # one kernel cache for each architecture

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextlib.contextmanager
def offline(target: GPUTarget) -> Iterator[list[Any]]:
    """Within this block launches compile for `target`, run nothing, and are recorded."""
    compiled: list[Any] = []
    run, previous = JITFunction.run, dict(vars(driver))

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    driver.set_active(OfflineDriver(target))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        vars(driver).update(previous)


def compile_case(case: Case, config: Config, chip: str) -> Compiled:
    """Compile one launch for one chip, and hold the result against the chip's limits."""
    with case.kernel.using(config), offline(CHIPS[chip].target) as compiled:
        case.launch()
    (kernel,) = compiled
    read = _read_amd if CHIPS[chip].target.backend == "hip" else _read_nvidia
    registers, spilled, code = read(kernel)
    hgmma = len(re.findall(r"\bHGMMA\b", code))
    faults = []
    if spilled:
        faults.append(f"spills {spilled}")
    if kernel.metadata.shared > CHIPS[chip].shared:
        faults.append(f"shared memory {kernel.metadata.shared} above {CHIPS[chip].shared}")
    if case.dot and chip == "sm_90" and not hgmma:
        faults.append("no HGMMA")
    return Compiled(
        kernel=kernel.metadata.name,
        case=case.name,
        config=" ".join(
            f"{k.removeprefix('BLOCK_').removeprefix('num_')} {v}" for k, v in config.items()
        ),
        chip=chip,
        registers=registers,
        spilled=spilled,
        shared=kernel.metadata.shared,
        instructions=len(code.splitlines()),
        wide=len(re.findall(r"\b(?:LDG|STG)\.E[\w.]*\.128\b|global_(?:load|store)_dwordx4", code)),
        hgmma=hgmma,
        faults=tuple(faults),
    )


def _read_nvidia(kernel: Any) -> tuple[int, int, str]:
    """Registers, bytes of stack and disassembly, by the tool in Triton's wheel."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    return counts["REG"], counts["STACK"] + counts["LOCAL"], "\n".join(lines)


def _read_amd(kernel: Any) -> tuple[int, int, str]:
    code = kernel.asm["amdgcn"]
    counts = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)", code)}
    lines = [line for line in code.splitlines() if re.match(r"\t[a-z]", line)]
    spilled = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
    return counts["vgpr_count"], spilled, "\n".join(lines)


def compile_all(chips: list[str]) -> Iterator[Compiled]:
    """Each case in each configuration that it stands for, for each chip."""
    for case in cases():
        for config in case.kernel.configs[: case.configs]:
            for chip in chips:
                yield compile_case(case, config, chip)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m comemo_kernels.aot", description=__doc__)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--out", type=Path, help="CSV file to write the table to")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("python -m comemo_kernels.aot: TRITON_INTERPRET=1 replaces the compiler: unset it")
    print(f"triton {triton.__version__}")
    columns = [name for name in Compiled.__dataclass_fields__ if name != "faults"]
    form = "{:18} {:31} {:18} {:7} {:>9} {:>7} {:>6} {:>12} {:>4} {:>5}"
    print(form.format(*columns))
    rows, broken = [], 0
    for row in compile_all(options.chips):
        rows.append([getattr(row, name) for name in columns])
        print(form.format(*map(str, rows[-1])), *row.faults, flush=True)
        broken += bool(row.faults)
    if options.out:
        with options.out.open("w", newline="") as file:
            file.write(f"# triton: {triton.__version__}\n# torch: {torch.__version__}\n")
            csv.writer(file).writerows([columns, *rows])
    if broken:
        sys.exit(f"python -m comemo_kernels.aot: {broken} of {len(rows)} break a limit")


if __name__ == "__main__":
    main()
