"""What this machine reaches: bytes per second that it reads, FLOP per second of a large GEMM.

Measured in the run whose rows are compared with them. On a CPU no one function is the limit: a
matrix-vector product of MKL reads less than a sum does. So the limit is the best of several plain
ways. On a GPU it is one function, as before.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from bench import measure
from comemo_kernels._cpu_products import DEFAULTS, WAYS

GIB = 2**30
SIZE = 2048  # of the matrices on a CPU


def free_bytes() -> int:
    """Memory of the machine that is free, as far as the system tells; otherwise 4 GiB."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 * GIB


def best_seconds(ways: dict[str, Callable[[], Any]], budget: float = 0.5) -> dict[str, float]:
    """Least seconds of a call of each way: two calls, then more while `budget` seconds last."""
    found = {}
    for name, way in ways.items():
        start, best, calls = time.perf_counter(), float("inf"), 0
        while calls < 2 or time.perf_counter() - start < budget:
            before = time.perf_counter()
            way()
            best, calls = min(best, time.perf_counter() - before), calls + 1
        found[name] = best
    return found


def reading_rates(nbytes: int | None = None) -> dict[str, float]:
    """Bytes per second of plain ways to read a large buffer on a CPU.

    Args:
        nbytes: of the buffer; None for 768 MiB, or a quarter of the free memory if that is less.
    """
    nbytes = nbytes or min(768 * 2**20, free_bytes() // 4)
    buffer = torch.ones(nbytes // 4)
    narrow = buffer.view(torch.bfloat16)
    ways = {
        "sum": buffer.sum,
        "extremes": lambda: torch.aminmax(buffer),
        "dot": lambda: buffer.dot(buffer),
        "sum of bfloat16": narrow.sum,
    }
    return {name: buffer.nbytes / took for name, took in best_seconds(ways).items()}


def product_rates(dtype: torch.dtype, size: int = SIZE) -> dict[str, float]:
    """FLOP per second of the products of two random matrices [size, size] on a CPU."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    ways: dict[str, Callable[[], Any]] = {"matmul": lambda: a @ b}
    for name in DEFAULTS.get(dtype, ((),))[-1]:  # of many rows
        ways[name] = functools.partial(WAYS[name], a, b, None)
    with torch.no_grad():
        found = best_seconds(ways, 1.0)
    return {name: 2 * size**3 / took for name, took in found.items()}


def read_rate(device: torch.device | str) -> float:
    """Bytes per second that are read from memory: the best way; on a GPU a product."""
    if torch.device(device).type == "cpu":
        return max(reading_rates().values())
    matrix, vector = torch.ones(2**16, 4096, device=device), torch.ones(4096, device=device)
    return matrix.nbytes / min(measure.seconds(lambda: matrix @ vector) for _ in range(5))


def gemm_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP per second of a large GEMM of random matrices; with zeros it would be faster."""
    if torch.device(device).type == "cpu":
        return max(product_rates(dtype).values())
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    timing = measure.compare({"gemm": lambda _: a @ b}, 4, "cuda", rounds=9)
    return 2e6 * 8192**3 / timing["gemm"].us


def byte_rate(device: str) -> float:
    """Bytes per second of a roofline: on a GPU of a copy, read and written; on a CPU read."""
    return read_rate(device) if device == "cpu" else measure.copy_bandwidth(device)
