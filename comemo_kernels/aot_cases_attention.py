"""The launches of attention that `comemo_kernels.aot` compiles."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from comemo_kernels import _attend_tma, _descriptors, attention
from comemo_kernels._op import Config
from comemo_kernels.aot_case import FLOAT8, HOPPER, NVIDIA, Case, empty

HALF, D = torch.bfloat16, 128
ROTATIONS = (("", None), (" one image", 1), (" several images", 4))


def attention_cases() -> Iterator[Case]:
    yield from _combine_cases()
    yield from _half_cases()
    yield from _exact_cases()
    if _descriptors.AVAILABLE:
        yield from _tma_cases()
    run = functools.partial(_attend, 1, 512, 3328, torch.float32, 1, True)
    # A stage is 16 keys of 128 bytes for 256 threads.
    narrow = frozenset(("k_ptr", "v_ptr"))
    yield Case(attention.attend_exact, "fp32 one image, fp8", run, chips=FLOAT8, narrow=narrow)


def _attend(B: int, N: int, M: int, dtype: torch.dtype, images: int | None, eight: bool) -> None:
    """One prompt a row; `images` None does not rotate queries."""
    q = empty(B, N, 16, D, dtype=dtype)
    k = empty(M, 16, D, dtype=torch.float8_e4m3fn if eight else dtype)
    rotation: list[Any] = [None] * 5
    if images is not None:
        table, ids = empty(4096, D // 2), empty(B, N, dtype=torch.int64)
        starts, biases = (empty(*shape, dtype=torch.int32) for shape in ((images,), (1, images)))
        rotation = [table, table, ids, starts, biases]
    scales = [empty(M // 256, 16)] * 2 if eight else [None] * 2
    spans = empty(B, 1, 2, dtype=torch.int64)
    attention._launch(q, k, k, spans, *rotation, *scales, 256 if eight else 1)


def _stage_of(size: int, config: Config) -> int:
    """Bytes of shared memory: keys and values of `size` bytes."""
    return 2 * config["BLOCK_N"] * D * size


def _combine_cases() -> Iterator[Case]:
    run: Callable[[], None] = functools.partial(_attend, 1, 1, 3328, HALF, None, False)
    yield Case(attention.combine, "bf16 decode", run, chips=NVIDIA)

    def early() -> None:
        config = next(config for config in attention.attend_one.configs if config["EARLY"])
        with attention.attend_one.using(config):
            _attend(1, 1, 3328, HALF, 1, False)

    if attention.combine_early is not attention.combine:
        yield Case(attention.combine_early, "bf16 decode", early, chips=NVIDIA[1:])


def _half_cases() -> Iterator[Case]:
    many, few, one = attention.attend_many, attention.attend_few, attention.attend_one
    for kernel, name, B, N, M in (
        (many, "prefill", 1, 4096, 13312),
        (many, "few queries", 1, 300, 13312),
        (few, "batch", 8, 1, 26624),
        (one, "decode", 1, 1, 3328),
    ):
        for kind, images in ROTATIONS:
            # On sm_100 the accumulator leaves tensor memory while queries are rotated again.
            spills = {"sm_100": 176} if kernel is many and images == 4 else {}
            eight_spills = {"sm_90": 56} | spills if spills else {}  # by triton 3.6 only
            for eight in (False, True):
                run = functools.partial(_attend, B, N, M, HALF, images, eight)
                title = f"bf16 {name}{kind}" + ", fp8" * eight
                chips = FLOAT8 if eight else NVIDIA
                configs = 1 if eight else len(kernel.configs)
                allowed = eight_spills if eight else spills
                # Without warp groups the compiler gives a thread 64 bits of float8 values.
                narrow = frozenset(("v_ptr",) if eight and kernel is not many else ())
                # A fused combination writes the few rows of a decode step.
                narrow |= {"out_ptr"} if kernel is one else set()
                case = Case(kernel, title, run, configs, kernel is many, chips, allowed)
                stage = functools.partial(_stage_of, 1 if eight else 2)
                blocks = 1 if kernel is many else 2
                yield replace(case, narrow=narrow, stage=stage, blocks=blocks)
        run = functools.partial(_attend, B, N, M, torch.float16, 1, False)
        yield Case(kernel, f"fp16 {name}", run, 1, kernel is many, NVIDIA)


def _exact_cases() -> Iterator[Case]:
    for kind, images in ROTATIONS:
        run = functools.partial(_attend, 1, 512, 3328, torch.float32, images, False)
        spills = {"sm_100": 8} if images == 4 else {}
        yield Case(attention.attend_exact, f"fp32{kind}", run, chips=NVIDIA, spills=spills)


def _tma_cases() -> Iterator[Case]:
    def by_tma(dtype: torch.dtype, N: int, images: int) -> None:
        q, k = empty(1, N, 16, D, dtype=dtype), empty(13312, 16, D, dtype=dtype)
        out, lse = empty(1, N, 16, D, dtype=dtype), empty(1, N, 16)
        spans, ids = empty(1, 1, 2, dtype=torch.int64), empty(1, N, dtype=torch.int64)
        table, biases = empty(4096, D // 2), empty(1, images, dtype=torch.int32)
        rotation = (table, table, ids, biases[0], biases)
        _attend_tma.launch(out, lse, q, k, k, spans, *rotation)

    kernel, turn = _attend_tma.attend_tma, _attend_tma.turn
    for dtype, name in ((HALF, "bf16"), (torch.float16, "fp16")):
        run = functools.partial(by_tma, dtype, 4096, 1)
        yield Case(kernel, f"{name} prefill", run, len(kernel.configs), True, HOPPER)
        yield Case(turn, f"{name} prefill", run, chips=HOPPER)
    run = functools.partial(by_tma, HALF, 4096, 4)
    yield Case(turn, "bf16 several images", run, chips=HOPPER)
