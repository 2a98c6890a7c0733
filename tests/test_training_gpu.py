"""A training step of a mixin block: no sync of host and GPU, and the same bits every time."""

import pytest
import torch
import virtual_gpu
from conftest import GPU

import comemo_kernels as ops
from bench.packs import SMALL_PACKS
from bench.train_attention import AttentionStep
from bench.train_block import BlockStep
from bench.ways import Clock, Limits

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = ("96_1_many", "96_8_one", "96_8_many", "96_1_none")


def step_of(case, dtype):
    clock = Clock("cuda", dtype, Limits(1e12, 1e10), rounds=1)
    return BlockStep("tiny", SMALL_PACKS[case], clock).steps(False)["ours"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_step_does_not_wait_for_the_gpu(case, dtype):
    step = step_of(case, dtype)
    wanted = step.run()  # the first call may compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # of all threads, those of the backward too
    try:
        found = step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["1k_1_many", "1k_8_many"])
def test_gradients_of_attention_have_the_same_bits(case):
    clock = Clock("cuda", torch.bfloat16, Limits(1e12, 1e10), rounds=1)
    step = AttentionStep("small", case, SMALL_PACKS[case], clock).steps(False)["ours"]
    wanted = step.run()
    unequal = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for x, y in zip(step.run(), wanted, strict=True):
            unequal += (x != y).sum()
    assert unequal == 0


@pytest.mark.skipif(GPU, reason="a real one is tested above")
@pytest.mark.parametrize("case", CASES)
def test_a_step_can_be_captured_on_a_virtual_gpu(case):
    """A capture refuses what waits for the GPU."""
    virtual_gpu.faults.clear()
    with virtual_gpu.present():
        step = step_of(case, torch.float32)
        ops.capture(step.run, "cuda", warmups=1)
    assert not virtual_gpu.faults
