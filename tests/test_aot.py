"""Every kernel compiles for every architecture that is claimed, on a machine with no GPU.

Here in the configuration that runs: each case for sm_90, float16 where bfloat16 has no such case,
and each kernel once for the other chips. `make aot` compiles all.
"""

import importlib
import pkgutil
import re
import runpy
import shutil

import pytest
import torch
from conftest import INTERPRET, SLOW

if INTERPRET:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

import comemo_kernels
from comemo_kernels import _attend_tma, _blocks, _descriptors, aot, aot_read, attention, rotary
from comemo_kernels import _memory_build_tma as _build_tma
from comemo_kernels import fused_linear as glue
from comemo_kernels._blocks import prefetch
from comemo_kernels._op import Kernel

CASES = aot.cases()
FIRST = {case.kernel: case for case in reversed(CASES)}  # of each kernel
NAMES = {(case.kernel, case.name) for case in CASES}


def is_twin(case):
    """Of a case in bfloat16, in float16."""
    dtype, rest = case.name[:4], case.name[4:]
    return dtype == "fp16" and (case.kernel, f"bf16{rest}") in NAMES


LAUNCHES = [
    (case, chip)
    for case in CASES
    for chip in case.chips
    if case is FIRST[case.kernel] or (chip == "sm_90" and not is_twin(case))
]


def is_slow(case, chip):
    """With `--all`, and in `make aot`: AMD, float32 beside other dtypes, what takes seconds."""
    long = case.kernel.function.__name__ in TILES and chip != "sm_90"
    long |= case.name.startswith("bf16 few queries") and "fp8" in case.name  # prompts have it, too
    return chip == "gfx942" or long or (case is not FIRST[case.kernel] and "fp32" in case.name)


# A launch of one compiles others besides.
TILES = {"_fold_norm_kernel", "_fold_norm_gradient_kernel", "_gelu_gradient_kernel"}
TILES |= {"_product_kernel", "_sum_kernel"}


@pytest.mark.parametrize(
    ("case", "chip"),
    [
        pytest.param(case, chip, marks=SLOW if is_slow(case, chip) else ())
        for case, chip in LAUNCHES
    ],
    ids=[f"{case.kernel.function.__name__} {case.name} {chip}" for case, chip in LAUNCHES],
)
def test_compiles_within_the_limits(case, chip):
    try:
        row = aot.compile_case(case, case.kernel.configs[0], chip)
    except Exception as error:
        if "ld.lld not found" not in str(error):
            raise
        pytest.skip("triton below 3.4 brings no linker for AMD")
    assert not row.faults


def test_no_kernel_is_forgotten():
    modules = pkgutil.iter_modules(comemo_kernels.__path__, "comemo_kernels.")
    held = [vars(importlib.import_module(module.name)).values() for module in modules]
    kernels = {value for values in held for value in values if isinstance(value, Kernel)}
    compiled = {(c.kernel, str(config)) for c in CASES for config in c.kernel.configs[: c.configs]}
    assert compiled == {(kernel, str(config)) for kernel in kernels for config in kernel.configs}
    assert aot.SMALL.keys() == {kernel.function.__name__ for kernel in kernels}


def compile_launch(case, chip="sm_90"):
    """The compiled kernel of a case, whole."""
    with aot.offline(aot.CHIPS[chip].target) as compiled:
        case.launch()
    name = case.kernel.function.__name__
    return next(kernel for kernel in compiled if kernel.metadata.name == name)


def case_of(kernel, name):
    return next(case for case in CASES if case.kernel is kernel and case.name == name)


def test_accesses_are_as_wide_as_they_can_be():
    """8 bfloat16 a thread: 128 bits of q, k, cos and sin in every load and store of sm_90."""
    case = case_of(rotary.rotary_kernel, "bf16 table")
    for config in case.kernel.configs:
        row = aot.compile_case(case, config, "sm_90")
        elements = config["BLOCK_T"] * config["BLOCK_H"] * 64 // (32 * config["num_warps"])
        # x1, x2, y1 and y2, of q and of k; cos and sin once
        assert row.wide == (2 * 4 + 2) * elements // 8


def test_ids_of_the_next_block_are_loaded_ahead_of_this_ones_rotation():
    """In the order of the code, in which a warp issues; what is loaded next are rows by these."""
    case = case_of(rotary.rotary_kernel, "bf16 int64 ids")
    for config in case.kernel.configs:
        with case.kernel.using(config):
            tensors = [access.tensor for access in aot_read.read_accesses(compile_launch(case))]
        of_thread = config["BLOCK_T"] * config["BLOCK_H"] * 8 // (32 * config["num_warps"])
        places = [i for i, tensor in enumerate(tensors) if tensor == "ids_ptrs"]
        assert len(places) == of_thread * (1 if config["STEPS"] == 1 else 2)
        assert places[-of_thread:] == list(range(places[-of_thread], places[-1] + 1))
        assert tensors[places[-1] + 1] == "cos_ptr"


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


@pytest.mark.skipif(not _descriptors.AVAILABLE, reason="triton below 3.4 makes no descriptors")
def test_warps_are_specialised():
    """Two groups of four multiply, a third loads; the compiler is silent where it does not."""
    case = case_of(_attend_tma.attend_tma, "bf16 prefill")
    kinds = {config["SPECIALIZE"]: config for config in reversed(case.kernel.configs)}
    assert len(kinds) == 2
    for special, config in kinds.items():
        kernel = aot.compile_kernel(case, config, "sm_90")
        assert kernel.metadata.num_warps == (12 if special else config["num_warps"])
        assert ("setmaxnreg" in kernel.asm["ptx"]) == bool(special)


@pytest.mark.skipif(not _blocks.NEW, reason="triton below 3.6 asks no L2, waits for no launch")
def test_keys_are_on_their_way_before_queries_are_rotated():
    """128 bytes of every one of 256 keys and values are asked for by a thread of 128 each."""
    case = case_of(attention.attend_one, "bf16 decode one image")
    for config in case.kernel.configs:
        with case.kernel.using(config):
            code = compile_launch(case).asm["ptx"]
        asked = [place.start() for place in re.finditer(r"prefetch\.global\.L2", code)]
        assert len(asked) == (2 * 2 * config["AHEAD"] // 128)
        copied = code.index("cp.async")
        assert all(place < copied for place in asked)
        # The table's rows are waited for: eight rotations are behind the last request.
        turned = [place.start() for place in re.finditer(r"fma\.rn\.f32", code)]
        assert not asked or asked[-1] < turned[0]
        assert ("griddepcontrol.launch_dependents" in code) == bool(config["EARLY"])
    kernel = compile_launch(case_of(attention.combine_early, "bf16 decode"))
    assert kernel.metadata.launch_pdl
    code = kernel.asm["ptx"]
    assert code.index("griddepcontrol.wait") < code.index("ld.global")


def test_tiles_of_the_build_follow_each_other_in_one_loop():
    """What a tile loads first comes under the products and the epilogue of the one before."""
    found = [case for case in CASES if case.kernel is _build_tma.project_tma]
    if not found:
        pytest.skip("triton below 3.4 makes no descriptors in a kernel")
    for config in found[0].kernel.configs:
        with found[0].kernel.using(config):
            code = compile_launch(found[0]).asm
        assert loops_around(code["ttgir"], "warp_group_dot ") == 1
        # Copies of two operands for the steps ahead of the loop and in it; while a product runs
        # the next one is begun.
        assert code["ptx"].count("cp.async.bulk.tensor") == 2 * config["num_stages"]
        assert code["ptx"].count("wgmma.wait_group.sync.aligned 1") == 1


def loops_around(code, operation):
    """Of the first of its kind, by how far lines are set in."""
    lines = code[: code.index(operation)].splitlines()
    found, inside = 0, len(lines.pop()) + 1
    for line in reversed(lines):
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth < inside and not line.lstrip().startswith(("}", "^")):
            found, inside = found + ("scf.for" in line or "scf.while" in line), depth
    return found


@pytest.mark.skipif(not _blocks.NEW, reason="triton below 3.6 asks for nothing ahead")
@pytest.mark.parametrize("verb", ["norm", pytest.param("swiglu", marks=SLOW)])
def test_weights_are_asked_for_ahead_of_a_norm(verb):
    """By all threads, before anything is loaded; it costs no registers to speak of."""
    kernel = glue.two_weights_kernel if verb == "swiglu" else glue.one_weight_kernel
    case = case_of(kernel, f"bf16 rows, {verb}")
    ahead = [config for config in kernel.configs if config["AHEAD"]]
    assert ahead
    for config in ahead:
        found = aot.compile_kernel(case, config, "sm_90")
        code, asked = found.asm["ptx"], "prefetch.global.L2"
        lines = config["AHEAD"] // 128 * config["BLOCK_O"] * (2 if verb == "swiglu" else 1)
        assert code.count(asked) == lines // (32 * config["num_warps"])
        assert code.rindex(asked) < re.search(r"\bld\.global|\bcp\.async", code).start()
        plain = aot.compile_kernel(case, config | {"AHEAD": 0}, "sm_90")
        usage, before = (aot_read.read_usage(k).registers for k in (found, plain))
        assert usage <= before + 4


def test_weights_stream_past_the_registers():
    """On sm_90 every step of every configuration is asynchronous copies of 128 bits, no less."""
    for verb, kernel in (
        ("norm", glue.one_weight_kernel),
        ("swiglu", glue.two_weights_kernel),
        ("residual, folded", glue.one_weight_kernel),
    ):
        case = case_of(kernel, f"bf16 rows, {verb}")
        for config in [config for config in kernel.configs if not config["AHEAD"]]:
            with kernel.using(config):
                code = compile_launch(case).asm["ptx"]
            steps = config["num_stages"]  # those ahead of the loop, and the loop's own
            weights = 2 if kernel is glue.two_weights_kernel else 1
            tiles = 16 + weights * config["BLOCK_O"]  # x and weights, in rows
            threads = 32 * config["num_warps"]
            wanted = steps * tiles * config["BLOCK_BYTES"] // (16 * threads)
            copies = [line for line in code.splitlines() if "cp.async.cg" in line]
            assert sum(", 0x10" in line for line in copies) == wanted, (case.name, config)


@pytest.mark.parametrize("chip", aot.CHIPS)
def test_l2_is_asked_ahead_on_nvidia_alone(chip):
    if chip == "gfx942" and not _blocks.NEW:
        pytest.skip("triton below 3.6 may bring no linker for AMD")
    kernel = Kernel(ask_l2, [{"BLOCK": 64, "num_warps": 1}])
    x = torch.empty(4096, device="meta")
    with aot.offline(aot.CHIPS[chip].target) as compiled:
        kernel.launch(1, x, x)
    code = compiled[0].asm.get("ptx", "")
    known = _blocks.NEW and chip != "gfx942"
    assert code.count("prefetch.global.L2") == (2 if known else 0)  # 64 pointers, 32 threads


@triton.jit
def ask_l2(y_ptr, x_ptr, BLOCK: tl.constexpr):
    ptrs = x_ptr + tl.arange(0, BLOCK) * 32
    prefetch(ptrs)
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(ptrs))


# --- the gate itself ---


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
    """A GEMM that skips layers, by a stride of which the compiler may not know what divides it."""
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
    """Triton's cache knows no places: another copy of the same text may have been compiled."""
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


def test_accesses_have_the_names_of_their_pointers():
    found = aot_read.read_accesses(compile_naming(_naming_kernel))
    assert set(found) == {("rows", 16), ("second_ptr", 4), ("y_ptr", 16)}
    assert sum(access.bytes for access in found if access.tensor == "second_ptr") == 16


@triton.jit(do_not_specialize=["num_steps"])
def _hoarding_kernel(x_ptr, num_steps, N: tl.constexpr):
    """Holds more than the registers of a block: loaded ahead of a loop, needed behind it."""
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
