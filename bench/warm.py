"""Compile all shipped kernels in parallel into Triton's cache: `python -m bench.warm`.

A benchmark would compile them one after the other. Ahead-of-time compilation for the same GPU
writes the cache entries that launches look up: code, dtypes, constexpr values, alignment.
"""

import argparse
import functools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.warm", description=__doc__)
    parser.add_argument("--chip", help="such as sm_90, default: the GPU's")
    options = parser.parse_args()
    chip = options.chip or "sm_{}{}".format(*torch.cuda.get_device_capability())
    began, work = time.perf_counter(), variants(chip)
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        seconds = list(pool.map(functools.partial(compile_variant, chip), work))
    print(
        f"{len(work)} variants for {chip} by {workers} processes in"
        f" {time.perf_counter() - began:.0f} s, {sum(seconds):.0f} s of compilation in all"
    )


@functools.cache
def _cases() -> list[Any]:
    from comemo_kernels import aot_cases

    return aot_cases.cases()


def variants(chip: str) -> list[tuple[int, int]]:
    """Indices of case and configuration of all kernels for a chip, the slowest to compile first."""
    found = [
        (i, j)
        for i, case in enumerate(_cases())
        for j in range(len(case.kernel.configs[: case.configs]))
        if chip in case.chips
    ]
    return sorted(found, key=lambda place: not _cases()[place[0]].dot)


def compile_variant(chip: str, place: tuple[int, int]) -> float:
    """Compile one; the seconds that it took."""
    from comemo_kernels import aot

    case, began = _cases()[place[0]], time.perf_counter()
    with (
        case.kernel.using(case.kernel.configs[place[1]]),
        aot.offline(aot.CHIPS[chip].target),
    ):
        case.launch()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
