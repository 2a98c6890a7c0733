"""Training: forward and backward of a mixin block, of its attention, and of the memory's build.

Cases are packed rows: 4k or 16k tokens; 1, 8 or 64 samples of uneven lengths; one picture, many or
none in a sample. A `dense` case is one sample with as many pairs of query and key; `of_dense` is
the rate of a packed row relative to it.

Passes: `attention` (forward and backward) and `attention backward` (that alone), gradients of q, k
and v; `block`, the whole layer with gradients of tokens, media and all weights; `build`, keys and
values of all layers.

Ways: `ours`, and of the block `ours projections`, whose feed-forward network computes its
projections again; `published`, variable-length flash attention (on a CPU sample by sample) between
operations of PyTorch that keep every intermediate; `compile`, the same under torch.compile. Of the
attention also `varlen`, on queries that are rotated already, and `sdpa flash`, `sdpa cudnn` where
there is one sample, and `flex`, FlexAttention with a block mask. All are compared with exact
gradients first.

Columns beside time and rates: `extra_mib`, the peak beside inputs and weights, gradients included;
`saved_mib`, what is kept between forward and backward; `predicted_mib` and `predicted_saved_mib`,
the same by formula (`bench/step_memory.py`).
"""

import argparse
import functools
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import comemo_kernels
from bench import measure, step_memory, tuning
from bench.cases import MIXINS
from bench.packs import PACKS, SMALL_PACKS, dense_of
from bench.readings import Reading
from bench.saved import allocated, saved_bytes
from bench.steps import backward_ways, both_ways
from bench.train_attention import AttentionStep
from bench.train_block import BlockStep, BuildStep
from bench.tuning import each_configuration, tell_configurations
from bench.ways import (
    Clock,
    Row,
    Ways,
    Work,
    add_way_arguments,
    compiles,
    each_case,
    keep_right,
)
from comemo_kernels._op import Kernel

PASSES = ("attention", "block", "build")
COMPILED = ("2B", "16k_8_many")  # with --few-compiled
SLACK = 2  # of an error's bound, for gradients
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=[*PACKS, *SMALL_PACKS])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    add_way_arguments(parser)


def run(options: argparse.Namespace) -> Iterator[Row]:
    clock = Clock.of(options, "train")
    few = measure.few(options)
    sizes = options.sizes or (["tiny"] if few else ["2B", "9B"])
    cases = itertools.product(sizes, options.cases or (SMALL_PACKS if few else PACKS))
    bench = TrainBench(clock, options.passes)
    if options.tune:
        return each_case(options, cases, lambda case: bench.tune(case[0], case[1]))
    return each_case(
        options,
        cases,
        lambda case: bench.time_case(case[0], case[1], compiles(options, case == COMPILED)),
    )


class TrainBench:
    """Times or tunes cases on one clock."""

    def __init__(self, clock: Clock, passes: Iterable[str] = PASSES) -> None:
        self.clock, self.passes = clock, passes

    def time_case(self, size: str, case: str, compiled: bool) -> Iterator[Row]:
        pack = {**PACKS, **SMALL_PACKS}[case]
        if "attention" in self.passes and pack.pairs:
            yield from self.time_attention(size, case, pack, compiled)
        if "block" in self.passes:
            yield from self.time_block(size, case, pack, compiled)
        if "build" in self.passes and pack.pairs:
            yield from self.time_build(size, case, pack, compiled)

    def time_attention(self, size: str, case: str, pack: Reading, compiled: bool) -> Iterator[Row]:
        """Rows of the dense case, then of the packed one, whose rate is relative to it."""
        rates: dict[tuple[str, str], float] = {}
        for name, reading in ((f"{case} dense", dense_of(pack)), (case, pack)):
            inputs = AttentionStep(size, name, reading, self.clock)
            steps, error = inputs.steps(compiled and reading is pack), inputs.error_of()
            both, backward = inputs.nominal()
            # A graph that was compiled is also differentiated twice.
            with torch._functorch.config.patch(donated_buffer=False):
                for kind, ways_of, work in (
                    ("attention", both_ways, both),
                    ("attention backward", backward_ways, backward),
                ):
                    labels: Row = {"case": f"{name} {size}", "pass": kind}
                    ways = self.right(labels, ways_of(steps), error)
                    for row in self.time(labels, ways, work):
                        if reading is pack and (kind, row["way"]) in rates:
                            row["of_dense"] = row["tflop_s"] / rates[kind, row["way"]]
                        rates.setdefault((kind, row["way"]), row["tflop_s"])
                        yield row

    def time_block(self, size: str, case: str, pack: Reading, compiled: bool) -> Iterator[Row]:
        inputs = BlockStep(size, pack, self.clock)
        steps, labels = inputs.steps(compiled), {"case": f"{case} {size}", "pass": "block"}
        ways = self.right(labels, both_ways(steps), inputs.error_of())
        cpu = self.clock.device == "cpu"
        sizes = step_memory.Sizes.of(pack, MIXINS[size], self.clock.dtype.itemsize, cpu)
        formulas = step_memory.ways(cpu)
        for row in self.time(labels, ways, inputs.work()):
            step, formula = steps[row["way"]], formulas.get(row["way"])
            row["saved_mib"] = saved_bytes(step.outputs, inputs.given) / MIB
            if formula is not None:
                row["predicted_mib"] = step_memory.peak_bytes(formula, sizes) / MIB
                row["predicted_saved_mib"] = step_memory.kept_bytes(formula, sizes) / MIB
            yield row

    def time_build(self, size: str, case: str, pack: Reading, compiled: bool) -> Iterator[Row]:
        inputs = BuildStep(size, pack, self.clock)
        steps, labels = inputs.steps(compiled), {"case": f"{case} {size}", "pass": "build"}
        ways = self.right(labels, both_ways(steps), inputs.error_of())
        yield from self.time(labels, ways, inputs.work())

    def right(self, labels: Row, ways: Ways, error: Callable[[str, Any], float]) -> Ways:
        return keep_right(labels["case"], ways, error, SLACK * self.clock.bound)

    def time(self, labels: Row, ways: Ways, work: Work) -> Iterator[Row]:
        for row in self.clock.time(labels, ways, 1, work):
            if self.clock.device == "cpu":
                way = functools.partial(ways[row["way"]], 0)
                row["extra_mib"] = allocated(way) / MIB
            yield row

    def tune(self, size: str, case: str) -> Iterator[Row]:
        """Every configuration of every kernel of the attention's backward."""
        labels: Row = {"case": f"{case} {size}", "pass": "tune"}
        inputs = AttentionStep(size, case, {**PACKS, **SMALL_PACKS}[case], self.clock)
        ours = backward_ways({"ours": inputs.steps(False)["ours"]})["ours"]
        call = functools.partial(ours, 0)
        kernels = {  # of this dtype and head size
            name: kernel
            for name, kernel in gradient_kernels().items()
            if len(kernel.configs) > 1 and tuning.watch(kernel, call)[1]
        }
        if not kernels:
            print(f"{labels['case']}: tune is not timed: there are no kernels of a backward")
            return
        calls, error = each_configuration(kernels, ours), inputs.error_of()

        def error_of_ours(_: str, found: Any) -> float:
            return error("ours", found)

        bound = SLACK * self.clock.bound
        right = keep_right(labels["case"], calls, error_of_ours, bound, must=False)
        rows = self.clock.time(labels, right, 1, inputs.nominal()[1])
        yield from tell_configurations(rows, kernels)


def gradient_kernels() -> dict[str, Kernel]:
    """Kernels of the attention's backward by name; none in a version without them."""
    names = [module.name for module in pkgutil.iter_modules(comemo_kernels.__path__)]
    modules = [
        importlib.import_module(f"comemo_kernels.{name}")
        for name in names
        if name.startswith("_attend_gradient")
    ]
    held = [item for module in modules for item in vars(module).items()]
    return {name: value for name, value in held if isinstance(value, Kernel)}
