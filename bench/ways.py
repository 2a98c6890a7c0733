"""Ways to do one thing: which are right, how long they take, what of the limit they reach."""

import argparse
import functools
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import measure
from bench.cases import MIXINS
from comemo_kernels._op import Config, Kernel

Row = dict[str, Any]
Ways = dict[str, Callable[[int], Any]]  # name -> a call on an input set


@dataclass(frozen=True)
class Work:
    """What a way must do at least; `moved` bytes, read and written."""

    flops: float
    moved: float


@dataclass(frozen=True)
class Limits:
    """What the machine reaches: FLOP/s of a large product, bytes/s of a large copy."""

    flop_s: float
    byte_s: float

    @classmethod
    def of(cls, device: str, dtype: torch.dtype) -> "Limits":
        limits = cls(measure.gemm_rate(device, dtype), measure.copy_bandwidth(device))
        print(
            f"a large product reaches {limits.flop_s / 1e12:.3g} TFLOP/s, a copy"
            f" {limits.byte_s / 1e9:.0f} GB/s"
        )
        return limits

    def us(self, work: Work) -> float:
        """Microseconds that the work takes at the least."""
        return 1e6 * max(work.flops / self.flop_s, work.moved / self.byte_s)


@dataclass(frozen=True)
class Clock:
    """Times the ways of a case, and tells what they reach."""

    device: str
    dtype: torch.dtype
    limits: Limits
    rounds: int

    @classmethod
    def of(cls, options: argparse.Namespace, name: str) -> "Clock":
        """By `add_way_arguments`; on a GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if options.tune and device == "cpu":
            raise SystemExit(f"python -m bench {name} --tune: needs a GPU, found none")
        dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
        exact = getattr(torch, dtype)
        return cls(device, exact, Limits.of(device, exact), options.rounds)

    @property
    def bound(self) -> float:
        """Of a right way's relative error: a few roundings."""
        return 1e-4 if self.dtype == torch.float32 else 2e-2

    def sets(self, work: Work) -> int:
        """Input sets that let every call find the caches cold, where that matters."""
        if work.flops / self.limits.flop_s > 4 * work.moved / self.limits.byte_s:
            return 1
        return max(2, min(32, -(-measure.cache_bytes(self.device) // int(work.moved))))

    def time(
        self, labels: Row, ways: Ways, sets: int, work: Work, works: dict[str, Work] | None = None
    ) -> Iterator[Row]:
        """A row for each way, of `work` unless `works` tells its own."""
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
        """A row for each way that a CUDA graph can hold, by the time of a call within it."""
        for name, way in ways.items():
            turns = itertools.count()
            try:
                us = measure.graph_us(functools.partial(_call_in_turn, way, turns, sets), 32)
            except Exception as fault:
                if is_ours(name):
                    raise
                print(f"{labels['case']}: {name} fits no graph: {_first_line(fault)}")
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
    """What every benchmark of ways is asked."""
    parser.add_argument("--sizes", nargs="+", choices=MIXINS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7)
    add_compile_arguments(parser)
    parser.add_argument("--tune", action="store_true", help="time every shipped configuration")


def add_compile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--few-compiled", action="store_true", help="only in a case of each kind")


def compiles(options: argparse.Namespace, one_of_few: bool) -> bool:
    """Whether a case is timed under torch.compile, too."""
    return not options.no_compile and (one_of_few or not options.few_compiled)


def _call_in_turn(way: Callable[[int], Any], turns: Iterator[int], sets: int) -> Any:
    return way(next(turns) % sets)


def is_ours(name: str) -> bool:
    return name.split()[0] == "ours"


def keep_right(
    case: str, ways: Ways, error_of: Callable[[str, Any], float], bound: float, must: bool = True
) -> Ways:
    """The ways that err by at most `bound`; a wrong one is not timed.

    Raises:
        RuntimeError: a wrong way of ours, if it `must` be right: then nothing is timed.
    """
    right = {}
    for name, way in ways.items():
        try:
            error = error_of(name, way(0))
        except Exception as fault:
            if must and is_ours(name):
                raise
            print(f"{case}: {name} is not timed: {_first_line(fault)}")
            continue
        if error <= bound:  # which NaN is not
            right[name] = way
            continue
        said = f"{case}: {name} is not timed: it errs by {error:.1e}"
        if must and is_ours(name):
            raise RuntimeError(said)
        print(said)
    return right


def _first_line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Of the whole tensor, in its norm."""
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def each_configuration(kernels: dict[str, Kernel], way: Callable[[int], Any]) -> Ways:
    """A way for every configuration that kernels ship, the others at their first.

    One in which its kernel is not launched raises RuntimeError at its first call.
    """

    def call(i: int, kernel: Kernel, config: Config, seen: list[bool]) -> Any:
        with kernel.using(config):
            if seen:
                return way(i)
            found, launched = watch(kernel, functools.partial(way, i))
            if not launched:
                raise RuntimeError(f"{kernel.function.fn.__name__} was not launched")
            seen.append(True)
            return found

    return {
        f"{name} {config}": functools.partial(call, kernel=kernel, config=config, seen=[])
        for name, kernel in kernels.items()
        for config in kernel.configs
    }


def watch(kernel: Kernel, call: Callable[[], Any]) -> tuple[Any, bool]:
    """What a call returns, and whether it launched a kernel."""
    launches = []

    def launch(*args: Any, launch: Callable[..., None] = kernel.launch) -> None:
        launches.append(args)
        launch(*args)

    with mock.patch.object(kernel, "launch", launch):
        return call(), bool(launches)


def tell_configurations(rows: Iterable[Row], kernels: dict[str, Kernel]) -> Iterator[Row]:
    """Rows of `each_configuration` with kernel, configuration, and whether it is the first."""
    for row in rows:
        name, _, config = row["way"].partition(" {")
        known = {str(c).removeprefix("{"): c for c in kernels[name].configs}
        first = known[config] is kernels[name].configs[0]
        yield row | {"kernel": name, "config": in_words(known[config]), "first": first}


def in_words(config: Config) -> str:
    return " ".join(
        f"{k.removeprefix('BLOCK_').removeprefix('num_')} {v}" for k, v in config.items()
    )


def each_case(
    options: argparse.Namespace, cases: Iterable[Any], rows_of: Callable[[Any], Iterator[Row]]
) -> Iterator[Row]:
    """Rows of all cases; one that fails is told and makes the exit code 1, the next is timed."""
    for case in cases:
        try:
            yield from rows_of(case)
        except Exception:
            traceback.print_exc()
            options.failed = True
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
