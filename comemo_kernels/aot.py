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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from comemo_kernels._op import Config
from comemo_kernels.aot_cases import Case, cases


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
    name = case.kernel.function.__name__  # a launcher may launch others besides
    kernel = next(found for found in compiled if found.metadata.name == name)
    read = _read_amd if CHIPS[chip].target.backend == "hip" else _read_nvidia
    registers, spilled, code = read(kernel)
    hgmma = len(re.findall(r"\bHGMMA\b", code))
    faults = []
    if spilled > case.spills.get(chip, 0):
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
            for chip in [chip for chip in chips if chip in case.chips]:
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
