"""A whole mixin block in training, and the build of keys and values, by several ways."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from bench import published
from bench.attending import POSITIONS
from bench.cases import HEAD_DIM, MIXINS
from bench.mixin import config_of, draw_layer
from bench.published import Block, Places, Samples
from bench.readings import Reading
from bench.steps import Outputs, Step, largest_error, leaves_of
from bench.ways import Clock, Work
from comemo.mixin import EPS
from comemo_kernels import ImageMemory


class BlockStep:
    """A layer with random weights, one packed row of tokens and the media of its pictures."""

    def __init__(self, size: str, reading: Reading, clock: Clock) -> None:
        d, self.heads, _, self.wide_width = MIXINS[size]
        self.reading, self.device, self.dtype = reading, clock.device, clock.dtype
        torch.manual_seed(0)
        with torch.no_grad():
            self.layer = draw_layer(config_of(size), clock).requires_grad_()
        x, media = clock.draw(1, reading.queries, d) / 4, clock.draw(sum(reading.sizes), d)
        self.leaves = [*leaves_of(x, media), *Block.of(self.layer)]
        table = ops.distance_table(HEAD_DIM, 1e6, POSITIONS, torch.device(self.device))
        self.wide = published.widen(table, self.dtype)
        ids, _, biases = reading.places(self.device)
        sizes = torch.tensor(reading.sizes, dtype=torch.int64, device=self.device)
        media_ids = (ids + biases[0].repeat_interleave(sizes)).long()  # [M]
        spans, lengths = reading.spans(self.device), [len(ids)]
        active = None if all(reading.lengths) else spans[..., 1:] > spans[..., :1]
        memory = ImageMemory.from_media(media, media_ids, lengths, reading.sizes, table)
        self.memory = replace(memory, spans=spans, active=active)
        positions = reading.positions(self.device)
        self.rotation = self.memory.rotation(positions)
        assert self.memory.ids is not None
        self.key_angles = (*table, self.memory.ids)
        counts = [count for count, _ in reading.samples]
        samples = Samples.of(counts, reading.lengths, self.device)
        self.places = Places(positions, media_ids, samples, active)
        self.cotangent, self.truth = self._exact(clock)

    @property
    def given(self) -> list[Tensor]:
        """Tensors that exist before a step: they are no activations."""
        held = (*self.wide, *self.key_angles, self.memory.spans, *self.rotation, *self.places)
        more = [t for t in held if isinstance(t, Tensor)]
        return [*self.leaves, self.cotangent, *more, *self.places.samples.bounds]

    def published(self, mix: Callable[..., Tensor], x: Tensor, *tensors: Tensor) -> Tensor:
        media, *weights = tensors
        wide = tuple(t.to(torch.promote_types(t.dtype, x.dtype)) for t in self.wide)
        return mix(x, media, Block(*weights), *wide, self.places)

    def steps(self, compiled: bool) -> dict[str, Step]:
        def ours(x: Tensor, media: Tensor, *_: Tensor, recompute: str = "cheap") -> Tensor:
            place = self.memory, self.rotation, self.key_angles
            return self.layer(x, media, *place, recompute=recompute)

        ways: dict[str, Callable[..., Tensor]] = {
            "ours": ours,
            "ours projections": functools.partial(ours, recompute="projections"),
            "published": functools.partial(self.published, published.step),
        }
        if compiled:
            mix = torch.compile(published.step, dynamic=False)
            ways["compile"] = functools.partial(self.published, mix)
        return {name: Step(way, self.leaves, [self.cotangent]) for name, way in ways.items()}

    def _exact(self, clock: Clock) -> tuple[Tensor, list[Tensor]]:
        """A cotangent, and what is added to x and to its gradient, and all other gradients.

        On a CPU in float64; on a GPU in float32, for its speed.
        """
        wide = torch.float32 if self.device == "cuda" else torch.float64
        leaves = leaves_of(*(t.to(wide) for t in self.leaves))
        forward = functools.partial(self.published, published.step)
        (y,) = outputs = Step(forward, leaves, []).outputs()
        added = (y - leaves[0]).detach()
        # Not only random numbers: the gradient of a gate would be a sum of random signs.
        along = added / added.square().mean().sqrt().clamp(min=1e-6)
        cotangent = (clock.draw(*y.shape) + along).to(self.dtype)
        exact = Step(forward, leaves, [cotangent.to(wide)]).gradients(outputs)
        return cotangent, [added, exact[0] - cotangent, *exact[1:]]

    def error_of(self) -> Callable[[str, Any], float]:
        """Largest error of the output and all gradients, without the residual, which hides it."""

        def error(_: str, found: Any) -> float:
            y, dx, *others = found
            x = self.leaves[0].detach().double()
            kept = [y.double() - x, dx.double() - self.cotangent.double()]
            return largest_error([*kept, *others], self.truth)

        return error

    def work(self) -> Work:
        """Of forward and backward: three times the products, 3.5 times the attention."""
        x, media, *weights = self.leaves
        block = Block(*weights)
        rows, kv = x.shape[1], block.kv.numel()
        matrices = sum(t.numel() for t in block if t.ndim == 2) - kv
        products = 2 * (rows * matrices + len(media) * kv)
        attention = 4 * self.reading.pairs * self.heads * HEAD_DIM
        moved = 3 * sum(t.nbytes for t in weights) + 4 * x.nbytes + 3 * media.nbytes
        return Work(3 * products + 3.5 * attention, moved)


class BuildStep:
    """Media of a case, and the weights of all layers that project them."""

    def __init__(self, size: str, reading: Reading, clock: Clock) -> None:
        d, self.heads, self.layers, _ = MIXINS[size]
        torch.manual_seed(0)
        inner = self.heads * HEAD_DIM
        self.ids = reading.places(clock.device)[0]
        self.table = ops.distance_table(HEAD_DIM, 1e6, POSITIONS, torch.device(clock.device))
        media = clock.draw(len(self.ids), d)
        weights = [clock.draw(2 * inner, d) / d**0.5 for _ in range(self.layers)]
        norms = [1 + 0.1 * clock.draw(d) for _ in range(self.layers)]
        self.leaves = leaves_of(media, *weights, *norms)
        shape = (len(media), self.heads, HEAD_DIM)
        self.cotangents = [clock.draw(*shape) for _ in range(2 * self.layers)]

    def published(self, build: Callable[..., Any], media: Tensor, *tensors: Tensor) -> list[Tensor]:
        weights, norms = tensors[: self.layers], tensors[self.layers :]
        wide = published.widen(self.table, media.dtype)
        pairs = [
            build(media, norm, weight, *wide, self.ids.long())
            for weight, norm in zip(weights, norms, strict=True)
        ]
        return [k for k, _ in pairs] + [v for _, v in pairs]

    def ours(self, media: Tensor, *tensors: Tensor) -> list[Tensor]:
        weights, norms = list(tensors[: self.layers]), list(tensors[self.layers :])
        keys, values = ops.project_memory(
            media, weights, norms, *self.table, self.ids, self.heads, eps=EPS
        )
        return [*keys, *values]

    def steps(self, compiled: bool) -> dict[str, Step]:
        ways: dict[str, Callable[..., Sequence[Tensor]]] = {
            "ours": self.ours,
            "published": functools.partial(self.published, published.build),
        }
        if compiled:
            build = torch.compile(published.build, dynamic=False)
            ways["compile"] = functools.partial(self.published, build)
        return {name: Step(way, self.leaves, self.cotangents) for name, way in ways.items()}

    def error_of(self) -> Callable[[str, Any], float]:
        """Largest error of keys, values and all gradients, from float64."""
        leaves = leaves_of(*(t.double() for t in self.leaves))
        cotangents = [t.double() for t in self.cotangents]
        build = functools.partial(self.published, published.build)
        truth: Outputs = Step(build, leaves, cotangents).run()
        return lambda _, found: largest_error(found, truth)

    def work(self) -> Work:
        """Of forward and backward: three times the products."""
        media, *weights = self.leaves
        outputs = 2 * self.layers * self.heads * HEAD_DIM
        flops = 2 * media.numel() * outputs
        moved = 3 * sum(t.nbytes for t in weights) + 3 * media.nbytes
        return Work(3 * flops, moved + 2 * sum(t.nbytes for t in self.cotangents))
