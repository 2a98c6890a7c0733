"""Rotary embedding of q and k: GB/s of several ways, relative to a plain copy in the same run.

Ways: `eager`, the published one (gather rows of a table, rotate halves); `compile`, this library's
reference under torch.compile; `liger`, if Liger-Kernel is installed (it rotates in place, in the
activations' dtype, with rows gathered beforehand, and copies inputs that are not contiguous);
`ours`, `ours in place`, and `ours grids`, which computes ids from the image's grid. Rows `host`:
time of a call on the host, and in a CUDA graph.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from bench import measure, progress, published
from bench.cases import HEAD_DIM, HEADS, PROMPTS, Prompt
from bench.harness import assert_matches
from bench.tuning import each_configuration, tell_configurations
from bench.ways import Row, add_compile_arguments, compiles, keep_right, relative_error
from comemo_kernels import reference
from comemo_kernels.rotary import rotary_kernel

try:
    from liger_kernel.ops.rope import LigerRopeFunction
except ImportError:
    LigerRopeFunction = None

SIZES = ("chat_1k", "one_image_3k", "pack_16k")
LAYOUTS = ("contiguous", "packed qkv")
COMPILED = ("2B", "one_image_3k", "contiguous")  # with --few-compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=SIZES)
    parser.add_argument("--heads", nargs="+", choices=HEADS)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=15)
    add_compile_arguments(parser)
    parser.add_argument("--tune", action="store_true", help="time every shipped configuration")
    measure.add_all(parser)


def cases_of(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Heads, case and layout of each case: those that are given, of the others the default."""
    few = measure.few(options)
    heads = options.heads or (list(HEADS)[:1] if few else list(HEADS))
    cases = options.cases or (SIZES[:2] if few else SIZES)
    return list(itertools.product(heads, cases, options.layouts or LAYOUTS))


def run(options: argparse.Namespace) -> Iterator[Row]:
    device = measure.default_device()
    if options.tune and device == "cpu":
        raise SystemExit("python -m bench rotary --tune: needs a GPU, found none")
    name = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    copy = measure.copy_bandwidth(device)
    print(f"a copy moves {copy / 1e9:.0f} GB/s")
    bench = RotaryBench(device, getattr(torch, name), copy, options.rounds)
    chosen = cases_of(options)
    if options.tune:
        heads = list(dict.fromkeys(size for size, _, _ in chosen))
        for case in dict.fromkeys(case for _, case, _ in chosen):
            yield from bench.tune(case, heads)
        return
    for place, (size, case, layout) in enumerate(progress.each(chosen, " ".join, _tokens)):
        few = measure.few(options) and options.cases is None
        compiled = compiles(options, (size, case, layout) == COMPILED, few)
        yield from bench.time_case(case, size, layout, compiled)
        if device == "cuda" and [heads for heads, _, _ in chosen[place + 1 :][:1]] != [size]:
            yield from bench.time_host(size)


def _tokens(case: tuple[str, str, str]) -> float:
    """The cost of a case relative to the others."""
    heads, name, _ = case
    return PROMPTS[name].tokens * sum(HEADS[heads])


class RotaryBench:
    """Times cases on one device and in one dtype, relative to the bandwidth of a copy."""

    def __init__(self, device: str, dtype: torch.dtype, copy: float, rounds: int) -> None:
        self.device, self.dtype, self.copy, self.rounds = device, dtype, copy, rounds
        cos, sin = ops.rotary_table(torch.arange(4096, device=device)[None], HEAD_DIM, 1e6)
        self.cos, self.sin = cos[0], sin[0]  # [P, D/2] float32

    def draw(self, prompt: Prompt, heads: str, layout: str) -> tuple[Tensor, Tensor]:
        """q [B, N, H, D] and k [B, N, G, D]."""
        (H, G), shape = HEADS[heads], (prompt.batch, prompt.tokens)
        if layout == "packed qkv":
            qkv = torch.randn(*shape, H + 2 * G, HEAD_DIM, device=self.device, dtype=self.dtype)
            q, k, _ = qkv.split([H, G, G], dim=2)
            return q, k
        return (
            torch.randn(*shape, H, HEAD_DIM, device=self.device, dtype=self.dtype),
            torch.randn(*shape, G, HEAD_DIM, device=self.device, dtype=self.dtype),
        )

    def ways(self, prompt: Prompt, compiled: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Name and rotation (q, k) -> (q, k) of every way that supports a prompt."""
        cos, sin, (ids, *grids) = self.cos, self.sin, self.positions(prompt)
        wide_cos, wide_sin = published.widen((cos, sin), self.dtype)
        yield "eager", lambda q, k: rotate_as_published(q, k, wide_cos, wide_sin, ids)
        if compiled:
            torch.compiler.reset()
            rotate = torch.compile(reference.apply_rotary)
            yield "compile", lambda q, k: rotate(q, k, cos, sin, ids)
        if LigerRopeFunction is not None and self.device == "cuda":
            rows_cos, rows_sin = wide_cos[ids], wide_sin[ids]

            def liger(q: Tensor, k: Tensor) -> Any:
                q, k = q.transpose(1, 2), k.transpose(1, 2)
                q, k = LigerRopeFunction.apply(q, k, rows_cos, rows_sin)
                return q.transpose(1, 2), k.transpose(1, 2)

            yield "liger", liger
        yield "ours", lambda q, k: ops.apply_rotary(q, k, cos, sin, ids)
        if grids:
            yield "ours grids", lambda q, k: ops.apply_rotary(q, k, cos, sin, grids[0])

    def right_ways(
        self, prompt: Prompt, heads: str, layout: str, compiled: bool
    ) -> dict[str, Callable[..., Any]]:
        """The correct ways; a wrong one is not timed, and if it is ours the run fails."""
        given = [(self.draw(prompt, heads, layout), prompt)]
        if prompt.decoding is None:
            small = Prompt([(40, [(2, 1)], 7)])
            leaves = tuple(x.requires_grad_() for x in self.draw(small, heads, layout))
            given.append((leaves, small))  # with gradients
        for (q, k), of in given:
            inputs = {"q": q, "k": k, "cos": self.cos, "sin": self.sin}
            for positions in self.positions(of):
                inputs["positions"] = positions
                assert_matches(ops.apply_rotary, reference.apply_rotary, inputs)
        (q, k), _ = given[0]
        exact = reference.apply_rotary(
            q.double(), k.double(), self.cos, self.sin, self.positions(prompt)[0]
        )
        right = {}
        for name, way in self.ways(prompt, compiled):
            try:
                found = way(q.clone(), k.clone())
                error = max(relative_error(x, y) for x, y in zip(found, exact, strict=True))
            except Exception as fault:  # of another library, in an unknown version
                print(f"rotary: {name} is not timed: {type(fault).__name__}: {fault}")
                continue
            if error < 1e-2:  # bfloat16 rounds by 4e-3
                right[name] = way
            else:
                print(f"rotary: {name} is not timed: relative error {error:.1e}")
        return right

    def positions(self, prompt: Prompt) -> list[Any]:
        """A prompt's ids, and its grids if it is one row with images."""
        found: list[Any] = [prompt.position_ids(self.device)]
        if prompt.grids and prompt.batch == 1:
            found.append(prompt.image_grids(self.device))
        return found

    def time_case(self, case: str, heads: str, layout: str, compiled: bool) -> Iterator[Row]:
        """Forward and backward of every way, with cold caches."""
        prompt = PROMPTS[case]
        H, G = HEADS[heads]
        moved = 2 * prompt.batch * prompt.tokens * (H + G) * HEAD_DIM * self.dtype.itemsize
        sets = measure.cold_sets(self.device, moved, 64)
        ways = self.right_ways(prompt, heads, layout, compiled)
        inputs = [self.draw(prompt, heads, layout) for _ in range(sets)]

        def record(direction: str, calls: dict[str, Callable[[int], Any]]) -> Iterator[Row]:
            for name, timing in measure.compare(calls, sets, self.device, self.rounds).items():
                speed, extra = moved / timing.us * 1e6, 0.0
                if self.device == "cuda":
                    extra = measure.extra_mib(functools.partial(calls[name], 0))
                yield {
                    "case": f"{case} {heads} {layout}",
                    "pass": direction,
                    "way": name,
                    "us": timing.us,
                    "low_us": timing.low_us,
                    "high_us": timing.high_us,
                    "gb_s": speed / 1e9,
                    "of_copy": speed / self.copy,
                    "extra_mib": extra,
                }

        def call(way: Callable[..., Any]) -> Callable[[int], Any]:
            return lambda i: way(*inputs[i])

        ids = prompt.position_ids(self.device)

        def in_place(q: Tensor, k: Tensor) -> Any:
            return ops.apply_rotary(q, k, self.cos, self.sin, ids, inplace=True)

        with torch.no_grad():
            forward = ways | {"ours in place": in_place}
            rows = list(record("forward", {name: call(way) for name, way in forward.items()}))
        yield from rows
        gradients = {}
        for name, way in ways.items():
            leaves = [tuple(x.detach().requires_grad_() for x in pair) for pair in inputs]
            # Views are no leaves, so Liger may write into them.
            outputs = [way(*(x.view_as(x) for x in pair)) for pair in leaves]
            gradients[name] = self._gradient(outputs, leaves, inputs)
        yield from record("backward", gradients)

    @staticmethod
    def _gradient(outputs: Any, leaves: Any, cotangents: Any) -> Callable[[int], Any]:
        return lambda i: torch.autograd.grad(
            outputs[i], leaves[i], cotangents[i], retain_graph=True
        )

    def time_host(self, heads: str) -> list[Row]:
        """A call of a decode step: time on the host, and time in a CUDA graph."""
        rows = []
        for case in ("decode_1", "decode_32", "chat_1k"):
            prompt = PROMPTS[case]
            ways = self.right_ways(prompt, heads, "contiguous", compiled=False)
            q, k = self.draw(prompt, heads, "contiguous")
            for name, way in ways.items():
                with torch.no_grad():
                    call = functools.partial(way, q, k)
                    rows.append(
                        {
                            "case": f"{case} {heads} contiguous",
                            "pass": "host",
                            "way": name,
                            "host_us": measure.host_us(call),
                            "graph_us": measure.graph_us(call),
                        }
                    )
        return rows

    @torch.no_grad()
    def tune(self, case: str, heads: list[str]) -> Iterator[Row]:
        """Every shipped configuration of the kernel; the fastest has to become the first."""
        prompt, kernels = PROMPTS[case], {"ours": rotary_kernel}
        ids = prompt.position_ids(self.device)
        for size in heads:
            H, G = HEADS[size]
            moved = 2 * prompt.tokens * (H + G) * HEAD_DIM * self.dtype.itemsize
            sets = measure.cold_sets(self.device, moved, 64)
            inputs = [self.draw(prompt, size, "contiguous") for _ in range(sets)]
            q, k = inputs[0]
            exact = reference.apply_rotary(q.double(), k.double(), self.cos, self.sin, ids)

            def rotate(i: int, inputs: Any = inputs) -> Any:
                return ops.apply_rotary(*inputs[i], self.cos, self.sin, ids)

            def error(_: str, found: Any, exact: Any = exact) -> float:
                return max(map(relative_error, found, exact))

            name = f"{case} {size} contiguous"
            calls = each_configuration(kernels, rotate)
            right = keep_right(name, calls, error, 1e-2, must=False)
            for way, timing in measure.compare(right, sets, self.device, self.rounds).items():
                speed = moved / timing.us * 1e6
                row = {"case": name, "pass": "tune", "way": way, "us": timing.us}
                row |= {"gb_s": speed / 1e9, "of_copy": speed / self.copy}
                yield from tell_configurations([row], kernels)


def rotate_as_published(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor) -> Any:
    """Gather rows [B, N, D] of tables of `published.widen` once, rotate q and k in float32."""
    cos, sin = cos[ids].unsqueeze(2), sin[ids].unsqueeze(2)
    return published.rotate_by(q, cos, sin), published.rotate_by(k, cos, sin)
