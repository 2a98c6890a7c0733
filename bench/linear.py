"""Products of a linear layer on a CPU, by each way that `linear` can choose, and compiled.

Weights of the 2B model, as many as memory holds far more of than caches, one after the other. Ways:
`ours`, the choice of `linear`; `torch`, `F.linear`; the other ways of `comemo_kernels`; `ours,
compiled` and `torch, compiled` under torch.compile. `limit_us` is the longer of reading the weight
and of the arithmetic, at rates measured in the same run.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import comemo_kernels as ops
from bench import limits, measure, progress
from comemo_kernels import _cpu_products as products

SHAPES = ((8192, 2048), (2048, 8192), (2048, 2048))  # [O, d]: feed-forward network, attention
ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
FEW_ROWS = (1, 4, 16, 64, 1024)
DTYPES = ("float32", "bfloat16", "float16")
BYTES = 256 * 2**20  # of the weights of one shape
SECONDS = 0.4  # for each way


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    measure.add_all(parser)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if torch.cuda.is_available():
        raise ValueError("linear: wanted a machine without a GPU, where `linear` is F.linear")
    few = measure.few(options)
    dtypes = options.dtypes or (DTYPES[:2] if few else DTYPES)
    cases = [
        (getattr(torch, name), shape, rows)
        for name in dtypes
        for shape in (SHAPES[:1] if few else SHAPES)
        for rows in options.rows or (FEW_ROWS if few else ROWS)
    ]
    read = limits.read_rate("cpu")
    gemm = {dtype: limits.gemm_rate("cpu", dtype) for dtype in {case[0] for case in cases}}
    for dtype, shape, rows in progress.each(cases, _name):
        yield from _time(dtype, shape, rows, read, gemm[dtype], not options.no_compile)


def _name(case: tuple[torch.dtype, tuple[int, int], int]) -> str:
    dtype, (outputs, width), rows = case
    return f"{outputs}x{width}, {str(dtype).removeprefix('torch.')}, {rows} rows"


@torch.no_grad()
def _time(
    dtype: torch.dtype,
    shape: tuple[int, int],
    rows: int,
    read: float,
    gemm: float,
    compiled: bool,
) -> Iterator[dict[str, Any]]:
    count = max(BYTES // (shape[0] * shape[1] * dtype.itemsize), 1) if rows < 256 else 1
    weights = [(torch.randn(shape) / shape[1] ** 0.5).to(dtype) for _ in range(count)]
    x = torch.randn(rows, shape[1]).to(dtype)
    chosen = products.way_of(dtype, rows)
    exact = x.double() @ weights[0].double().t()
    most = max(weights[0].nbytes / read, 2 * rows * weights[0].numel() / gemm)
    for name, way in _ways(dtype, rows, compiled).items():
        error = (way(x, weights[0]).double() - exact).norm() / exact.norm()

        def all_weights(way: Callable[[Tensor, Tensor], Tensor] = way) -> None:
            for weight in weights:
                way(x, weight)

        seconds = limits.best_seconds({name: all_weights}, SECONDS)[name] / count
        yield {
            "case": f"{shape[0]}x{shape[1]}, {str(dtype).removeprefix('torch.')}",
            "rows": rows,
            "way": f"{name} ({chosen})" if name == "ours" else name,
            "us": seconds * 1e6,
            "gb_per_s": weights[0].nbytes / seconds / 1e9,
            "gflop_per_s": 2 * rows * weights[0].numel() / seconds / 1e9,
            "limit_us": most * 1e6,
            "of_limit": most / seconds,
            "relative_error": error.item(),
        }


def _ways(
    dtype: torch.dtype, rows: int, compiled: bool
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """`linear`, and what it chooses from; the first call of each loads or compiles it."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": ops.linear}
    names = products.DEFAULTS[dtype][products.bisect_left(products.ROWS, rows)]
    for name in dict.fromkeys((*names, "torch")):
        found[name] = functools.partial(_without_bias, products.WAYS[name])
    if compiled:
        torch._dynamo.reset()
        found["ours, compiled"] = torch.compile(lambda x, weight: ops.linear(x, weight))
        found["torch, compiled"] = torch.compile(lambda x, weight: F.linear(x, weight))
    return found


def _without_bias(way: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
    return way(x, weight, None)
