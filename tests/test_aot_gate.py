"""The gate of ahead-of-time compilation itself: what it passes, fails and reads in PTX."""

import importlib
import runpy
import shutil
import sys
import types

import pytest
import torch
from conftest import INTERPRET

if INTERPRET:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

from comemo_kernels import aot, aot_read
from comemo_kernels._op import Kernel


@triton.jit(do_not_specialize=["num_layers", "stride", "width"])
def _product_kernel(
    c_ptr,  # [128, N]
    a_ptr,  # [num_layers, 128, width]
    b_ptr,  # [N, width]
    num_layers,
    stride,
    width,
    HINTED: tl.constexpr,
    N: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    """A GEMM that skips layers by a stride; only a hint tells the compiler its divisor."""
    offs_m, offs_n, offs_k = tl.arange(0, 128)[:, None], tl.arange(0, N), tl.arange(0, 64)
    layer = (tl.program_id(0) % num_layers) * stride
    width = width // 8 * 8
    if HINTED:
        layer = tl.multiple_of(layer, 8)
    acc = tl.zeros([128, N], tl.float32)
    for i in range(tl.cdiv(width, 64)):
        a = tl.load(a_ptr + layer + offs_m * width + i * 64 + offs_k[None, :])
        b = tl.load(b_ptr + offs_n[:, None] * width + i * 64 + offs_k[None, :])
        if TENSOR_CORES:
            acc = tl.dot(a, b.T, acc)
        else:
            acc += tl.sum(a.to(tl.float32), 1)[:, None] + tl.sum(b.to(tl.float32), 1)[None, :]
    tl.store(c_ptr + offs_m * N + offs_n[None, :], acc)


def product_faults(hinted=True, N=128, tensor_cores=True, blocks=1, **allowed):
    config = {"num_warps": 8, "num_stages": 3}
    kernel = Kernel(_product_kernel, [config])
    x = torch.empty(4, 128, 2048, device="meta", dtype=torch.bfloat16)
    args = (x[0].float(), x, x[0], 4, 128 * 2048, 2048, hinted, N, tensor_cores)

    def stage(config):
        return (128 + N) * 64 * 2

    run = lambda: kernel.launch(4, *args)  # noqa: E731
    case = aot.Case(kernel, "product", run, dot=True, stage=stage, blocks=blocks, **allowed)
    return aot.compile_case(case, config, "sm_90").faults


def test_the_gate_passes_what_is_right():
    assert product_faults(blocks=2) == ()


def test_the_gate_sees_a_hint_that_was_lost():
    """Loads of 16 bits are not asynchronous either: no pipeline."""
    narrow, pipeline = product_faults(hinted=False)
    assert narrow == "narrow accesses: a_ptr by 16 bits"
    assert pipeline.startswith("no pipeline: 3 steps take 98304 bytes, got ")
    allowed = frozenset(("a_ptr",))
    assert product_faults(hinted=False, narrow=allowed) == (pipeline,)
    assert product_faults(hinted=False, aligned=False) == (pipeline,)


def test_the_gate_sees_tensor_cores():
    assert "no HGMMA" in product_faults(tensor_cores=False)


def test_the_gate_counts_what_fits_a_multiprocessor():
    assert product_faults(N=256, blocks=2) == ("1 blocks fit a multiprocessor, wanted 2",)


@pytest.mark.parametrize(
    ("chip", "registers", "shared", "warps", "blocks"),
    [
        ("sm_90", 128, 98304, 8, 2),  # both registers and shared memory
        ("sm_90", 129, 0, 8, 1),  # registers come by eight for each thread
        ("sm_90", 255, 0, 4, 2),
        ("sm_90", 64, 0, 4, 8),
        ("sm_90", 32, 115 * 1024, 4, 1),  # shared memory: 1 KiB more for each block
        ("sm_80", 32, 81 * 1024, 4, 2),
        ("sm_80", 32, 82 * 1024, 4, 1),
        ("sm_90", 16, 0, 32, 2),  # threads
        ("sm_90", 16, 0, 1, 32),
        ("gfx942", 64, 0, 4, 0),
    ],
)
def test_blocks_of_a_multiprocessor(chip, registers, shared, warps, blocks):
    assert aot.count_blocks(chip, registers, shared, warps) == blocks


@triton.jit(do_not_specialize=["n"])
def _naming_kernel(y_ptr, first_ptr, second_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    rows = first_ptr + offs
    first = tl.load(
        rows,
        mask=offs < BLOCK,
    )
    second = tl.load(second_ptr + offs * n, mask=offs < n)
    tl.store(y_ptr + offs, first + second)


def compile_naming(function):
    kernel = Kernel(function, [{"num_warps": 1}])
    x = torch.empty(9999, device="meta")
    with aot.offline(aot.CHIPS["sm_90"].target) as compiled:
        kernel.launch(1, x, x, x, 3, 128)
    return compiled[0]


def test_names_come_from_the_sources_that_are_here(tmp_path, monkeypatch):
    """Triton's cache does not go by file names: another copy of the text may have been compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    head, made = "import triton\nimport triton.language as tl\n\n\n", 'do_not_specialize=["n"]'
    text = f"{head}{_naming_kernel.src}\n\nkernel = triton.jit(_naming_kernel, {made})\n"
    compiled = {}
    for copy in ("gone", "here"):
        path = tmp_path / copy / "naming.py"
        path.parent.mkdir()
        path.write_text(text)
        compiled[copy] = compile_naming(runpy.run_path(str(path))["kernel"])
    assert compiled["here"].asm["ptx"] == compiled["gone"].asm["ptx"]
    shutil.rmtree(tmp_path / "gone")
    names = {access.tensor for access in aot_read.read_accesses(compiled["here"])}
    assert names == {"rows", "second_ptr", "y_ptr"}


HELPER = '''"""Lines that the kernel's file does not have.

A helper loads from a pointer of its own name.
"""

import triton
import triton.language as tl


@triton.jit
def load(helped_ptr, offs):
    return tl.load(helped_ptr + offs)
'''
CALLER = """import triton
import triton.language as tl
from {helper} import load


@triton.jit(do_not_specialize=["n"])
def _calling_kernel(y_ptr, first_ptr, second_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    first = load(first_ptr, offs)
    rows = second_ptr + offs
    second = tl.load(rows)
    tl.store(y_ptr + offs, first + second)
"""


def test_names_survive_files_that_were_renamed(tmp_path, monkeypatch):
    """Code in Triton's cache keeps the old names of a kernel's file and of its helper's file."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    compiled = {}
    for when in ("before", "after"):
        caller, helper = f"caller_{when}", f"helper_{when}"
        (tmp_path / f"{helper}.py").write_text(HELPER)
        (tmp_path / f"{caller}.py").write_text(CALLER.format(helper=helper))
        importlib.invalidate_caches()
        compiled[when] = compile_naming(importlib.import_module(caller)._calling_kernel)
        for name in (caller, helper):
            monkeypatch.delitem(sys.modules, name)
            if when == "before":
                (tmp_path / f"{name}.py").unlink()
    assert compiled["after"].asm["ptx"] == compiled["before"].asm["ptx"]
    assert "caller_before.py" in compiled["after"].asm["ptx"]
    found = set(aot_read.read_accesses(compiled["after"]))
    assert found == {("helped_ptr", 16), ("rows", 16), ("y_ptr", 16)}


def test_code_of_unknown_sources_is_an_error():
    compiled = compile_naming(_naming_kernel)
    for line in (1, 10**6):  # of no function of the kernel
        code = f'.file 9 "/gone/strange.py"\n.loc 9 {line} 1\n{compiled.asm["ptx"]}'
        strange = types.SimpleNamespace(
            src=compiled.src, metadata=compiled.metadata, asm={"ptx": code}
        )
        with pytest.raises(
            ValueError, match=r"_naming_kernel: .*names /gone/strange\.py, which is"
        ):
            aot_read.read_accesses(strange)


def test_accesses_have_the_names_of_their_pointers():
    found = aot_read.read_accesses(compile_naming(_naming_kernel))
    assert set(found) == {("rows", 16), ("second_ptr", 4), ("y_ptr", 16)}
    assert sum(access.bytes for access in found if access.tensor == "second_ptr") == 16


@triton.jit(do_not_specialize=["num_steps"])
def _hoarding_kernel(x_ptr, num_steps, N: tl.constexpr):
    """Needs more than the registers of a block: loaded before a loop, used after it."""
    offs = tl.arange(0, N)
    held, total = tl.load(x_ptr + offs), tl.load(x_ptr + offs)
    for i in range(num_steps):
        total += tl.load(x_ptr + i * N + offs)
    tl.store(x_ptr + offs, held + total)


def test_the_gate_sees_spills():
    kernel = Kernel(_hoarding_kernel, [{"num_warps": 1}])
    x = torch.empty(9999, device="meta")
    case = aot.Case(kernel, "hoard", lambda: kernel.launch(1, x, 7, 8192))
    row = aot.compile_case(case, {"num_warps": 1}, "sm_90")
    assert row.spilled
    assert row.faults == (f"spills {row.spilled}",)
