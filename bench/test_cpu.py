"""What runs on a CPU, timed by pytest-benchmark: `python -m pytest bench --benchmark-enable`."""

import pytest
import torch

import comemo_kernels as ops
from bench import measure
from bench.attend import AttendWays
from bench.cases import HEAD_DIM, HEADS, PROMPTS
from bench.memory import Build
from bench.positions import number_as_published
from bench.rotary import rotate_as_published
from bench.ways import Clock, Limits

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def rotary_inputs(request):
    """q, k, table and ids of one picture at the 2B model's heads."""
    prompt, (H, G), dtype = PROMPTS["one_image_3k"], HEADS["2B"], request.param
    q, k = (torch.randn(1, prompt.tokens, heads, HEAD_DIM, dtype=dtype) for heads in (H, G))
    cos, sin = (t[0] for t in ops.rotary_table(torch.arange(512)[None], HEAD_DIM, 1e6))
    return q, k, cos, sin, prompt.position_ids("cpu")


def test_rotary(benchmark, rotary_inputs):
    benchmark(ops.apply_rotary, *rotary_inputs)


def test_rotary_as_published(benchmark, rotary_inputs):
    q, k, cos, sin, ids = rotary_inputs
    wide_cos, wide_sin = (torch.cat([t, t], -1).to(q.dtype) for t in (cos, sin))
    benchmark(rotate_as_published, q, k, wide_cos, wide_sin, ids)


def test_positions(benchmark):
    prompt = PROMPTS["one_image_3k"]
    image, attention = prompt.masks("cpu")
    benchmark(ops.rope_dhr_positions, image, attention, prompt.grids, tile_order="column")


def test_positions_as_published(benchmark):
    benchmark(number_as_published, PROMPTS["one_image_3k"], "cpu")


def test_packing_grids(benchmark):
    benchmark(ops.ImageGrids.pack, PROMPTS["pack_16k"].grids)


def clock_of(dtype):
    return Clock("cpu", dtype, Limits(1e11, 1e10), rounds=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["decode_1", "small_prompt", "small_pack"])
@pytest.mark.parametrize("way", ["ours", "ours no rotation"])
def test_attention(benchmark, case, way, dtype, monkeypatch):
    """Of the 2B model; the first is a step of a conversation on one picture."""
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1)
    benchmark(AttendWays("2B", case, clock_of(dtype)).our_ways()[way], 0)


@pytest.mark.parametrize("way", ["published", "library", "ours exact", "ours folded", "ours fp8"])
def test_memory(benchmark, way):
    """One layer of the 2B model, the tokens of one tile."""
    build = Build("2B", 1, 1, clock_of(torch.float32))
    benchmark(build.ways(compiled=False)[way], 0)
