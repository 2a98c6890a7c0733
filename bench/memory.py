"""Building the image memory: keys and values of all mixin layers, compared with a large GEMM.

Ways: `published`, per layer RMSNorm in float32, a GEMM and rotation of halves; `compile`, the same
under torch.compile; `library`, per layer PyTorch's RMSNorm and GEMM, this library's rotation, and
copies into the memory; `ours exact`, rounded like the model; `ours folded`, with the norm's weight
folded into the projection; `ours fp8`, exact and stored as float8.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import comemo_kernels as ops
from bench import measure, published
from bench.cases import HEAD_DIM, MIXINS, TOKENS_PER_TILE
from bench.harness import assert_matches
from bench.readings import IMAGE
from bench.tuning import each_configuration, tell_configurations, with_descriptors
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
from comemo.mixin import EPS
from comemo_kernels import ImageMemory, MemoryScales, reference
from comemo_kernels._op import Kernel

IMAGES = (1, 4, 12)  # 13, 52 and 156 tiles
COMPILED = ("2B", 13)  # the one case that is compiled with --few-compiled
FLOAT8_BOUND = 6e-2  # relative error: three bits of mantissa


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_way_arguments(parser)
    parser.add_argument("--tiles", nargs="+", type=int, help="tiles of the media")
    parser.add_argument("--layers", type=int, help="mixin layers, if not the size's own")


def run(options: argparse.Namespace) -> Iterator[Row]:
    clock = Clock.of(options, "memory")
    few = measure.few(options)
    sizes = options.sizes or (["2B"] if few else ["2B", "9B"])
    tiles = options.tiles or ([13] if few else [13 * n for n in IMAGES])
    layers = options.layers or (1 if few else None)
    bench = MemoryBench(clock, layers)
    cases = [(size, count) for size in sizes for count in tiles]
    if options.tune:
        return each_case(options, cases, bench.tune)
    return each_case(
        options, cases, lambda case: bench.time_case(case, compiles(options, case == COMPILED))
    )


class Build:
    """Media and weights of a case, and memories to build."""

    def __init__(self, size: str, tiles: int, layers: int, clock: Clock) -> None:
        d, heads, _, _ = MIXINS[size]
        self.clock, self.device, self.dtype = clock, clock.device, clock.dtype
        torch.manual_seed(0)
        M = tiles * TOKENS_PER_TILE
        self.media = clock.draw(M, d)
        self.weights = [clock.draw(2 * heads * HEAD_DIM, d) / d**0.5 for _ in range(layers)]
        self.norms = [1 + 0.1 * clock.draw(d) for _ in range(layers)]
        self.folded = [w * n for w, n in zip(self.weights, self.norms, strict=True)]
        ids = ops.image_position_ids(IMAGE).to(self.device)  # of 13 tiles
        self.ids = ids.repeat(-(-tiles // 13))[:M].int()
        self.table = ops.distance_table(HEAD_DIM, 1e6, 4096, torch.device(self.device))
        self.wide = published.widen(self.table, self.dtype)
        self.memories = {
            dtype: ImageMemory.allocate(M, range(layers), heads, HEAD_DIM, self.table, dtype)
            for dtype in (self.dtype, torch.float8_e4m3fn)
        }

    def work(self) -> Work:
        M, d = self.media.shape
        rows = sum(w.shape[0] for w in self.weights)
        moved = self.media.nbytes + sum(w.nbytes for w in self.weights)
        return Work(2 * M * d * rows, moved + M * rows * self.media.itemsize)

    def ours(self, weights: list[Tensor], norms: list[Tensor] | None, dtype: torch.dtype) -> Any:
        held = self.memories[dtype]
        keys, values = list(held.keys.values()), list(held.values.values())
        scales = list(held.scales.values()) or None
        ops.build_memory(
            self.media, weights, norms, *self.table, self.ids, keys, values, scales, eps=EPS
        )
        if scales is None:
            return keys, values
        return (
            [_Scaled(k, s.keys, s) for k, s in zip(keys, scales, strict=True)],
            [_Scaled(v, s.values, s) for v, s in zip(values, scales, strict=True)],
        )

    def as_published(self, build: Callable[..., Any]) -> Any:
        pairs = [
            build(self.media, norm, weight, *self.wide, self.ids)
            for norm, weight in zip(self.norms, self.weights, strict=True)
        ]
        return tuple(zip(*pairs, strict=True))

    def library(self) -> Any:
        held = self.memories[self.dtype]
        for layer, (norm, weight) in enumerate(zip(self.norms, self.weights, strict=True)):
            x = F.rms_norm(self.media, norm.shape, norm, EPS)
            k, v = F.linear(x, weight).unflatten(-1, (2, -1, HEAD_DIM)).unbind(1)
            k = ops.apply_rotary(k[None], None, *self.table, self.ids[None])[0][0]
            held.keys[layer].copy_(k)
            held.values[layer].copy_(v)
        return list(held.keys.values()), list(held.values.values())

    def ways(self, compiled: bool) -> Ways:
        ways: Ways = {"published": lambda _: self.as_published(published.build)}
        if compiled:
            build = torch.compile(published.build, dynamic=False)
            ways["compile"] = lambda _: self.as_published(build)
        ways["library"] = lambda _: self.library()
        ways["ours exact"] = lambda _: self.ours(self.weights, self.norms, self.dtype)
        ways["ours folded"] = lambda _: self.ours(self.folded, None, self.dtype)
        if self.clock.float8:
            ways["ours fp8"] = lambda _: self.ours(self.weights, self.norms, torch.float8_e4m3fn)
        return ways

    def error_of(self) -> Callable[[str, Any], float]:
        """Relative error of the first and last rows of the first and the last layer."""
        M = len(self.media)
        rows = torch.tensor([*range(32), *range(M - 32, M)], device=self.device)
        layers = sorted({0, len(self.weights) - 1})
        wanted = [
            _build(
                reference.build_memory,
                self.media[rows].double(),
                self.weights[i].double()[None],
                self.norms[i].double()[None],
                *self.table,
                self.ids[rows],
            )
            for i in layers
        ]

        def error(_: str, found: Any) -> float:
            return max(
                relative_error(found[part][i][rows], wanted[n][part][0])
                for n, i in enumerate(layers)
                for part in (0, 1)
            )

        return error


class _Scaled:
    """Keys or values stored as float8; indexing converts rows to float32."""

    def __init__(self, held: Tensor, factors: Tensor, scales: MemoryScales) -> None:
        self.held, self.factors, self.tile = held, factors, scales.tile

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.held[rows].float() * self.factors[rows // self.tile][..., None]


def _build(
    verb: Callable[..., None],
    media: Tensor,
    weights: Tensor,  # [L, 2 * G * D, d]
    norms: Tensor | None,  # [L, d]
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keys and values [L, M, G, D] by an operation that writes into its arguments."""
    shape = (len(weights), len(media), weights.shape[1] // (2 * HEAD_DIM), HEAD_DIM)
    keys, values = (torch.empty(shape, dtype=media.dtype, device=media.device) for _ in range(2))
    norm_list = None if norms is None else list(norms)
    verb(media, list(weights), norm_list, cos, sin, ids, list(keys), list(values), eps=EPS)
    return keys, values


def check_small(size: str, clock: Clock) -> None:
    """Compare the kernels with the reference on one tile and two layers, every element."""
    build = Build(size, 1, 2, clock)
    for weights, norms in ((build.weights, build.norms), (build.folded, None)):
        inputs = {
            "media": build.media,
            "weights": torch.stack(weights),
            "norms": None if norms is None else torch.stack(norms),
            "cos": build.table[0],
            "sin": build.table[1],
            "ids": build.ids,
        }
        assert_matches(
            lambda **given: _build(ops.build_memory, **given),
            lambda **given: _build(reference.build_memory, **given),
            inputs,
        )


class MemoryBench:
    """Times or tunes cases on one clock."""

    def __init__(self, clock: Clock, layers: int | None) -> None:
        self.clock, self.layers = clock, layers

    def inputs(self, size: str, tiles: int) -> tuple[Build, str]:
        layers = self.layers or MIXINS[size].layers
        build = Build(size, tiles, layers, self.clock)
        return build, f"{size} {tiles} tiles, {layers} layers"

    @torch.no_grad()
    def time_case(self, case: tuple[str, int], compiled: bool) -> Iterator[Row]:
        size, tiles = case
        check_small(size, self.clock)
        build, name = self.inputs(size, tiles)
        ways, error = build.ways(compiled), build.error_of()
        float8 = {n: way for n, way in ways.items() if n == "ours fp8"}
        others = {n: way for n, way in ways.items() if n not in float8}
        right = keep_right(name, others, error, self.clock.bound)
        right |= keep_right(name, float8, error, FLOAT8_BOUND)
        work = build.work()
        stored = Work(work.flops, work.moved - build.memories[build.dtype].nbytes)
        stored = Work(work.flops, stored.moved + build.memories[torch.float8_e4m3fn].nbytes)
        labels: Row = {"case": name, "pass": "build"}
        yield from self.clock.time(labels, right, 1, work, {"ours fp8": stored})

    @torch.no_grad()
    def tune(self, case: tuple[str, int]) -> Iterator[Row]:
        """Every shipped configuration of the kernels; the fastest has to become the first."""
        from comemo_kernels import _descriptors, _memory_build_tma, memory_build

        build, name = self.inputs(*case)
        found = build.ways(compiled=False)

        def timed(product: dict[str, Kernel], change: Callable[..., Any]) -> Iterator[Row]:
            both = ("ours exact", "ours folded")
            calls = {
                f"{way} {config}": call
                for way in both
                for config, call in each_configuration(product, change(found[way])).items()
            }
            bound = self.clock.bound
            right = keep_right(name, calls, build.error_of(), bound, must=False)
            rows = self.clock.time({"case": name, "pass": "tune"}, right, 1, build.work())
            known = {f"{way} {n}": kernel for way in both for n, kernel in product.items()}
            yield from tell_configurations(rows, known)

        plain = {"norm": memory_build.norm_media, "project": memory_build.project_media}
        yield from timed(plain, functools.partial(with_descriptors, memory_build, False))
        if _descriptors.AVAILABLE:
            # Last: a fault in these kernels may end the process.
            by_descriptors = functools.partial(with_descriptors, memory_build, True)
            yield from timed({"project by TMA": _memory_build_tma.project_tma}, by_descriptors)
