"""Every kernel compiles for every architecture that is claimed, on a machine with no GPU."""

import importlib
import pkgutil

import pytest
import torch
from conftest import INTERPRET

if INTERPRET:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

import comemo_kernels
from comemo_kernels import aot, rotary
from comemo_kernels._op import Kernel

CASES = [(case, config) for case in aot.cases() for config in case.kernel.configs[: case.configs]]
LAUNCHES = [(case, config, chip) for case, config in CASES for chip in case.chips]


@pytest.mark.parametrize(
    ("case", "config", "chip"),
    LAUNCHES,
    ids=[
        f"{case.kernel.function.__name__} {case.name} {list(c.values())} {chip}"
        for case, c, chip in LAUNCHES
    ],
)
def test_compiles_within_the_limits(case, config, chip):
    try:
        row = aot.compile_case(case, config, chip)
    except Exception as error:
        if "ld.lld not found" not in str(error):
            raise
        pytest.skip("triton below 3.4 brings no linker for AMD")
    assert not row.faults


def test_no_kernel_is_forgotten():
    modules = pkgutil.iter_modules(comemo_kernels.__path__, "comemo_kernels.")
    held = [vars(importlib.import_module(module.name)).values() for module in modules]
    kernels = {value for values in held for value in values if isinstance(value, Kernel)}
    compiled = {(case.kernel, str(config)) for case, config in CASES}
    assert compiled == {(kernel, str(config)) for kernel in kernels for config in kernel.configs}


def test_accesses_are_as_wide_as_they_can_be():
    """8 bfloat16 a thread: 128 bits of q, k, cos and sin in every load and store of sm_90."""
    (case,) = [case for case in aot.cases() if case.name == "bf16 table"]
    for config in case.kernel.configs:
        row = aot.compile_case(case, config, "sm_90")
        elements = config["BLOCK_T"] * config["BLOCK_H"] * 64 // (32 * config["num_warps"])
        # x1, x2, y1 and y2, of q and of k; cos and sin once
        assert row.wide == (2 * 4 + 2) * elements // 8


@pytest.mark.parametrize("odd", ["q", "k", "table", "none"])
def test_what_is_not_aligned_is_not_taken_for_it(odd):
    """Rows of 132 elements begin where no 128 bits do; one such tensor narrows all accesses."""

    def rows(name, *shape):
        x = torch.empty(*shape, 132 if odd == name else 128, device="meta", dtype=torch.bfloat16)
        return x[..., :128]

    q, k, table = rows("q", 1, 64, 4), rows("k", 1, 64, 4), rows("table", 1, 64)[..., :64]
    case = aot.Case(
        rotary.rotary_kernel,
        odd,
        lambda: rotary._launch([q, k], table, table, None, 0, False, False, False, False),
    )
    row = aot.compile_case(case, rotary.rotary_kernel.config, "sm_90")
    assert bool(row.wide) == (odd == "none")


def test_lengths_and_heads_compile_nothing_new():
    """What decides a launch's key decides the compiled kernel, and a length is no part of it."""
    found = {}
    launch = rotary.rotary_kernel.launch

    def record(programs, key, *args):
        launch(programs, key, *args)
        found.setdefault(key, set()).add(id(compiled[-1]))

    table, other = torch.empty(64, 32), torch.empty(65)[1:].expand(4, 64)[:, :32]
    with pytest.MonkeyPatch.context() as patch, aot.offline(aot.CHIPS["sm_90"].target) as compiled:
        patch.setattr(rotary.rotary_kernel, "launch", record)

        def rotate(q, k, table, positions):
            rotary._launch([q, k], table, table, positions, 0, False, False, False, False)

        for N in range(1, 51):
            for B, H, G in ((1, 4, 1), (3, 16, 2), (2, 1, 1)):
                q, k = torch.empty(B, N, H, 64).half(), torch.empty(B, G, N, 64).half()
                rotate(q, k.transpose(1, 2), table, torch.zeros(B, N, dtype=torch.int64))
                odd = torch.empty(B, N, H, 6).half()
                rotate(odd, odd[:, :, :1], table[:, :3], torch.zeros(1, N, dtype=torch.int64))
        assert len(found) == 2
        assert None not in found
        assert all(len(kernels) == 1 for kernels in found.values())
        for q in (  # what a key must tell apart or leave to Triton
            torch.empty(2, 5, 4, 64).half(),
            torch.empty(2, 5, 4, 64),
            torch.empty(2, 5, 4, 65).half()[..., :64],
            torch.empty(2 * 5 * 4 * 64 + 1).half()[1:].view(2, 5, 4, 64),
            torch.empty(5, 4, 64).half(),
        ):
            for ids in (torch.int32, torch.int64):
                for chosen in (table, table.half(), other):
                    rotate(q, q, chosen, torch.zeros(q.shape[:-2], dtype=ids))
    for key, kernels in found.items():
        assert key is None or len(kernels) == 1


# --- the gate itself ---


@triton.jit
def _product_kernel(c_ptr, a_ptr, b_ptr, N: tl.constexpr, TENSOR_CORES: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    c = tl.dot(a, b) if TENSOR_CORES else (a * b).to(tl.float32)
    tl.store(c_ptr + offs, c)


@triton.jit
def _hoarding_kernel(x_ptr, N: tl.constexpr, num_steps):
    """Holds more than the registers of a block: loaded ahead of a loop, needed behind it."""
    offs = tl.arange(0, N)
    held, total = tl.load(x_ptr + offs), tl.load(x_ptr + offs)
    for i in range(num_steps):
        total += tl.load(x_ptr + i * N + offs)
    tl.store(x_ptr + offs, held + total)


def test_the_gate_sees_tensor_cores():
    def case(tensor_cores):
        x = torch.empty(64, 64, device="meta", dtype=torch.bfloat16)
        args = (x.float(), x, x, 64, tensor_cores)
        kernel = Kernel(_product_kernel, [{"num_warps": 4}])
        return aot.Case(kernel, "product", lambda: kernel.launch(1, None, *args), dot=True)

    row = aot.compile_case(case(True), {"num_warps": 4}, "sm_90")
    assert row.hgmma
    assert not row.faults
    row = aot.compile_case(case(False), {"num_warps": 4}, "sm_90")
    assert row.faults == ("no HGMMA",)


def test_the_gate_sees_spills():
    kernel = Kernel(_hoarding_kernel, [{"num_warps": 1}])
    x = torch.empty(9999, device="meta")
    case = aot.Case(kernel, "hoard", lambda: kernel.launch(1, None, x, 8192, 7))
    row = aot.compile_case(case, {"num_warps": 1}, "sm_90")
    assert row.spilled
    assert row.faults == (f"spills {row.spilled}",)
