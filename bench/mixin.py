"""A whole mixin layer, and its fused norms, projections and residuals, compared with a large copy.

Ways of a layer: `ours`, with a built memory; `published`, which builds keys and values of all image
tokens in every call; `cached`, the same without the build; `compile`, `cached` under torch.compile.
Passes `norm_linear`, `norm_swiglu` and `gated_residual` time these operations alone: `ours` and the
`eager` composition, relative to the bytes of their weights. A decode step is also timed in a CUDA
graph.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import comemo_kernels as ops
from bench import measure, published
from bench.cases import HEAD_DIM, MIXINS
from bench.harness import assert_matches
from bench.models import made_on
from bench.published import Block
from bench.readings import IMAGE, Reading
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
    relative_error,
)
from comemo.config import MixinConfig
from comemo.mixin import EPS, MixinLayer
from comemo_kernels import ImageMemory, reference
from comemo_kernels._op import Kernel

CASES = {
    "decode_1": (1, 1),  # B, N
    "decode_8": (8, 1),
    "decode_32": (32, 1),
    "prefill_2k": (1, 2048),
}
COMPILED = (("2B", "decode_1"), ("2B", "prefill_2k"))  # with --few-compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=CASES)
    add_way_arguments(parser)


def run(options: argparse.Namespace) -> Iterator[Row]:
    clock = Clock.of(options, "mixin")
    few = measure.few(options)
    sizes = options.sizes or (["tiny"] if few else ["2B", "9B"])
    names = options.cases or (["decode_1", "decode_8"] if few else list(CASES))
    cases = itertools.product(sizes, names)
    if options.tune:
        decoding = [case for case in cases if CASES[case[1]][0] in (1, 8)]
        return each_case(options, decoding, lambda case: tune(*case, clock))
    return each_case(
        options, cases, lambda case: time_case(*case, clock, compiles(options, case in COMPILED))
    )


class Inputs(NamedTuple):
    """One set of inputs; sets are equal but have their own memory."""

    layer: MixinLayer
    block: Block
    key: Tensor  # [M, H, D] rotated by the place in the image
    value: Tensor
    absolute: Tensor  # keys [B, M/B, H, D] rotated by the ids of the prompts
    rows: Tensor  # values [B, M/B, H, D]


def config_of(size: str) -> MixinConfig:
    """The mixin layers of a size of `MIXINS`."""
    d, heads, _, wide = MIXINS[size]
    return MixinConfig(
        language_dim=d,
        vision_dim=d,
        head_dim=HEAD_DIM,
        num_heads=heads,
        intermediate_size=wide,
    )


def draw_layer(config: MixinConfig, clock: Clock) -> MixinLayer:
    """With random weights and open gates, without gradients."""
    with made_on(clock.device, clock.dtype):
        layer = MixinLayer(config, 0)
    for weight in layer.parameters():
        if weight.ndim == 2:
            weight.normal_(std=weight.shape[1] ** -0.5)
    # The attention averages random values, so its output is small: make it count in the error.
    layer.o_proj.weight.mul_(32)
    for gate in (layer.attn_gate, layer.mlp_gate):
        gate.fill_(0.5)
    return layer.requires_grad_(False)


class Mixing:
    """A layer with random weights, a memory of one image per prompt, and tokens."""

    def __init__(self, size: str, case: str, clock: Clock) -> None:
        d, heads, _, _ = MIXINS[size]
        (B, N), device = CASES[case], clock.device
        self.reading = Reading(((N, (IMAGE,)),) * B)
        self.clock, self.dtype = clock, clock.dtype
        torch.manual_seed(0)
        config = config_of(size)
        layer = draw_layer(config, clock)
        self.positions = self.reading.positions(device)
        ids, _, biases = self.reading.places(device)
        sizes = self.reading.sizes
        shift = biases[0].repeat_interleave(torch.tensor(sizes, device=device))
        self.prompt_ids = (ids + shift).long().view(B, -1)  # [B, M/B]
        self.x, media = clock.draw(B, N, d) / 4, clock.draw(len(ids), d)
        table = ops.distance_table(HEAD_DIM, 1e6, 4096, torch.device(device))
        self.wide = published.widen(table, self.dtype)
        self.memory = ImageMemory.from_media(
            media, self.prompt_ids.flatten(), self.reading.lengths, sizes, table
        )
        self.rotation = self.memory.rotation(self.positions)
        self.media = media.view(B, -1, d)
        block = Block.of(layer)
        shape = (2, len(ids), heads, HEAD_DIM)
        key, value = torch.empty(shape, device=device, dtype=self.dtype).unbind(0)
        reference.build_memory(
            media, [block.kv], [block.attn_norm], *table, ids, [key], [value], eps=EPS
        )
        absolute, rows = self.build(block)
        self.work = self._work(block, key)
        first = Inputs(layer, block, key, value, absolute, rows.contiguous())
        self.sets = [first]
        for _ in range(clock.sets(self.work) - 1):
            other = draw_layer(config, clock)
            other.load_state_dict(layer.state_dict())
            tensors = (t.clone() for t in first[2:])
            self.sets.append(Inputs(other, Block.of(other), *tensors))

    def build(self, block: Block) -> tuple[Tensor, Tensor]:
        """Keys and values of media [B, M/B, d], as published."""
        return published.build(self.media, block.attn_norm, block.kv, *self.wide, self.prompt_ids)

    def _work(self, block: Block, key: Tensor) -> Work:
        rows = self.x.shape[0] * self.x.shape[1]
        weights = block.read_bytes // self.dtype.itemsize
        attention = 4 * self.reading.pairs * key.shape[1] * HEAD_DIM
        moved = block.read_bytes + 2 * key.nbytes + 2 * self.x.nbytes
        return Work(2 * rows * weights + attention, moved)

    def ways(self, compiled: bool) -> Ways:
        memories = [replace(self.memory, keys={0: s.key}, values={0: s.value}) for s in self.sets]

        def ours(i: int) -> Tensor:
            return self.sets[i].layer(self.x, None, memories[i], self.rotation)

        def as_published(i: int) -> Tensor:
            block = self.sets[i].block
            k, v = self.build(block)
            return published.mix(self.x, k, v, block, *self.wide, self.positions)

        def cached(i: int, mix: Callable[..., Tensor] = published.mix) -> Tensor:
            s = self.sets[i]
            return mix(self.x, s.absolute, s.rows, s.block, *self.wide, self.positions)

        ways: Ways = {"ours": ours, "published": as_published, "cached": cached}
        if compiled:
            mix = torch.compile(published.mix, dynamic=False)
            ways["compile"] = lambda i: cached(i, mix)
        return ways

    def error_of(self) -> Callable[[str, Any], float]:
        """Relative error of the first and last tokens of the first and the last prompt."""
        B, N, _ = self.x.shape
        prompts = sorted({0, B - 1})
        tokens = sorted({*range(min(16, N)), *range(max(0, N - 16), N)})
        block = self.sets[0].block.double()
        wide = published.widen(self.rotation[:2], torch.float64)

        def some(x: Tensor) -> Tensor:
            return x[prompts][:, tokens]

        media, ids = self.media[prompts].double(), self.prompt_ids[prompts]
        k, v = published.build(media, block.attn_norm, block.kv, *wide, ids)
        x = some(self.x).double()
        wanted = published.mix(x, k, v, block, *wide, some(self.positions))
        # Without the residual, which would hide errors of what the layer adds.
        return lambda _, found: relative_error(some(found).double() - x, wanted - x)


class Part(NamedTuple):
    """One operation of the layer, with several sets of weights."""

    op: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    inputs: list[dict[str, Tensor]]
    moved: int  # bytes of the weights

    def work(self) -> Work:
        first = self.inputs[0]
        rows = first["x"].shape[:-1].numel()
        return Work(2.0 * rows * self.moved / first["x"].itemsize, self.moved)

    def ways(self) -> Ways:
        return {
            "ours": lambda i: self.op(**self.inputs[i]),
            "eager": lambda i: self.eager(**self.inputs[i]),
        }


def parts_of(mixing: Mixing) -> dict[str, Part]:
    """Each operation with the layer's weights and inputs of the layer's shapes."""
    x, blocks, draw = mixing.x, [s.block for s in mixing.sets], mixing.clock.draw
    read = draw(*x.shape[:-1], blocks[0].o.shape[1])
    inner = draw(*x.shape[:-1], blocks[0].down.shape[1])
    inputs: dict[str, list[dict[str, Tensor]]] = {
        "norm_linear": [{"x": x, "norm_weight": b.attn_norm, "weight": b.q} for b in blocks],
        "norm_swiglu": [
            {"x": x, "norm_weight": b.mlp_norm, "gate_weight": b.gate, "up_weight": b.up}
            for b in blocks
        ],
        "gated_residual o": [
            {"x": x, "a": read, "weight": b.o, "gate": b.attn_gate} for b in blocks
        ],
        "gated_residual down": [
            {"x": x, "a": inner, "weight": b.down, "gate": b.mlp_gate} for b in blocks
        ],
    }
    found = {}
    for name, given in inputs.items():
        verb = name.split()[0]
        moved = sum(t.nbytes for n, t in given[0].items() if n.endswith("weight") and t.ndim == 2)
        found[name] = Part(getattr(ops, verb), getattr(reference, verb), given, moved)
    return found


@torch.no_grad()
def time_case(size: str, case: str, clock: Clock, compiled: bool) -> Iterator[Row]:
    mixing = Mixing(size, case, clock)
    name, sets, bound = f"{case} {size}", len(mixing.sets), clock.bound
    decoding = clock.device == "cuda" and mixing.reading.decoding
    ways = keep_right(name, mixing.ways(compiled), mixing.error_of(), bound)
    labels: Row = {"case": name, "pass": "layer"}
    yield from clock.time(labels, ways, sets, mixing.work)
    if decoding:
        graphs = {n: way for n, way in ways.items() if n != "published"}
        yield from clock.time_graphs(labels, graphs, sets, mixing.work)
    if not mixing.reading.decoding:
        return
    for verb, part in parts_of(mixing).items():
        assert_matches(part.op, part.eager, dict(part.inputs[0]))
        labels, work = {"case": name, "pass": verb}, part.work()
        timed = clock.time(labels, part.ways(), sets, work)
        graphed = clock.time_graphs(labels, part.ways(), sets, work) if decoding else ()
        for row in itertools.chain(timed, graphed):
            if clock.device == "cuda":
                row["of_copy"] = row["gb_s"] * 1e9 / clock.limits.byte_s
            yield row


@torch.no_grad()
def tune(size: str, case: str, clock: Clock) -> Iterator[Row]:
    """Every configuration of every kernel of the parts; the fastest has to become the first."""
    from comemo_kernels import _rows_kernel

    mixing = Mixing(size, case, clock)
    kernels = {n: kernel for n, kernel in vars(_rows_kernel).items() if isinstance(kernel, Kernel)}
    for verb, part in parts_of(mixing).items():
        swiglu = verb == "norm_swiglu"
        own = {n: k for n, k in kernels.items() if ("two" in n) == swiglu}
        wanted = part.eager(**{n: t.double() for n, t in part.inputs[0].items()})
        ways = each_configuration(own, part.ways()["ours"])
        labels: Row = {"case": f"{case} {size} {verb}", "pass": "tune"}

        def error_of(_: str, found: Tensor, wanted: Tensor = wanted) -> float:
            return relative_error(found, wanted)

        right = keep_right(labels["case"], ways, error_of, clock.bound, must=False)
        rows = clock.time(labels, right, len(mixing.sets), part.work())
        yield from tell_configurations(rows, own)
