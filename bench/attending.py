"""Inputs of a case of attention over the image memory, and the exact result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from bench import published
from bench.cases import HEAD_DIM, MIXINS
from bench.readings import READINGS, SMALL, Reading
from bench.ways import Clock, Work, relative_error
from comemo_kernels import MemoryScales, QueryRotation, reference
from comemo_kernels.reference.attention_groups import rotate_by_distance

CHECKED = 64  # queries that are compared with exact arithmetic
POSITIONS = 32768  # rows of the table of angles


@dataclass
class Inputs:
    """One set of inputs; sets are equal but have their own memory."""

    q: Tensor  # [B, N, H, D]
    rotated: Tensor  # q rotated by the ids of the prompt
    k: Tensor  # [M, G, D] rotated by the place in the image
    absolute: Tensor  # keys rotated by the ids of the prompt
    v: Tensor  # [M, G, D]

    def clone(self) -> "Inputs":
        return Inputs(*(t.clone() for t in vars(self).values()))


class Attending:
    """A case: spans, rotation, memory and queries."""

    def __init__(self, size: str, case: str, clock: Clock, reading: Reading | None = None) -> None:
        self.name, self.device, self.dtype = case, clock.device, clock.dtype
        self.reading = {**READINGS, **SMALL}[case] if reading is None else reading
        d, self.heads, _, _ = MIXINS[size]
        torch.manual_seed(0)
        cos, sin = ops.distance_table(HEAD_DIM, 1e6, POSITIONS, torch.device(self.device))
        self.wide = published.widen((cos, sin), self.dtype)
        self.ids, starts, biases = self.reading.places(self.device)
        self.positions = self.reading.positions(self.device)
        self.spans = self.reading.spans(self.device)
        self.rotation = QueryRotation(cos, sin, self.positions, starts, biases)
        sizes = torch.tensor(self.reading.sizes, device=self.device)
        shift = biases[0].repeat_interleave(sizes)
        self.prompt_ids = (self.ids + shift).long()  # [M]
        self.media = clock.draw(len(self.ids), d)
        self.weight = clock.draw(2 * self.heads * HEAD_DIM, d) / d**0.5
        self.norm = torch.ones_like(self.media[0])
        k, v = self.build(self.dtype)
        self.float8: tuple[Tensor, Tensor, MemoryScales] | None = None
        if self.reading.decoding and clock.float8:
            tiles = (2, -(-len(k) // 256), self.heads)
            scales = MemoryScales(*torch.ones(tiles, device=self.device).unbind(0))
            self.float8 = (*self.build(torch.float8_e4m3fn, scales), scales)
        q = clock.draw(*self.reading.shape, self.heads, HEAD_DIM)
        rotated = rotate_by_distance(q, self.positions, cos, sin)
        self.work = self._work(k)
        first = Inputs(q, rotated, k, rotate_by_distance(k, shift, cos, sin), v)
        self.sets = [first, *(first.clone() for _ in range(clock.sets(self.work) - 1))]
        self.float8_sets = (
            [[t.clone() for t in self.float8[:2]] for _ in self.sets] if self.float8 else []
        )

    def build(self, dtype: torch.dtype, scales: MemoryScales | None = None) -> tuple[Any, Any]:
        """Keys and values by the reference, so that errors of the build kernels do not matter."""
        shape = (2, len(self.media), self.heads, HEAD_DIM)
        k, v = torch.empty(shape, device=self.device, dtype=dtype).unbind(0)
        reference.build_memory(
            self.media,
            [self.weight],
            [self.norm],
            *self.rotation[:2],
            self.ids,
            [k],
            [v],
            None if scales is None else [scales],
        )
        return k, v

    def _work(self, k: Tensor) -> Work:
        queries = 2 * self.reading.queries * self.heads * HEAD_DIM * self.dtype.itemsize
        flops = 4 * self.reading.pairs * self.heads * HEAD_DIM
        return Work(flops, queries + 2 * k.numel() * k.itemsize)

    def works(self) -> dict[str, Work]:
        """Work of `ours fp8`, whose memory has fewer bytes."""
        if self.float8 is None:
            return {}
        k, _, scales = self.float8
        saved = 2 * k.numel() * (self.dtype.itemsize - k.itemsize)
        scaled = scales.keys.nbytes + scales.values.nbytes
        return {"ours fp8": Work(self.work.flops, self.work.moved - saved + scaled)}

    def error_of(self) -> Callable[[str, Any], float]:
        """Relative error of some queries' outputs; ours must also be 0 for empty spans."""
        count = self.reading.queries
        rows = torch.arange(0, count, max(1, count // CHECKED), device=self.device)
        spans = self.spans.expand(*self.reading.shape, 2).flatten(0, 1)[rows][None]
        positions = self.positions.flatten()[rows][None]
        q = self.sets[0].q.flatten(0, 1)[rows][None].double()
        rotation = self.rotation._replace(positions=positions)

        def exact(k: Tensor, v: Tensor, scales: MemoryScales | None = None) -> Tensor:
            if scales is None:
                k, v = k.double(), v.double()
            out = reference.attend_spans(q, k, v, spans, rotation, scales)
            assert isinstance(out, Tensor)
            return out[0]

        wanted = exact(self.sets[0].k, self.sets[0].v)
        wanted_float8 = None if self.float8 is None else exact(*self.float8)
        reads = (spans[..., 1] > spans[..., 0])[0]

        def error(name: str, found: Tensor) -> float:
            found = found.flatten(0, 1)[rows]
            if name.startswith("ours") and found[~reads].any():
                return float("inf")
            truth = wanted_float8 if name.startswith("ours fp8") else wanted
            assert truth is not None
            return relative_error(found[reads], truth[reads])

        return error
