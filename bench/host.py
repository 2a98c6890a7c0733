"""Time of a call on the host without the driver's launch, on a machine without a GPU.

Tensors are on the CPU and the driver is replaced by one that launches nothing. Checks, dispatch,
allocation and the lookup of the compiled kernel are the same as on a GPU. `triton's launch` looks
the kernel up as Triton does by default, by specialising on every argument.
"""

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import comemo_kernels as ops
from bench import measure, progress
from bench.cases import HEAD_DIM, HEADS, PROMPTS
from comemo_kernels import QueryRotation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["2B"])


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    from comemo_kernels import _op, _rows_kernel, aot, attention, fused_linear, rotary

    if torch.cuda.is_available():
        raise SystemExit("python -m bench host: only without a GPU; with one use `bench rotary`")
    for name, launch in (
        ("rotary", rotary._launch),
        ("attend_", attention._launch_into),
        ("rows", _rows_kernel._launch),
    ):
        torch.library.impl(f"comemo::{name}", "CPU", _op._on_its_device(launch))
    driver.set_active(aot.OfflineDriver(aot.CHIPS["sm_90"].target))
    launches_nothing = property(lambda self: lambda *args: None)
    with (
        contextlib.ExitStack() as stack,
        # Functions, because calls of a mock would add to the time.
        mock.patch.object(CompiledKernel, "_init_handles", lambda self: None),  # noqa: PT008
        mock.patch.object(CompiledKernel, "run", launches_nothing),
        mock.patch.object(CompiledKernel, "function", None, create=True),
        torch.no_grad(),
    ):
        for module in (rotary, attention, fused_linear):
            stack.enter_context(mock.patch.object(module, "on_triton", lambda x: True))  # noqa: PT008
        chosen = [
            (f"{case} {heads}", *found)
            for heads in options.heads
            for case, found in cases(heads).items()
        ]
        for case, kernel, call in progress.each(chosen, lambda case: case[0]):
            row: dict[str, Any] = {"case": case, "pass": "host"}
            yield row | {"way": "ours", "host_us": measure.host_us(call, 3000)}
            with mock.patch.object(kernel, "key", lambda *_: None):  # noqa: PT008
                cost = measure.host_us(call, 3000)
            yield row | {"way": "triton's launch", "host_us": cost}


def cases(heads: str) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Name -> a kernel, and a call that launches it."""
    from comemo_kernels import _rows_kernel, attention, rotary

    new = functools.partial(torch.empty, dtype=torch.bfloat16)
    cos, sin = (t[0] for t in ops.rotary_table(torch.arange(4096)[None], HEAD_DIM))
    found: dict[str, tuple[Any, Callable[[], Any]]] = {}
    for case in ("decode_1", "decode_32", "chat_1k"):
        prompt, ids = PROMPTS[case], PROMPTS[case].position_ids("cpu")
        q, k = (new(prompt.batch, prompt.tokens, n, HEAD_DIM) for n in HEADS[heads])
        call = functools.partial(ops.apply_rotary, q, k, cos, sin, ids)
        found[case] = rotary.rotary_kernel, call
    # A decode step of one conversation about one image.
    G, d = HEADS[heads][0], HEADS[heads][0] * HEAD_DIM
    q, k = new(1, 1, G, HEAD_DIM), new(3328, G, HEAD_DIM)
    place = torch.zeros(1, dtype=torch.int32)
    rotation = QueryRotation(cos, sin, torch.tensor([[5]]), place, place[None])
    spans = torch.tensor([[[0, 3328]]])
    workspace = ops.attention_workspace(q, k)
    attend = functools.partial(ops.attend_spans, q, k, k, spans, rotation, workspace=workspace)
    found["attend_spans"] = attention.attend_one, attend
    call = functools.partial(ops.norm_linear, new(1, 1, d), new(d), new(d, d))
    return found | {"norm_linear": (_rows_kernel.one_weight_kernel, call)}
