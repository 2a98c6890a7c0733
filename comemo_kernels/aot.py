"""Compile every kernel ahead of time, on a machine without the GPUs, and check what came out.

`python -m comemo_kernels.aot [--out FILE.csv]` prints a table and fails where a limit is broken:
spills, or more shared memory than a block may have; on sm_90 also a dot without HGMMA, accesses of
less than 128 bits to a large tensor, a loop that is not pipelined, or fewer blocks on a
multiprocessor than the launcher needs.
`python -m comemo_kernels.aot --counts [--kernels NAME ...] [--cases TEXT ...] [--out FILE.csv]`
prints for sm_90 what the main loop of each kernel asks of a multiprocessor, and which resource
limits it on an H100 and an H200 (`aot_counts`).
The launchers run on tensors without storage, under a driver that only names an architecture: the
compiled kernels are those of real launches, and no signature is written twice.
"""

import argparse
import contextlib
import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from comemo_kernels import aot_counts
from comemo_kernels._op import Config
from comemo_kernels.aot_case import SMALL, Case
from comemo_kernels.aot_cases import cases
from comemo_kernels.aot_read import count_products, count_wide, read_accesses, read_usage


class Chip(NamedTuple):
    target: GPUTarget
    shared: int  # bytes of shared memory that one block may use
    company: int  # bytes of all blocks on a multiprocessor, each with 1 KiB more


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, 164 * 1024),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, 228 * 1024),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, 228 * 1024),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, 64 * 1024),
}


# Pointers to what all blocks read, which comes from L2; besides those in SMALL.
CACHED = {
    name: frozenset(pointers.split())
    for name, pointers in {
        "_rotary_kernel": "cos_ptr sin_ptr",
        "_turn_kernel": "cos_ptr sin_ptr",
        "_gradient_rows_kernel": "cos_ptr sin_ptr",
        "_gradient_rebase_kernel": "cos_ptr sin_ptr",
        "_rows_kernel": "x_ptrs",
        "_fold_norm_kernel": "weight_ptr bias_ptr",
        "_fold_norm_gradient_kernel": "weight_ptr",
        "_rms_norm_gradient_kernel": "weight_ptr",
    }.items()
}


@dataclass(frozen=True)
class Compiled:
    """The compiled kernel of a case for a chip, in numbers."""

    kernel: str
    case: str
    config: str
    chip: str
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack, or registers on AMD
    shared: int  # bytes of a block
    blocks: int  # that fit a multiprocessor; 0 on AMD, where it is not counted
    wide: int  # loads, stores and copies of 128 bits
    hgmma: int  # matrix instructions that read shared memory directly
    faults: tuple[str, ...]  # broken limits


class OfflineDriver:
    """Triton's driver interface for a GPU that the machine does not have."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"offline {self.target.arch}"  # one kernel cache for each architecture

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextlib.contextmanager
def offline(target: GPUTarget, only: Any = None) -> Iterator[list[Any]]:
    """Within this block launches only compile for `target`; the kernels are in the list.

    Args:
        target: a GPU.
        only: the one jitted function to compile; None compiles all.
    """
    compiled: list[Any] = []
    run, previous = JITFunction.run, dict(vars(driver))

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if only is None or self is only:
            compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    driver.set_active(OfflineDriver(target))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        vars(driver).update(previous)


def compile_kernel(case: Case, config: Config, chip: str) -> Any:
    """The kernel of one launch for one chip, as Triton returns it."""
    # A launcher may launch others too.
    only = offline(CHIPS[chip].target, case.kernel.function)
    with case.kernel.using(config), only as compiled:
        case.launch()
    return compiled[0]


def name_config(config: Config) -> str:
    """A configuration as the table writes it."""
    return " ".join(
        f"{k.removeprefix('BLOCK_').removeprefix('num_')} {v}" for k, v in config.items()
    )


def compile_case(case: Case, config: Config, chip: str) -> Compiled:
    """Compile one launch for one chip, and check the result against the chip's limits."""
    kernel = compile_kernel(case, config, chip)
    usage, shared, products = read_usage(kernel), kernel.metadata.shared, count_products(kernel)
    blocks = count_blocks(chip, usage.registers, shared, kernel.metadata.num_warps)
    faults = []
    if usage.spilled > case.spills.get(chip, 0):
        faults.append(f"spills {usage.spilled}")
    if shared > CHIPS[chip].shared:
        faults.append(f"shared memory {shared} above {CHIPS[chip].shared}")
    if chip == "sm_90":
        faults += _find_faults(case, config, kernel, blocks, products)
    return Compiled(
        kernel=kernel.metadata.name,
        case=case.name,
        config=name_config(config),
        chip=chip,
        registers=usage.registers,
        spilled=usage.spilled,
        shared=shared,
        blocks=blocks,
        wide=count_wide(kernel),
        hgmma=products,
        faults=tuple(faults),
    )


def _find_faults(
    case: Case, config: Config, kernel: Any, blocks: int, products: int
) -> Iterator[str]:
    """What makes a kernel for sm_90 slow, though it runs."""
    if case.dot and not products:
        yield "no HGMMA"
    allowed = SMALL.get(kernel.metadata.name, frozenset()) | case.narrow
    narrow = [a for a in read_accesses(kernel) if a.bytes < 16 and a.tensor not in allowed]
    if case.aligned and narrow:
        listed = sorted({f"{access.tensor} by {8 * access.bytes} bits" for access in narrow})
        yield f"narrow accesses: {', '.join(listed)}"
    if case.stage is not None:
        # The tensor cores of a warp group still read one stage while the next ones are loaded.
        steps = config["num_stages"] - (0 if products else 1)
        wanted = steps * case.stage(config)
        if kernel.metadata.shared < wanted:
            yield f"no pipeline: {steps} steps take {wanted} bytes, got {kernel.metadata.shared}"
    if config is case.kernel.configs[0] and blocks < case.blocks:
        yield f"{blocks} blocks fit a multiprocessor, wanted {case.blocks}"


def count_blocks(chip: str, registers: int, shared: int, warps: int) -> int:
    """Blocks that fit a multiprocessor at a time; 0 on AMD."""
    if CHIPS[chip].target.backend != "cuda":
        return 0
    of_warp = -(-32 * registers // 256) * 256  # a warp gets registers in units of 256
    return min(65536 // of_warp // warps, CHIPS[chip].company // (shared + 1024), 64 // warps, 32)


def compile_all(chips: list[str]) -> Iterator[Compiled]:
    """Each case in each of its configurations, for each chip."""
    for case in cases():
        for config in case.kernel.configs[: case.configs]:
            for chip in [chip for chip in chips if chip in case.chips]:
                yield compile_case(case, config, chip)


def count_case(case: Case, config: Config) -> aot_counts.Counted:
    """What the main loop of a launch needs on sm_90."""
    kernel = compile_kernel(case, config, "sm_90")
    name, shared = kernel.metadata.name, kernel.metadata.shared
    registers = read_usage(kernel).registers
    blocks = count_blocks("sm_90", registers, shared, kernel.metadata.num_warps)
    loops = aot_counts.count_loops(kernel, SMALL[name], CACHED.get(name, frozenset()))
    return aot_counts.Counted(
        name, case.name, name_config(config), registers, shared, blocks, loops
    )


def choose_cases(kernels: list[str], texts: list[str]) -> list[Case]:
    """Cases for sm_90 of these kernels with one of these texts in their names; no list means all.

    Raises:
        ValueError: a kernel that does not exist, or a text in no case.
    """
    found = [case for case in cases() if "sm_90" in case.chips]
    there = sorted({case.kernel.function.__name__ for case in found})
    if missing := sorted({*kernels} - {*there}):
        raise ValueError(f"no kernel {', '.join(missing)}; there are {', '.join(there)}")
    found = [c for c in found if not kernels or c.kernel.function.__name__ in kernels]
    names = sorted({case.name for case in found})
    if missing := [text for text in texts if not any(text in name for name in names)]:
        raise ValueError(f"no case with {missing[0]!r}; there are {'; '.join(names)}")
    return [case for case in found if not texts or any(text in case.name for text in texts)]


def print_counts(chosen: list[Case], out: Path | None) -> None:
    rows = []
    for case in chosen:
        for config in case.kernel.configs[: case.configs]:
            for row in aot_counts.table_rows(count_case(case, config)):
                rows.append(row)
                print(aot_counts.describe(row), flush=True)
    if out:
        with out.open("w", newline="") as file:
            file.write(f"# triton: {triton.__version__}\n")
            writer = csv.DictWriter(file, aot_counts.COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m comemo_kernels.aot", description=__doc__)
    parser.add_argument("--chips", nargs="+", choices=CHIPS)
    parser.add_argument("--out", type=Path, help="CSV file to write the table to")
    parser.add_argument("--counts", action="store_true", help="count the main loops, for sm_90")
    parser.add_argument("--kernels", nargs="+", default=[], help="with --counts: these kernels")
    parser.add_argument(
        "--cases", nargs="+", default=[], help="with --counts: parts of their names"
    )
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("python -m comemo_kernels.aot: TRITON_INTERPRET=1 replaces the compiler: unset it")
    if not options.counts and (options.kernels or options.cases):
        parser.error("--kernels and --cases go with --counts")
    if options.counts and options.chips not in (None, ["sm_90"]):
        parser.error(f"--counts supports only sm_90, got --chips {' '.join(options.chips)}")
    print(f"triton {triton.__version__}")
    if options.counts:
        try:
            print_counts(choose_cases(options.kernels, options.cases), options.out)
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"python -m comemo_kernels.aot: {error}")
        return
    columns = [name for name in Compiled.__dataclass_fields__ if name != "faults"]
    form = "{:18} {:31} {:18} {:7} {:>9} {:>7} {:>6} {:>6} {:>4} {:>5}"
    print(form.format(*columns))
    rows, broken = [], 0
    for row in compile_all(options.chips or list(CHIPS)):
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
