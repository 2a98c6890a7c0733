"""Ways: implementations of one computation. Check them, time them, compare with the roofline."""

import argparse
import functools
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import limits, measure, progress
from bench.cases import MIXINS
from comemo_kernels._op import has_float8

Row = dict[str, Any]
Ways = dict[str, Callable[[int], Any]]  # name -> a call on input set i


@dataclass(frozen=True)
class Work:
    """The least that a way has to do: FLOPs, and bytes `moved` (read and written)."""

    flops: float
    moved: float


@dataclass(frozen=True)
class Limits:
    """The roofline, as measured: FLOP/s of a large GEMM, bytes/s of a large copy, or on a CPU
    bytes/s that are read (`bench.limits`)."""

    flop_s: float
    byte_s: float

    @classmethod
    def of(cls, device: str, dtype: torch.dtype) -> "Limits":
        found = cls(limits.gemm_rate(device, dtype), limits.byte_rate(device))
        print(
            f"a large GEMM reaches {found.flop_s / 1e12:.3g} TFLOP/s,"
            f" {'reading' if device == 'cpu' else 'a copy'} {found.byte_s / 1e9:.0f} GB/s"
        )
        return found

    def us(self, work: Work) -> float:
        """Microseconds of the work at the roofline."""
        return 1e6 * max(work.flops / self.flop_s, work.moved / self.byte_s)


@dataclass(frozen=True)
class Clock:
    """Times the ways of a case and relates them to the roofline."""

    device: str
    dtype: torch.dtype
    limits: Limits
    rounds: int

    @classmethod
    def of(cls, options: argparse.Namespace, name: str) -> "Clock":
        """From options of `add_way_arguments`; on a GPU if there is one."""
        device = measure.default_device()
        if options.tune and device == "cpu":
            raise SystemExit(f"python -m bench {name} --tune: needs a GPU, found none")
        dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
        exact = getattr(torch, dtype)
        return cls(device, exact, Limits.of(device, exact), options.rounds)

    @property
    def bound(self) -> float:
        """The largest relative error of a correct way: a few roundings."""
        return 1e-4 if self.dtype == torch.float32 else 2e-2

    @property
    def float8(self) -> bool:
        """Whether a memory can be stored as float8."""
        return self.device == "cpu" or has_float8(0)

    def draw(self, *shape: int) -> Tensor:
        """Normally distributed, of the clock's device and dtype."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def sets(self, work: Work) -> int:
        """Input sets so that every call finds cold caches; 1 where compute clearly dominates."""
        if work.flops / self.limits.flop_s > 4 * work.moved / self.limits.byte_s:
            return 1
        return measure.cold_sets(self.device, int(work.moved), 32)

    def time(
        self, labels: Row, ways: Ways, sets: int, work: Work, works: dict[str, Work] | None = None
    ) -> Iterator[Row]:
        """A row for each way; its work is `works[name]` if given, else `work`."""
        for name, timing in measure.compare(ways, sets, self.device, self.rounds).items():
            row = labels | {"way": name, "us": timing.us}
            row |= {"low_us": timing.low_us, "high_us": timing.high_us}
            row |= self.reached(timing.us, (works or {}).get(name, work))
            if self.device == "cuda":
                row["extra_mib"] = measure.extra_mib(functools.partial(ways[name], 0))
            yield row

    def time_graphs(
        self, labels: Row, ways: Ways, sets: int, work: Work, works: dict[str, Work] | None = None
    ) -> Iterator[Row]:
        """A row for each way that can be captured: the time of a call in a CUDA graph."""
        for name, way in ways.items():
            turns = itertools.count()
            try:
                us = measure.graph_us(functools.partial(_call_in_turn, way, turns, sets), 32)
            except Exception as fault:
                if is_ours(name):
                    raise
                print(f"{labels['case']}: {name} cannot be captured: {_first_line(fault)}")
                continue
            reached = self.reached(us, (works or {}).get(name, work))
            yield labels | {"pass": f"{labels['pass']} graph", "way": name, "us": us} | reached

    def reached(self, us: float, work: Work) -> Row:
        return {
            "tflop_s": work.flops / us / 1e6,
            "gb_s": work.moved / us / 1e3,
            "of_limit": self.limits.us(work) / us,
        }


def add_way_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every benchmark of ways."""
    parser.add_argument("--sizes", nargs="+", choices=MIXINS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7)
    add_compile_arguments(parser)
    parser.add_argument("--tune", action="store_true", help="time every shipped configuration")
    measure.add_all(parser)


def add_compile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--few-compiled", action="store_true", help="in one case of each kind")


def compiles(options: argparse.Namespace, one_of_few: bool, few: bool = False) -> bool:
    """Whether torch.compile is timed in a case; `one_of_few` of --few-compiled, or of `few`."""
    return not options.no_compile and (one_of_few or not (few or options.few_compiled))


def _call_in_turn(way: Callable[[int], Any], turns: Iterator[int], sets: int) -> Any:
    return way(next(turns) % sets)


def is_ours(name: str) -> bool:
    """Whether a way is this library's."""
    return name.split()[0] == "ours"


def keep_right(
    case: str, ways: Ways, error_of: Callable[[str, Any], float], bound: float, must: bool = True
) -> Ways:
    """The ways whose error is at most `bound`; a wrong one is not timed.

    Args:
        case: its name, for messages.
        ways: called once each, on input set 0.
        error_of: (name, result) -> relative error.
        bound: largest error.
        must: whether ways of this library have to be correct.

    Raises:
        RuntimeError: a way of this library is wrong and `must` is set: then nothing is timed.
    """
    correct = {}
    for name, way in ways.items():
        try:
            error = error_of(name, way(0))
        except Exception as fault:
            if must and is_ours(name):
                raise
            print(f"{case}: {name} is not timed: {_first_line(fault)}")
            continue
        if error <= bound:  # False for NaN
            correct[name] = way
            continue
        message = f"{case}: {name} is not timed: relative error {error:.1e}"
        if must and is_ours(name):
            raise RuntimeError(message)
        print(message)
    return correct


def _first_line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, norms of the whole tensors in float64."""
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def each_case(
    options: argparse.Namespace, cases: Iterable[Any], rows_of: Callable[[Any], Iterator[Row]]
) -> Iterator[Row]:
    """Rows of all cases. A case that fails is printed and sets exit code 1; the next one runs."""
    for case in progress.each(cases, lambda case: " ".join(map(str, case))):
        try:
            yield from rows_of(case)
        except Exception:
            traceback.print_exc()
            options.failed = True
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
