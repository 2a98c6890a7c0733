"""Operations on a CPU, timed by pytest-benchmark: `python -m pytest bench --benchmark-enable`.

Each timed result is compared with that of another way.
"""

from unittest import mock

import pytest
import torch

import comemo_kernels as ops
from bench import measure, published
from bench.attend import AttendWays
from bench.cases import HEAD_DIM, HEADS, PROMPTS
from bench.memory import FLOAT8_BOUND, Build
from bench.positions import number_as_published
from bench.rotary import rotate_as_published
from bench.ways import Clock, Limits, relative_error

DTYPES = [torch.float32, torch.bfloat16]


def clock_of(dtype):
    return Clock("cpu", dtype, Limits(1e11, 1e10), rounds=1)


@pytest.fixture(params=DTYPES, ids=str, scope="module")
def rotary_inputs(request):
    """q, k, table and ids of one image, with the heads of the 2B model."""
    prompt, (H, G), dtype = PROMPTS["one_image_3k"], HEADS["2B"], request.param
    q, k = (torch.randn(1, prompt.tokens, heads, HEAD_DIM, dtype=dtype) for heads in (H, G))
    cos, sin = (t[0] for t in ops.rotary_table(torch.arange(512)[None], HEAD_DIM, 1e6))
    return q, k, cos, sin, prompt.position_ids("cpu")


def test_rotary(benchmark, rotary_inputs):
    q, k, cos, sin, ids = rotary_inputs
    found = benchmark(ops.apply_rotary, *rotary_inputs)
    wide_cos, wide_sin = published.widen((cos, sin), torch.float32)
    wanted = rotate_as_published(q, k, wide_cos, wide_sin, ids)
    for x, y in zip(found, wanted, strict=True):
        assert relative_error(x, y) < clock_of(q.dtype).bound


def test_rotary_as_published(benchmark, rotary_inputs):
    q, k, cos, sin, ids = rotary_inputs
    wide_cos, wide_sin = published.widen((cos, sin), q.dtype)
    found = benchmark(rotate_as_published, q, k, wide_cos, wide_sin, ids)
    wanted = ops.apply_rotary(q, k, cos, sin, ids)
    for x, y in zip(found, wanted, strict=True):
        assert relative_error(x, y) < clock_of(q.dtype).bound


def test_positions(benchmark):
    prompt = PROMPTS["one_image_3k"]
    image, attention = prompt.masks("cpu")
    found = benchmark(ops.rope_dhr_positions, image, attention, prompt.grids, tile_order="column")
    assert torch.equal(found, number_as_published(prompt, "cpu"))


def test_positions_as_published(benchmark):
    prompt = PROMPTS["one_image_3k"]
    found = benchmark(number_as_published, prompt, "cpu")
    image, attention = prompt.masks("cpu")
    wanted = ops.rope_dhr_positions(image, attention, prompt.grids, tile_order="column")
    assert torch.equal(found, wanted)


def test_packing_grids(benchmark):
    grids = PROMPTS["pack_16k"].grids
    found = benchmark(ops.ImageGrids.pack, grids)
    wanted = torch.cat([ops.image_position_ids(grid) for grid in grids])
    assert torch.equal(found.position_ids(len(wanted)), wanted)


@pytest.fixture(scope="module")
def attending(request):
    with mock.patch.object(measure, "cache_bytes", return_value=1):
        return AttendWays("2B", request.param[0], clock_of(request.param[1]))


@pytest.mark.slow  # inputs of these two take seconds
@pytest.mark.parametrize("way", ["ours", "ours no rotation"])
@pytest.mark.parametrize(
    "attending",
    [
        pytest.param((case, dtype), marks=pytest.mark.slow if dtype == torch.bfloat16 else ())
        for case in ("decode_1", "small_prompt", "small_pack")
        for dtype in DTYPES
    ],
    ids=str,
    indirect=True,
)
def test_attention(benchmark, attending, way):
    """Sizes of the 2B model; `decode_1` is a decode step of a conversation about one image."""
    found = benchmark(attending.our_ways()[way], 0)
    assert attending.error_of()(way, found) < clock_of(attending.dtype).bound


@pytest.fixture(scope="module")
def build():
    """One layer of the 2B model and the tokens of one tile."""
    return Build("2B", 1, 1, clock_of(torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["published", "library", "ours exact", "ours folded", "ours fp8"])
def test_memory(benchmark, build, way):
    found = benchmark(build.ways(compiled=False)[way], 0)
    bound = FLOAT8_BOUND if way == "ours fp8" else clock_of(torch.float32).bound
    assert build.error_of()(way, found) < bound
