"""What a call costs the host before the driver's own launch, on a machine without a GPU.

Tensors lie on the CPU and the driver is replaced by one that launches nothing: checks, dispatch,
allocation and the search for the compiled kernel are what they are on a GPU. `triton's launch`
finds the compiled kernel as Triton does for any kernel, by looking at every argument.
"""

import argparse
import functools
from typing import Any
from unittest import mock

import torch

import comemo_kernels as ops
from bench import measure
from bench.cases import HEAD_DIM, HEADS, PROMPTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["2B"])


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    from comemo_kernels import _op, aot, rotary

    if torch.cuda.is_available():
        raise SystemExit("python -m bench host: there is a GPU, `bench rotary` measures this")
    torch.library.impl("comemo::rotary", "CPU", _op._on_its_device(rotary._launch))
    driver.set_active(aot.OfflineDriver(aot.CHIPS["sm_90"].target))
    cos, sin = (t[0] for t in ops.rotary_table(torch.arange(4096)[None], HEAD_DIM))
    rows = []
    launches_nothing = property(lambda self: lambda *args: None)
    with (
        # Functions, for a mock would take part in what is measured.
        mock.patch.object(rotary, "on_triton", lambda x: True),  # noqa: PT008
        mock.patch.object(CompiledKernel, "_init_handles", lambda self: None),  # noqa: PT008
        mock.patch.object(CompiledKernel, "run", launches_nothing),
        mock.patch.object(CompiledKernel, "function", None, create=True),
        torch.no_grad(),
    ):
        for heads in options.heads:
            for case in ("decode_1", "decode_32", "chat_1k"):
                prompt, ids = PROMPTS[case], PROMPTS[case].position_ids("cpu")
                q, k = (
                    torch.empty(prompt.batch, prompt.tokens, n, HEAD_DIM, dtype=torch.bfloat16)
                    for n in HEADS[heads]
                )
                call = functools.partial(ops.apply_rotary, q, k, cos, sin, ids)
                row: dict[str, Any] = {"case": f"{case} {heads}", "pass": "host"}
                rows.append(row | {"way": "ours", "host_us": measure.host_us(call, 3000)})
                with mock.patch.object(rotary.rotary_kernel, "key", lambda *_: None):  # noqa: PT008
                    cost = measure.host_us(call, 3000)
                rows.append(row | {"way": "triton's launch", "host_us": cost})
    return rows
