"""What runs on a CPU, timed by pytest-benchmark: `python -m pytest bench --benchmark-enable`."""

import pytest
import torch

import comemo_kernels as ops
from bench.cases import HEAD_DIM, HEADS, PROMPTS
from bench.positions import number_as_published
from bench.rotary import rotate_as_published

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
