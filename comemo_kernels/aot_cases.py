"""What `comemo_kernels.aot` compiles: every kernel, dtype, variant and configuration that ships."""

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from comemo_kernels import _attend_tma, _descriptors, attention, positions, rotary, tiles
from comemo_kernels import _gemm as _product
from comemo_kernels import _memory_build_tma as _build_tma
from comemo_kernels import _unshuffle_norm as _fold
from comemo_kernels import fused_linear as glue
from comemo_kernels import memory_build as build
from comemo_kernels._op import Config, Kernel

NVIDIA = ("sm_80", "sm_90", "sm_100")
FLOAT8 = ("sm_90", "sm_100")  # sm_80 has no instruction that converts it
HOPPER = ("sm_90",)
EVERY = (*NVIDIA, "gfx942")


@dataclass(frozen=True)
class Case:
    """A launch to compile: real shapes and dtypes, no storage."""

    kernel: Kernel
    name: str
    launch: Callable[[], Any]
    configs: int = 1  # how many of the shipped configurations, the first ones, it stands for
    dot: bool = False  # whether it multiplies matrices in warp groups
    chips: tuple[str, ...] = EVERY
    spills: Mapping[str, int] = field(default_factory=dict)  # bytes that are put up with
    aligned: bool = True  # whether 128 bits divide all rows
    narrow: frozenset[str] = frozenset()  # pointers whose narrow accesses are put up with
    stage: Callable[[Config], int] | None = None  # bytes of shared memory of a step of the loop
    blocks: int = 1  # that the launcher counts on: of the first configuration, for sm_90


# Pointers to what is small beside the rest: a number for a row, a column or an image, or the few
# rows of a decode step. Narrow accesses to these cost nothing to speak of.
SMALL: Mapping[str, frozenset[str]] = {
    name: frozenset(pointers.split())
    for name, pointers in {
        "_rotary_kernel": "ids_ptrs grids_ptr row",
        "_rope_dhr_kernel": "image_ptr attention_ptr grids_ptr ids_ptr torn_ptr",
        "_rows_kernel": "norm_ptr gate_ptr residual out_ptrs",
        "_attend_kernel": "span_ptrs ids_ptrs bias_ptrs starts_ptr k_scale_ptr v_scale_ptr lse_ptr"
        " part_lse_ptr count_ptr",
        "_combine_kernel": "part_lse_ptr out_ptr lse_ptr",
        "_tma_kernel": "spans_ptr lse_ptr part_lse_ptr",
        "_turn_kernel": "ids_ptr biases_ptr spans_ptr starts_ptr",
        "_norm_kernel": "address_ptr weight_ptr rstd_ptr",
        "_project_kernel": "table rstd_ptr ids_ptr",
        "_project_tma_kernel": "address_ptr table rstd_ptr ids_ptr",
        "_scale_kernel": "address scale_ptr",
        "_fold_norm_kernel": "stats_ptr",
        "_fold_norm_gradient_kernel": "stats_ptr",
        "_gelu_gradient_kernel": "",
        "_product_kernel": "bias_ptr rows_ptr",
        "_sum_kernel": "bias_ptr rows_ptr",
    }.items()
}


def cases() -> list[Case]:
    """Everything that ships: each kernel, each dtype and variant, each configuration once."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def rotate(kind: str, dtype: torch.dtype, inverse: bool = False, D: int = 128) -> None:
        B, N, P, images = 2, 4096, 4096, 4
        q, k = empty(B, N, 16, D, dtype=dtype), empty(B, N, 8, D, dtype=dtype)
        table = empty(B, N, 64, dtype=dtype) if kind == "table" else empty(P, 64)
        positions = {
            "table": None,
            "int32": empty(B, N, dtype=torch.int32),
            "int64": empty(B, N, dtype=torch.int64),
            "grids": empty(images, 4, dtype=torch.int32),
        }[kind]
        side = 16 if kind == "grids" else 0
        rotary._launch([q, k], table, table, positions, side, True, True, inverse, inverse)

    def number(attention: torch.dtype, column: bool) -> None:
        mask = empty(2, 4096, dtype=torch.bool)
        grids = empty(4, 4, dtype=torch.int32)
        positions._launch(mask, mask.to(attention), grids, 13312, 16, column, True)

    half = torch.bfloat16

    def of_rotary(name: str, *args: Any, configs: int = 1, **kwargs: Any) -> Case:
        run = functools.partial(rotate, *args, **kwargs)
        blocks = 8 if args[1] == half and not kwargs.get("inverse") else 1  # 1,024 threads
        return Case(rotary.rotary_kernel, name, run, configs, blocks=blocks)

    every = len(rotary.rotary_kernel.configs)
    found = [
        of_rotary("bf16 table", "table", half, configs=every),
        of_rotary("bf16 int64 ids", "int64", half, configs=every),
        of_rotary("bf16 grids", "grids", half, configs=every),
        of_rotary("bf16 int32 ids", "int32", half),
        of_rotary("bf16 gradient, published", "int64", half, inverse=True),
        of_rotary("bf16 grids gradient, published", "grids", half, inverse=True),
        of_rotary("bf16 128 of 192", "int64", half, D=192),
    ]
    for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32"), (torch.float64, "fp64")):
        found += [of_rotary(f"{name} {kind}", kind, dtype) for kind in ("table", "int64", "grids")]
    numbering = positions.rope_dhr_kernel
    for mask, column in ((torch.int64, True), (torch.bool, False)):
        name = f"{str(mask).removeprefix('torch.')} mask"
        launch = lambda a=mask, c=column: number(a, c)  # noqa: E731
        found.append(Case(numbering, name, launch, len(numbering.configs)))
    return [*found, *_glue_cases(), *_attention_cases(), *_build_cases(), *_tile_cases()]


def _glue_cases() -> list[Case]:
    def launch(verb: str, dtype: torch.dtype, K: int, folded: bool) -> None:
        x, weight, residual = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((1, K), (2048, K), (1, 2048))
        )
        norm, gate = (None if folded else weight.new_empty(n) for n in (K, 1))
        if verb == "residual":
            glue._launch(x, None, weight, None, residual, gate, None)
        else:
            glue._launch(x, norm, weight, weight if verb == "swiglu" else None, None, None, 1e-5)

    found = []
    for verb, folded in itertools.product(("norm", "swiglu", "residual"), (False, True)):
        kernel = glue.two_weights_kernel if verb == "swiglu" else glue.one_weight_kernel
        for name, dtype, K in (
            ("bf16", torch.bfloat16, 2048),
            ("bf16 uneven", torch.bfloat16, 2056),
            ("fp16", torch.float16, 2048),
            ("fp32", torch.float32, 2048),
        ):
            run = functools.partial(launch, verb, dtype, K, folded)
            configs = len(kernel.configs) if name == "bf16" else 1
            spills = {}
            if verb == "swiglu" and not folded and name == "fp32":
                spills = {"sm_90": 24}  # by triton 3.6 alone
            elif verb == "swiglu" and folded and name == "fp32":
                spills = {"sm_80": 16}
            title = f"{name} rows, {verb}" + ", folded" * folded
            rows = 2 if verb == "swiglu" else 1
            stage = functools.partial(_stage_of_rows, rows)
            found.append(Case(kernel, title, run, configs, spills=spills, stage=stage))
    return found


def _stage_of_rows(weights: int, config: Config) -> int:
    """x and weights."""
    return (glue.ROWS + weights * config["BLOCK_O"]) * config["BLOCK_BYTES"]


def _attention_cases() -> list[Case]:
    half, D = torch.bfloat16, 128

    def stage_of(size: int) -> Callable[[Config], int]:
        """Keys and values."""
        return lambda config: 2 * config["BLOCK_N"] * D * size

    def attend(B: int, N: int, M: int, dtype: torch.dtype, images: int | None, eight: bool) -> None:
        """One prompt a row; `images` None leaves queries as they are."""
        new = functools.partial(torch.empty, device="meta")
        q = new(B, N, 16, D, dtype=dtype)
        k = new(M, 16, D, dtype=torch.float8_e4m3fn if eight else dtype)
        rotation: list[Any] = [None] * 5
        if images is not None:
            rotation = [*(new(4096, D // 2) for _ in "cs"), new(B, N, dtype=torch.int64)]
            rotation += [new(images, dtype=torch.int32), new(1, images, dtype=torch.int32)]
        scales = [new(M // 256, 16)] * 2 if eight else [None] * 2
        spans = new(B, 1, 2, dtype=torch.int64)
        attention._launch(q, k, k, spans, *rotation, *scales, 256 if eight else 1)

    many, few, one = attention.attend_many, attention.attend_few, attention.attend_one
    exact = attention.attend_exact
    found = [
        Case(
            attention.combine,
            "bf16 decode",
            functools.partial(attend, 1, 1, 3328, half, None, False),
            chips=NVIDIA,
        )
    ]

    def early() -> None:
        config = next(config for config in attention.attend_one.configs if config["EARLY"])
        with attention.attend_one.using(config):
            attend(1, 1, 3328, half, 1, False)

    if attention.combine_early is not attention.combine:
        found.append(Case(attention.combine_early, "bf16 decode", early, chips=NVIDIA[1:]))
    for kernel, name, B, N, M in (
        (many, "prefill", 1, 4096, 13312),
        (many, "few queries", 1, 300, 13312),
        (few, "batch", 8, 1, 26624),
        (one, "decode", 1, 1, 3328),
    ):
        for kind, images in (("", None), (" one image", 1), (" several images", 4)):
            # On sm_100 the accumulator leaves tensor memory while queries are rotated anew.
            spills = {"sm_100": 176} if kernel is many and images == 4 else {}
            eight_spills = {"sm_90": 56} | spills if spills else {}  # by triton 3.6 alone
            for eight in (False, True):
                run = functools.partial(attend, B, N, M, half, images, eight)
                title = f"bf16 {name}{kind}" + ", fp8" * eight
                chips = FLOAT8 if eight else NVIDIA
                configs = 1 if eight else len(kernel.configs)
                allowed = eight_spills if eight else spills
                # Of float8 without warp groups the compiler lays values out by 64 bits.
                narrow = frozenset(("v_ptr",) if eight and kernel is not many else ())
                # A fused combination writes the few rows of a decode step.
                narrow |= {"out_ptr"} if kernel is one else set()
                case = Case(kernel, title, run, configs, kernel is many, chips, allowed)
                stage, blocks = stage_of(1 if eight else 2), 1 if kernel is many else 2
                found.append(replace(case, narrow=narrow, stage=stage, blocks=blocks))
        run = functools.partial(attend, B, N, M, torch.float16, 1, False)
        found.append(Case(kernel, f"fp16 {name}", run, 1, kernel is many, NVIDIA))
    for kind, images in (("", None), (" one image", 1), (" several images", 4)):
        run = functools.partial(attend, 1, 512, 3328, torch.float32, images, False)
        spills = {"sm_100": 8} if images == 4 else {}
        found.append(Case(exact, f"fp32{kind}", run, chips=NVIDIA, spills=spills))

    def by_tma(dtype: torch.dtype, N: int, images: int, splits: int = 1) -> None:
        new = functools.partial(torch.empty, device="meta")
        q, k = new(1, N, 16, D, dtype=dtype), new(13312, 16, D, dtype=dtype)
        out, lse, parts = new(q.shape, dtype=dtype), new(1, N, 16), new(splits, 16, N, D)
        spans, ids = new(1, 1, 2, dtype=torch.int64), new(1, N, dtype=torch.int64)
        table, biases = new(4096, D // 2), new(1, images, dtype=torch.int32)
        rotation = (table, table, ids, biases[0], biases)
        _attend_tma.launch(out, lse, parts, parts[..., 0], q, k, k, spans, *rotation)

    if _descriptors.AVAILABLE:
        kernel, turn = _attend_tma.attend_tma, _attend_tma.turn
        for dtype, name in ((half, "bf16"), (torch.float16, "fp16")):
            run = functools.partial(by_tma, dtype, 4096, 1)
            found.append(Case(kernel, f"{name} prefill", run, len(kernel.configs), True, HOPPER))
            found.append(Case(turn, f"{name} prefill", run, chips=HOPPER))
        run = functools.partial(by_tma, half, 300, 1, 3)
        found.append(Case(kernel, "bf16 few queries", run, 1, True, HOPPER))
        run = functools.partial(by_tma, half, 4096, 4)
        found.append(Case(turn, "bf16 several images", run, chips=HOPPER))
    run = functools.partial(attend, 1, 512, 3328, torch.float32, 1, True)
    # A step is 16 keys of 128 bytes for 256 threads.
    narrow = frozenset(("k_ptr", "v_ptr"))
    found.append(Case(exact, "fp32 one image, fp8", run, chips=FLOAT8, narrow=narrow))
    return found


def _build_cases() -> list[Case]:
    def memory(dtype: torch.dtype, exact: bool, eight: bool) -> None:
        M, d, L, G, D = 3328, 2048, 6, 16, 128
        new = functools.partial(torch.empty, device="meta")
        held = [new(M, G, D, dtype=torch.float8_e4m3fn if eight else dtype)] * L
        table, ids = new(4096, D // 2), new(M, dtype=torch.int32)
        media, weights = new(M, d, dtype=dtype), [new(2 * G * D, d, dtype=dtype)] * L
        norms = [new(d, dtype=dtype)] * L if exact else []
        scales = [new(M // 256, G)] * L if eight else []
        arguments = (media, weights, norms, table, table, ids, held, held, scales, scales)
        build._launch(*arguments, 256 if eight else 1, 0, 1e-5)

    def of(name: str, run: Callable[[], Any], configs: int = 1) -> Case:
        # Of 128 x 256 outputs; on sm_80 by triton 3.6 alone.
        spills = {"sm_80": 40, "sm_100": 104} if configs > 1 else {}
        case = Case(build.project_media, name, run, configs, True, NVIDIA, spills)
        return replace(
            case,
            stage=lambda c: (c["BLOCK_M"] + 2 * c["BLOCK_C"]) * c["BLOCK_K"] * 2,
            blocks=2,
        )

    half, project = torch.bfloat16, build.project_media
    found = []
    for exact, name in ((True, "exact"), (False, "folded")):
        run = functools.partial(memory, half, exact, False)
        found += [
            Case(build.norm_media, f"bf16 {name}", run, len(build.norm_media.configs)),
            of(f"bf16 {name}", run, len(project.configs)),
        ]
        run = functools.partial(memory, torch.float32, exact, False)
        found.append(Case(build.project_exact, f"fp32 {name}", run, chips=NVIDIA))
        run = functools.partial(memory, torch.float16, exact, False)
        found.append(of(f"fp16 {name}", run))
    run = functools.partial(memory, half, True, True)
    found.append(Case(build.scale_memory, "bf16 to fp8", run, chips=FLOAT8))

    def by_tma(dtype: torch.dtype, exact: bool, D: int) -> None:
        M, d, L, G = 3328, 2048, 6, 2048 // D
        new = functools.partial(torch.empty, device="meta")
        x, table, address = new(L, M, d, dtype=dtype), new(4096, D // 2), new(L, 4).long()
        given = (x if exact else x[0], new(M), new(M).int(), table, table, address)
        _build_tma.launch(*given, (G * D, D), M, (G, D), 0)

    kernel, stage = _build_tma.project_tma, lambda c: (c["BLOCK_M"] + c["BLOCK_N"]) * 128
    every = len(kernel.configs)
    for name, configs, *of_what in (
        ("bf16 exact", every, half, True, 128),
        ("bf16 folded", every, half, False, 128),
        ("bf16 exact, 64 wide", 1, half, True, 64),
        ("fp16 exact", 1, torch.float16, True, 128),
    ):
        run = functools.partial(by_tma, *of_what)
        found.append(Case(kernel, name, run, configs, True, ("sm_90",), stage=stage))
    return found if _descriptors.AVAILABLE else [c for c in found if c.kernel is not kernel]


def _tile_cases() -> list[Case]:
    def projected(
        dtype: torch.dtype,
        gradients: bool,
        T: int = 13,
        C: int = 1024,
        d: int = 2048,
        to: tuple[bool, bool] = (True, True),  # tokens, and the norm's weight and bias
    ) -> None:
        new = functools.partial(torch.empty, device="meta", dtype=dtype)
        W, R, n = C * 4, T * 256, 2
        tokens, weights = new(T, 1025, C), (new(W), new(W), new(d, W), new(d), new(d, d), new(d))
        if gradients:
            _, normed, stats, _ = tiles._launch(tokens, *weights, n, False, 1e-5, True)
            tiles._launch_gelu_gradient(new(R, d), new(R, d))
            _fold._launch_fold_norm_gradient(normed, tokens, weights[0], stats, n, False, *to)
        else:
            rows = new(R, dtype=torch.int64)
            tiles._launch_into(new(R, d), new(R, d), rows, tokens, *weights, n, False, 1e-5)

    def of(kernel: Kernel, name: str, run: Callable[[], Any], dot: bool = False) -> Case:
        configs = len(kernel.configs) if name == "bf16" else 1
        spills = {"sm_100": 64} if dot and configs > 1 else {}  # of 128 x 256 outputs
        if kernel is _fold.fold_norm_gradient:
            spills = {"sm_80": 8}  # by triton 3.6 alone
        elif kernel is _fold.fold_norm_gradient_wide:
            spills = {"sm_80": 32, "sm_90": 80, "sm_100": 96}
        found = Case(kernel, name, run, configs, dot, NVIDIA if dot else EVERY, spills)
        if dot:
            stage = lambda c: (c["BLOCK_M"] + c["BLOCK_N"]) * c["BLOCK_K"] * 2  # noqa: E731
            found = replace(found, stage=stage, blocks=2)
        elif kernel is _fold.fold_norm_gradient:
            found = replace(found, blocks=2)
        return replace(found, aligned="uneven" not in name or dot)

    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for gradients in (False, True):
            # So many tiles leave a last wave to be split.
            run = functools.partial(projected, dtype, gradients, 17 if name == "fp32" else 13)
            title = name + ", gradients" * gradients
            product = _product.product_exact if name == "fp32" else _product.product
            found += [
                of(_fold.fold_norm, title, run),
                of(product, title, run, name != "fp32"),
                of(_product.add_parts, title, run),
            ]
            if gradients:
                found += [
                    of(_fold.fold_norm_gradient, name, run),
                    of(tiles.gelu_gradient, name, run),
                ]
    odd = functools.partial(projected, torch.bfloat16, False, 1, 1020, 2040)
    found += [
        of(_fold.fold_norm, "bf16 uneven", odd),
        of(_product.product, "bf16 uneven", odd, True),
    ]
    for to, title in (((True, False), "tokens"), ((False, True), "norm")):
        wide = functools.partial(projected, torch.float32, True, 1, 3200, 64, to)
        found.append(of(_fold.fold_norm_gradient_wide, f"fp32 wide, {title}", wide))
    return [*found, of(_fold.fold_norm_wide, "fp32 wide", wide)]
