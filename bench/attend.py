"""Attention over the image memory, compared with a large GEMM and a large copy.

Ways: `ours` rotates queries as they are loaded; `ours no rotation` takes queries and keys that are
rotated already; `ours fp8` reads a float8 memory. `sdpa flash` and `sdpa cudnn` pin that backend,
with queries rotated beforehand; `+ rotary` includes their rotation; `folded` treats rows that share
a memory as queries of one row. `varlen` is PyTorch's flash attention of packed rows; `flex` is
FlexAttention, compiled, with a block mask; `dense mask` is SDPA with a boolean mask. `published`
builds keys and values in every call, `cached` keeps them, padded to the longest row; SDPA then
chooses its backend. A decode step is also timed in a CUDA graph, and its cost on the host.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import comemo_kernels as ops
from bench import measure, published
from bench.attending import Attending
from bench.cases import HEAD_DIM
from bench.readings import READINGS, SMALL
from bench.tuning import each_configuration, tell_configurations, with_descriptors
from bench.ways import Clock, Row, Ways, add_way_arguments, compiles, each_case, keep_right

SPLITS = (1, 2, 4, 8, 13, 16, 26, 52)
FLEX = ("pack_16k", "prefill_8k_13k")  # cases of FlexAttention: each takes a compilation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=[*READINGS, *SMALL])
    add_way_arguments(parser)


def run(options: argparse.Namespace) -> Iterator[Row]:
    clock = Clock.of(options, "attend")
    names = options.cases or list(SMALL if measure.few(options) else READINGS)
    cases = itertools.product(options.sizes or ["2B"], names)
    if options.tune:
        return each_case(options, cases, lambda case: tune(case[0], case[1], clock))
    return each_case(
        options, cases, lambda case: time_case(*case, clock, compiles(options, case[1] == FLEX[0]))
    )


class AttendWays(Attending):
    """All ways to read the memory of a case."""

    def ways(self, compiled: bool) -> Ways:
        return {
            **self.our_ways(),
            **(self.batched_ways() if self.reading.uniform else self.masked_ways()),
            **(self.varlen_ways() if self.device == "cuda" else {}),
            **(self.flex_ways() if compiled and self.device == "cuda" else {}),
        }

    def our_ways(self, workspace: bool = False, splits: int | None = None) -> Ways:
        first = self.sets[0]
        held = ops.attention_workspace(first.q, first.k, splits) if workspace else None

        def ours(i: int) -> Any:
            s = self.sets[i]
            return ops.attend_spans(s.q, s.k, s.v, self.spans, self.rotation, workspace=held)

        def ours_no_rotation(i: int) -> Any:
            s = self.sets[i]
            return ops.attend_spans(s.rotated, s.absolute, s.v, self.spans, workspace=held)

        def ours_fp8(i: int) -> Any:
            assert self.float8 is not None
            q, kv, scales = self.sets[i].q, self.float8_sets[i], self.float8[2]
            return ops.attend_spans(q, *kv, self.spans, self.rotation, scales, workspace=held)

        ways: Ways = {"ours": ours, "ours no rotation": ours_no_rotation}
        return ways | ({"ours fp8": ours_fp8} if self.float8 is not None else {})

    def rows_of(self, x: Tensor) -> Tensor:
        """[M, G, D] as a batch [B, M/B, G, D], or [B, M, G, D] where all rows read the same."""
        B = self.reading.shape[0]
        return x[None].expand(B, -1, -1, -1) if self.reading.shared else x.unflatten(0, (B, -1))

    def batched_ways(self) -> Ways:
        cos, sin = self.rotation[:2]

        def pinned(backend: SDPBackend, rotate: bool) -> Callable[[int], Any]:
            def call(i: int) -> Tensor:
                s = self.sets[i]
                q = s.rotated
                if rotate:
                    q = ops.apply_rotary(s.q, None, cos, sin, self.positions)[0]
                with sdpa_kernel(backend):
                    return published.attend(q, self.rows_of(s.absolute), self.rows_of(s.v))

            return call

        def folded(i: int) -> Tensor:
            s = self.sets[i]
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                q = s.rotated.transpose(0, 1)  # [1, B, H, D]
                return published.attend(q, s.absolute[None], s.v[None]).transpose(0, 1)

        def cached(i: int) -> Tensor:
            s = self.sets[i]
            q = published.rotate(s.q, *self.wide, self.positions)
            return published.attend(q, self.rows_of(s.absolute), self.rows_of(s.v))

        def as_published(i: int) -> Tensor:
            q = published.rotate(self.sets[i].q, *self.wide, self.positions)
            kv = published.build(self.media, self.norm, self.weight, *self.wide, self.prompt_ids)
            return published.attend(q, *(self.rows_of(t) for t in kv))

        ways: Ways = {}
        backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION}
        if self.device == "cuda":
            backends["sdpa cudnn"] = SDPBackend.CUDNN_ATTENTION
        for name, backend in backends.items():
            ways |= {name: pinned(backend, False), f"{name} + rotary": pinned(backend, True)}
        if self.reading.shared and self.reading.decoding:
            ways["sdpa flash folded"] = folded
        return ways | {"cached": cached, "published": as_published}

    def masked_ways(self) -> Ways:
        keys, spans = torch.arange(len(self.ids), device=self.device), self.spans
        B, N = self.reading.shape
        mask = ((keys >= spans[..., :1]) & (keys < spans[..., 1:])).flatten(0, 1)  # [B * N, M]

        def dense(i: int) -> Tensor:
            s = self.sets[i]
            q = s.rotated.flatten(0, 1)[None]
            return published.attend(q, s.absolute[None], s.v[None], mask).view(B, N, -1, HEAD_DIM)

        if self.reading.packed:
            return {"dense mask": dense}
        lengths = torch.tensor(self.reading.lengths, device=self.device)
        longest = max(self.reading.lengths)
        filled = torch.arange(longest, device=self.device) < lengths[:, None]  # [B, longest]

        def padded(x: Tensor) -> Tensor:
            rows = x.new_zeros(len(filled), longest, *x.shape[1:])
            rows[filled] = x
            return rows

        caches = [(padded(s.absolute), padded(s.v)) for s in self.sets]

        def cached(i: int) -> Tensor:
            q = published.rotate(self.sets[i].q, *self.wide, self.positions)
            return published.attend(q, *caches[i], filled[:, None, None])

        return {"dense mask": dense, "cached": cached}

    def varlen_ways(self) -> Ways:
        if published.varlen_attn is None or self.reading.shared:
            return {}
        counts, lengths = [count for count, _ in self.reading.samples], self.reading.lengths
        bounds = [
            torch.tensor([0, *itertools.accumulate(t)], dtype=torch.int32, device=self.device)
            for t in (counts, lengths)
        ]

        def varlen(i: int) -> Tensor:
            s = self.sets[i]
            q, longest = s.rotated.flatten(0, 1), (max(counts), max(lengths))
            return published.varlen_attn(q, s.absolute, s.v, *bounds, *longest).view(s.q.shape)

        return {"varlen": varlen}

    def flex_ways(self) -> Ways:
        if self.name not in FLEX:
            return {}
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        starts, ends = self.spans.expand(*self.reading.shape, 2)[0].T.contiguous().unbind(0)
        N, M = self.reading.queries, len(self.ids)
        mask = create_block_mask(
            lambda b, h, q, k: (k >= starts[q]) & (k < ends[q]), None, None, N, M, self.device
        )
        attend = torch.compile(flex_attention, dynamic=False)

        def flex(i: int) -> Tensor:
            s = self.sets[i]
            q, k, v = (t.transpose(1, 2) for t in (s.rotated, s.absolute[None], s.v[None]))
            return attend(q, k, v, block_mask=mask).transpose(1, 2)

        return {"flex": flex}


@torch.no_grad()
def time_case(size: str, case: str, clock: Clock, compiled: bool) -> Iterator[Row]:
    attending = AttendWays(size, case, clock)
    error, bound = attending.error_of(), clock.bound
    name, sets = f"{case} {size}", len(attending.sets)
    ways = keep_right(name, attending.ways(compiled), error, bound)
    labels: Row = {"case": name, "pass": "forward"}
    work, works = attending.work, attending.works()
    yield from clock.time(labels, ways, sets, work, works)
    if clock.device == "cpu" or not attending.reading.decoding:
        return
    in_place = keep_right(name, attending.our_ways(workspace=True), error, bound)
    graphs = {n: in_place.get(n, way) for n, way in ways.items() if n != "published"}
    yield from clock.time_graphs(labels, graphs, sets, work, works)
    for way, call in {**graphs, "ours no workspace": ways["ours"]}.items():
        cost = measure.host_us(functools.partial(call, 0), 30)
        yield labels | {"pass": "host", "way": way, "host_us": cost}


@torch.no_grad()
def tune(size: str, case: str, clock: Clock) -> Iterator[Row]:
    """Time every configuration of the kernel of a case, and several numbers of splits.

    The fastest configuration has to become the first of its list.
    """
    from comemo_kernels import _attend_tma, _descriptors, attention

    attending = AttendWays(size, case, clock)
    rows = attending.reading.queries  # per key head
    kernel = attention._kernel_for(attending.dtype, rows)
    labels: Row = {"case": f"{case} {size}", "pass": "tune"}
    ours = attending.our_ways(workspace=attending.reading.decoding)
    kernels = {way: kernel for way in ours if way != "ours no rotation"}
    plainly = functools.partial(with_descriptors, attention, False)
    calls = {
        n: c
        for way, k in kernels.items()
        for n, c in each_configuration({way: k}, plainly(ours[way])).items()
    }

    def timed(calls: Ways) -> Iterator[Row]:
        right = keep_right(labels["case"], calls, attending.error_of(), clock.bound, must=False)
        works = {n: attending.works()["ours fp8"] for n in right if n.startswith("ours fp8")}
        return clock.time(labels, right, len(attending.sets), attending.work, works)

    yield from tell_configurations(timed(calls), kernels)
    if attending.reading.decoding:
        q, k = attending.sets[0].q, attending.sets[0].k
        default = attention._choose_splits(q, k)
        counts = sorted({default, *(n for n in SPLITS if n <= 4 * default)})
        calls = {f"ours {n}": attending.our_ways(True, n)["ours"] for n in counts}
        for row in timed(calls):
            count = row["way"].split()[1]
            yield row | {"kernel": "splits", "config": count, "first": int(count) == default}
    elif kernel is attention.attend_many and _descriptors.AVAILABLE:
        # Last: a fault in these kernels may end the process.
        kernels = {"descriptors": _attend_tma.attend_tma}
        calls = each_configuration(kernels, with_descriptors(attention, True, ours["ours"]))
        yield from tell_configurations(timed(calls), kernels)
