"""The projection of vision tokens to image tokens, into the sequence and the memory's media.

Ways: `published`, one operation at a time, the fold as two permuted copies, the sequence by a mask;
`compile`, the same under torch.compile; `library`, PyTorch's LayerNorm and GEMMs with a fold of
one copy; `library, norm ours`, one kernel for fold and norm before PyTorch's GEMMs; `ours`,
`project_tiles`. Passes: `forward`, into both destinations; `backward`, forward and backward of the
media only, with gradients of tokens and all weights.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import comemo_kernels as ops
from bench import measure
from bench.cases import MIXINS, TOKENS_PER_TILE
from bench.harness import assert_matches
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
from comemo_kernels import reference
from comemo_kernels._op import Kernel

CHANNELS, SIDE = 1024, 32  # of InternViT-300M
BEFORE, AFTER = 60, 36  # text tokens around the image
TILES = (1, 13, 52)
COMPILED = ("2B", 13)  # the one case that is compiled with --few-compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_way_arguments(parser)
    parser.add_argument("--tiles", nargs="+", type=int)


def run(options: argparse.Namespace) -> Iterator[Row]:
    clock = Clock.of(options, "project")
    few = measure.few(options)
    sizes = options.sizes or (["2B"] if few else ["2B", "9B"])
    tiles = options.tiles or (TILES[:2] if few else TILES)
    bench = ProjectBench(clock)
    cases = [(size, count) for size in sizes for count in tiles]
    if options.tune:
        return each_case(options, cases, bench.tune)
    return each_case(
        options, cases, lambda case: bench.time_case(case, compiles(options, case == COMPILED))
    )


class Weights(NamedTuple):
    """Weights of a projector, in the order of arguments of `project_tiles`."""

    norm_weight: Tensor
    norm_bias: Tensor
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor


def project_as_published(tokens: Tensor, weights: Weights) -> Tensor:
    """Image tokens [T, tokens, d]: without the class token, folded by two permuted copies."""
    T, C = tokens.shape[0], tokens.shape[2]
    x = tokens[:, 1:].reshape(T, SIDE, SIDE // 2, 2 * C).permute(0, 2, 1, 3).contiguous()
    x = x.view(T, SIDE // 2, SIDE // 2, 4 * C).permute(0, 2, 1, 3).contiguous()
    return multiply(_normed(x.flatten(1, 2), weights), weights)


def multiply(x: Tensor, weights: Weights) -> Tensor:
    """Both GEMMs and the activation, on normed tokens."""
    y = F.gelu(F.linear(x, weights.weight1, weights.bias1))
    return F.linear(y, weights.weight2, weights.bias2)


def _normed(x: Tensor, weights: Weights) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, 1e-5)


class Projection:
    """Tokens, weights and destinations of a case."""

    def __init__(self, size: str, tiles: int, clock: Clock) -> None:
        d, W = MIXINS[size].width, 4 * CHANNELS
        self.device, draw = clock.device, clock.draw
        torch.manual_seed(0)
        self.tokens = draw(tiles, 1 + SIDE * SIDE, CHANNELS)
        self.weights = Weights(
            norm_weight=1 + 0.1 * draw(W),
            norm_bias=0.1 * draw(W),
            weight1=draw(d, W) / W**0.5,
            bias1=0.1 * draw(d),
            weight2=draw(d, d) / d**0.5,
            bias2=0.1 * draw(d),
        )
        count = tiles * TOKENS_PER_TILE
        self.mask = torch.zeros(1, BEFORE + count + AFTER, dtype=torch.bool, device=self.device)
        self.mask[:, BEFORE : BEFORE + count] = True
        self.rows = ops.image_rows(self.mask, count)
        self.embeds = draw(*self.mask.shape, d)
        self.media = draw(count, d)
        self.cotangent = draw(tiles, TOKENS_PER_TILE, d)

    def work(self, backward: bool) -> Work:
        """FLOPs of the GEMMs and bytes that move once; both three times with gradients."""
        R, d = self.media.shape
        W = 4 * CHANNELS
        flops, moved = 2 * R * d * (W + d), sum(t.nbytes for t in self.weights)
        moved += self.tokens.nbytes + 2 * self.media.nbytes
        return Work(flops, moved) if not backward else Work(3 * flops, 3 * moved)

    def both(self, project: Callable[[Tensor, Weights], Tensor]) -> tuple[Tensor, Tensor]:
        """Media and sequence; the sequence is filled by a mask, as published."""
        media = project(self.tokens, self.weights).flatten(0, 1)
        return media, self.embeds.masked_scatter(self.mask[..., None], media)

    def library(self, tokens: Tensor, weights: Weights) -> Tensor:
        x = ops.fold_tiles(tokens[:, 1:].unflatten(1, (SIDE, SIDE))).flatten(1, 2)
        return multiply(_normed(x, weights), weights)

    def norm_ours(self) -> tuple[Tensor, Tensor]:
        from comemo_kernels._unshuffle_norm import launch_fold_norm

        w = self.weights
        x = self.media.new_empty(len(self.media), 4 * CHANNELS)
        launch_fold_norm(x, None, self.tokens, w.norm_weight, w.norm_bias, 2, False, 1e-5)
        media = multiply(x, w)
        self.embeds.flatten(0, 1).index_copy_(0, self.rows, media)
        return media, self.embeds

    def ours(self) -> tuple[Tensor, Tensor]:
        places = {"media": self.media, "embeds": self.embeds, "rows": self.rows}
        ops.project_tiles(self.tokens, *self.weights, **places)
        return self.media, self.embeds

    def forward_ways(self, compiled: bool) -> Ways:
        ways: Ways = {"published": lambda _: self.both(project_as_published)}
        if compiled:
            both = torch.compile(self.both, dynamic=False)
            ways["compile"] = lambda _: both(project_as_published)
        ways["library"] = lambda _: self.both(self.library)
        if self.device == "cuda":
            ways["library, norm ours"] = lambda _: self.norm_ours()
        ways["ours"] = lambda _: self.ours()
        return ways

    def backward_ways(self, compiled: bool) -> Ways:
        ways: Ways = {"published": self.learn(project_as_published)}
        if compiled:
            ways["compile"] = self.learn(torch.compile(project_as_published, dynamic=False))
        ways["library"] = self.learn(self.library)
        ways["ours"] = self.learn(lambda tokens, weights: ops.project_tiles(tokens, *weights))
        return ways

    def learn(self, project: Callable[[Tensor, Weights], Tensor]) -> Callable[[int], Any]:
        leaves = [t.detach().requires_grad_() for t in (self.tokens, *self.weights)]

        def call(_: int) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                media = project(leaves[0], Weights(*leaves[1:]))
                return media, *torch.autograd.grad(media, leaves, self.cotangent)

        return call

    def error_of(self, backward: bool) -> Callable[[str, Any], float]:
        """Relative error of the first and the last tile; with `backward` of all gradients."""
        ends = sorted({0, len(self.tokens) - 1})
        if not backward:
            exact = (self.tokens[ends].double(), *(t.double() for t in self.weights))
            wanted = reference.project_tiles(*exact)

            def error(_: str, found: Any) -> float:
                media, embeds = found
                embedded = embeds.flatten(0, 1)[self.rows]
                return max(
                    relative_error(t.view(len(self.tokens), -1, t.shape[-1])[ends], wanted)
                    for t in (media, embedded)
                )

            return error
        wide = torch.float32 if self.device == "cuda" else torch.float64
        leaves = [t.to(wide).requires_grad_() for t in (self.tokens, *self.weights)]
        with torch.enable_grad():
            media = reference.project_tiles(*leaves)
            truth = (media, *torch.autograd.grad(media, leaves, self.cotangent.to(wide)))
        return lambda _, found: max(map(relative_error, found, truth))


def check_small(size: str, clock: Clock) -> None:
    """Compare the kernels with the reference on one tile, every element and gradient."""
    case = Projection(size, 1, clock)
    inputs = {"tokens": case.tokens} | case.weights._asdict()
    for gradients in (False, True):
        given = {name: t.detach().requires_grad_(gradients) for name, t in inputs.items()}
        with torch.set_grad_enabled(gradients):
            assert_matches(ops.project_tiles, reference.project_tiles, given)


class ProjectBench:
    """Times or tunes cases on one clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    @torch.no_grad()
    def time_case(self, case: tuple[str, int], compiled: bool) -> Iterator[Row]:
        size, tiles = case
        if self.clock.device == "cuda":  # on a CPU the reference runs
            check_small(size, self.clock)
        inputs, name = Projection(size, tiles, self.clock), f"{size} {tiles} tiles"
        for backward in (False, True):
            ways = (inputs.backward_ways if backward else inputs.forward_ways)(compiled)
            error, work = inputs.error_of(backward), inputs.work(backward)
            # A bias's gradient sums over all rows; a CPU does so in bfloat16.
            right = keep_right(name, ways, error, self.clock.bound * (4 if backward else 1))
            labels: Row = {"case": name, "pass": "backward" if backward else "forward"}
            yield from self.clock.time(labels, right, 1, work)
            if self.clock.device == "cuda" and not backward:
                yield from self.clock.time_graphs(labels, right, 1, work)

    @torch.no_grad()
    def tune(self, case: tuple[str, int]) -> Iterator[Row]:
        """Every shipped configuration of the kernels; the fastest has to become the first."""
        from comemo_kernels import _gemm, _unshuffle_norm

        inputs, name = Projection(*case, self.clock), f"{case[0]} {case[1]} tiles"
        for backward, kernels in (
            (False, {"fold": _unshuffle_norm.fold_norm, "product": _gemm.product}),
            (True, {"fold gradient": _unshuffle_norm.fold_norm_gradient}),
        ):
            found = inputs.backward_ways(False) if backward else inputs.forward_ways(False)
            shipped: dict[str, Kernel] = kernels
            calls = {
                f"ours {config}": call
                for config, call in each_configuration(shipped, found["ours"]).items()
            }
            error, work = inputs.error_of(backward), inputs.work(backward)
            right = keep_right(name, calls, error, self.clock.bound, must=False)
            rows = self.clock.time({"case": name, "pass": "tune"}, right, 1, work)
            yield from tell_configurations(rows, {f"ours {n}": k for n, k in shipped.items()})
