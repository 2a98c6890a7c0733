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
from comemo_kernels import _specialized, aot, attention, build, rotary
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


def test_warps_are_specialised():
    """Two groups of four multiply, a third loads; the compiler is silent where it does not."""
    found = [case for case in aot.cases() if case.kernel is _specialized.attend_specialized]
    if not found:
        pytest.skip("triton below 3.4 makes no descriptors in a kernel")
    with aot.offline(aot.CHIPS["sm_90"].target) as compiled:
        found[0].launch()
    assert compiled[-1].metadata.num_warps == 12
    assert "USETMAXREG" in aot._read_nvidia(compiled[-1])[2]


def test_no_length_compiles_attention_anew():
    """50 lengths of queries and memory, a batch, other layouts: a kernel for each block size."""
    found = {}
    kernels = (attention.attend_many, attention.attend_few, attention.attend_one)
    with pytest.MonkeyPatch.context() as patch, aot.offline(aot.CHIPS["sm_90"].target) as compiled:
        for kernel in (*kernels, attention.combine):

            def record(programs, key, *args, kernel=kernel, launch=kernel.launch):
                launch(programs, key, *args)
                found.setdefault((id(kernel), key), set()).add(id(compiled[-1]))

            patch.setattr(kernel, "launch", record)

        def attend(B, N, M, H=4, G=2, images=2, ids=torch.int64, width=64):
            q, kv = torch.empty(B, N, H, width).half(), torch.empty(M, 2, G, width).half()
            q, kv = q[..., :64], kv[..., :64]
            spans, table = torch.zeros(B, 1, 2, dtype=ids), torch.empty(999, 32)
            rotation = [table, table, torch.zeros(B, N, dtype=ids)]
            rotation += [torch.zeros(images).int(), torch.zeros(B, images).int()]
            attention._launch(q, kv[:, 0], kv[:, 1], spans, *rotation, None, None, 1)

        for i in range(1, 51):
            attend(1, 1, 64 * i)
            attend(1, 1, 64 * i, images=i + 1)
            attend(3, 1 + i % 8, 17 * i, H=8, G=8)
            attend(2, 90 + i, 33 * i, images=2 + i)
        assert None not in {key for _, key in found}
        # Not split, split; one block size is never split here, and one combines.
        assert len(found) <= 2 * 3 + 1
        for images in (1, 2):
            for ids in (torch.int32, torch.int64):
                for width in (64, 67):
                    attend(1, 1, 256, images=images, ids=ids, width=width)
                    attend(1, 90, 256, images=images, ids=ids, width=width)
    for (_, key), programs in found.items():
        assert key is None or len(programs) == 1


def test_no_length_compiles_the_build_anew():
    found = {}
    with pytest.MonkeyPatch.context() as patch, aot.offline(aot.CHIPS["sm_90"].target) as compiled:
        for kernel in (build.norm_media, build.project_media, build.scale_memory):

            def record(programs, key, *args, kernel=kernel, launch=kernel.launch):
                launch(programs, key, *args)
                found.setdefault((id(kernel), key), set()).add(id(compiled[-1]))

            patch.setattr(kernel, "launch", record)

        def memory(M, L, exact, row=0, d=128, eight=False):
            dtype = torch.float8_e4m3fn if eight else torch.float16
            held = [torch.empty(row + M + 16, 2, 32, dtype=dtype, device="meta")] * L
            weights = [torch.empty(128, d, device="meta").half()] * L
            norms = [torch.empty(d, device="meta").half()] * L if exact else []
            media, table = torch.empty(M, d, device="meta").half(), torch.empty(99, 16)
            scales = [torch.empty(M, 2, device="meta")] * L if eight else []
            ids = torch.zeros(M).int()
            arguments = (media, weights, norms, table, table, ids, held, held, scales, scales)
            build._launch(*arguments, 16 if eight else 1, row, 1e-5)

        patch.setattr(build, "to_device", lambda values, _: values)
        for i in range(1, 51):
            for exact in (True, False):
                memory(16 * i, 1 + i % 7, exact, row=16 * (i % 3))
        assert len(found) == 4
        memory(64, 2, True, eight=True)
        memory(80, 3, False, row=32, eight=True)
        memory(64, 2, True, d=132)
        memory(64, 2, False, d=100)
    for (_, key), programs in found.items():
        assert key is None or len(programs) == 1


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
