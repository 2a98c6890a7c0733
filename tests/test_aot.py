"""Every kernel compiles for every supported architecture, on a machine with no GPU.

Here in the configuration that runs: each case for sm_90, float16 where there is no such case in
bfloat16, and each kernel once for the other chips. `make aot` compiles all.
"""

import importlib
import pkgutil

import pytest
import torch
from conftest import INTERPRET, SLOW

if INTERPRET:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

import comemo_kernels
from comemo_kernels import (
    _blocks,
    _memory_build_tma,
    _rows_kernel,
    aot,
    aot_read,
    attention,
    rotary,
)
from comemo_kernels._blocks import prefetch
from comemo_kernels._op import Kernel

CASES = aot.cases()
FIRST = {case.kernel: case for case in reversed(CASES)}  # of each kernel
NAMES = {(case.kernel, case.name) for case in CASES}


def is_twin(case):
    """Whether a case is in float16 and its twin in bfloat16."""
    dtype, rest = case.name[:4], case.name[4:]
    return dtype == "fp16" and (case.kernel, f"bf16{rest}") in NAMES


LAUNCHES = [
    (case, chip)
    for case in CASES
    for chip in case.chips
    if case is FIRST[case.kernel] or (chip == "sm_90" and not is_twin(case))
]


def is_slow(case, chip):
    """Only with `--all` and in `make aot`: AMD, float32 of several dtypes, what takes seconds."""
    kernel, name, first = case.kernel.function.__name__, case.name, case is FIRST[case.kernel]
    learning = LEARNING.get(kernel, (name,) if kernel.startswith("_gradient") else None)
    return (
        chip == "gfx942"
        or (not first and ("fp32" in name or "fp64" in name or "tma" in kernel))
        or (kernel in TILES and chip != "sm_90")
        or (learning is not None and (chip != "sm_90" or name not in learning))
        or (kernel == "_fold_norm_kernel" and name.endswith(("uneven", "gradients")))
        or (kernel == "_attend_kernel" and "fp8" in name and "several" not in name)
        or (kernel == "_rows_kernel" and "uneven" in name and "folded" in name)
        or name.startswith("bf16 few queries")  # as in prefill
    )


# Of the kernels of training, the cases that compile here.
LEARNING = {
    "_gradient_queries_kernel": ("bf16 gated", "bf16"),
    "_gradient_keys_kernel": ("bf16 several images", "bf16 gated"),
    "_rms_norm_gradient_kernel": ("bf16 2048", "bf16 4096"),
    "_swiglu_gradient_kernel": ("bf16 8192",),
    "_swiglu_kernel": ("bf16 8192",),
    "_turn_back_kernel": ("bf16",),
}
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
        pytest.skip("triton below 3.4 has no linker for AMD")
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
    """8 bfloat16 a thread: every load and store of q, k, cos and sin has 128 bits on sm_90."""
    case = case_of(rotary.rotary_kernel, "bf16 table")
    for config in case.kernel.configs:
        row = aot.compile_case(case, config, "sm_90")
        elements = config["BLOCK_T"] * config["BLOCK_H"] * 64 // (32 * config["num_warps"])
        # x1, x2, y1 and y2, of q and of k; cos and sin once
        assert row.wide == (2 * 4 + 2) * elements // 8


def test_ids_of_the_next_block_are_loaded_before_this_ones_rotation():
    """In the order of the code, in which a warp issues; the rows of these ids are loaded next."""
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
def test_unaligned_tensors_get_narrow_accesses(odd):
    """Rows of 132 elements are not aligned to 128 bits; one such tensor narrows all accesses."""

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


@pytest.mark.skipif(not _blocks.NEW, reason="triton below 3.6 has no dependent launch")
@pytest.mark.slow
def test_an_early_launch_waits_before_it_loads():
    case = case_of(attention.attend_one, "bf16 decode one image")
    for config in case.kernel.configs:
        with case.kernel.using(config):
            code = compile_launch(case).asm["ptx"]
        assert ("griddepcontrol.launch_dependents" in code) == bool(config["EARLY"])
    kernel = compile_launch(case_of(attention.combine_early, "bf16 decode"))
    assert kernel.metadata.launch_pdl
    code = kernel.asm["ptx"]
    assert code.index("griddepcontrol.wait") < code.index("ld.global")


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=SLOW)], ids=["first", "rest"])
def test_tiles_of_the_build_follow_each_other_in_one_loop(first):
    """The first loads of a tile overlap with the products and the epilogue of the tile before."""
    found = [case for case in CASES if case.kernel is _memory_build_tma.project_tma]
    if not found:
        pytest.skip("triton below 3.4 makes no descriptors in a kernel")
    configs = found[0].kernel.configs
    for config in configs[:1] if first else configs[1:]:
        with found[0].kernel.using(config):
            code = compile_launch(found[0]).asm
        assert loops_around(code["ttgir"], "warp_group_dot ") == 1
        # Copies of two operands, for the stages before the loop and in it. The next product is
        # issued while one runs.
        assert code["ptx"].count("cp.async.bulk.tensor") == 2 * config["num_stages"]
        assert code["ptx"].count("wgmma.wait_group.sync.aligned 1") == 1


def loops_around(code, operation):
    """The number of loops around the first such operation, by the indentation of lines."""
    lines = code[: code.index(operation)].splitlines()
    found, inside = 0, len(lines.pop()) + 1
    for line in reversed(lines):
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth < inside and not line.lstrip().startswith(("}", "^")):
            found, inside = found + ("scf.for" in line or "scf.while" in line), depth
    return found


@pytest.mark.parametrize(
    ("verb", "weights"),
    [
        ("norm", 1),
        pytest.param("swiglu", 2, marks=SLOW),
        pytest.param("residual, folded", 1, marks=SLOW),
    ],
)
def test_weights_bypass_the_registers(verb, weights):
    """On sm_90 every stage of every configuration is asynchronous copies of 128 bits."""
    one, two = _rows_kernel.one_weight_kernel, _rows_kernel.two_weights_kernel
    kernel = one if weights == 1 else two
    case = case_of(kernel, f"bf16 rows, {verb}")
    for config in kernel.configs:
        with kernel.using(config):
            code = compile_launch(case).asm["ptx"]
        steps = config["num_stages"]  # those before the loop, and the loop's own
        tiles = 16 + weights * config["BLOCK_O"]  # x and weights, in rows
        threads = 32 * config["num_warps"]
        wanted = steps * tiles * config["BLOCK_BYTES"] // (16 * threads)
        copies = [line for line in code.splitlines() if "cp.async.cg" in line]
        assert all(", 0x10" in line for line in copies)
        assert len(copies) >= wanted, (case.name, config)  # x may be copied twice


@pytest.mark.parametrize("chip", aot.CHIPS)
def test_prefetch_is_for_nvidia_only(chip):
    if chip == "gfx942" and not _blocks.NEW:
        pytest.skip("triton below 3.6 may have no linker for AMD")
    kernel = Kernel(prefetching, [{"BLOCK": 64, "num_warps": 1}])
    x = torch.empty(4096, device="meta")
    with aot.offline(aot.CHIPS[chip].target) as compiled:
        kernel.launch(1, x, x)
    code = compiled[0].asm.get("ptx", "")
    known = _blocks.NEW and chip != "gfx942"
    assert code.count("prefetch.global.L2") == (2 if known else 0)  # 64 pointers, 32 threads


@triton.jit
def prefetching(y_ptr, x_ptr, BLOCK: tl.constexpr):
    ptrs = x_ptr + tl.arange(0, BLOCK) * 32
    prefetch(ptrs)
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(ptrs))
