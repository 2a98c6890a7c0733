"""Code of the benchmarks that only runs on a GPU, on the virtual one."""

import copy
from unittest import mock

import pytest
import torch
import virtual_gpu
from conftest import GPU, SLOW
from timed import options_of

from bench import (
    attend,
    chat,
    decode,
    limits,
    measure,
    memory,
    mixin,
    positions,
    project,
    published,
    rotary,
    train,
    vision,
)
from bench.cases import PROMPTS, Prompt

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(GPU, reason="make gpu-bench runs them"),
]
WAYS = [way for way in chat.WAYS if "compile" not in way]  # it cannot trace a virtual GPU
OF_MODELS = {
    chat: ("--cols", "2", "--rows", "1", "--tokens", "2", "--batches", "2", "--ways", *WAYS),
    decode: ("--cols", "1", "--rows", "1", "--tokens", "2", "--vision-tiles", "1"),
    vision: ("--tiles", "2", "--at-once", "1"),
}
WAYS_OF = {
    chat: {"ours", *WAYS[:-1], chat.STAND_IN},
    decode: {"memory", "recomputed"},
    vision: {"ours, 1 at once"},
}
TINY = ("--sizes", "tiny", "--rounds", "1", "--no-compile")
OF_KERNELS = {
    attend: (*TINY, "--cases", "small_decode"),
    memory: (*TINY, "--tiles", "1", "--layers", "2"),
    mixin: (*TINY, "--cases", "decode_1"),
    positions: ("--cases", "one_image_3k", "--rounds", "1"),
    project: (*TINY, "--tiles", "1"),
    train: (*TINY, "--cases", "96_8_many"),
    rotary: ("--cases", "chat_1k", "--heads", "2B", "--layouts", "contiguous", *TINY[2:]),
}
ON_GPU_ONLY = {  # passes, if there are any
    attend: {"forward graph", "host"},
    memory: {"build"},
    mixin: {"layer graph", "norm_swiglu graph"},
    positions: {"forward"},
    project: {"forward graph"},
    rotary: {"host"},
    train: {"attention", "attention backward", "block"},
}
# Messages of a PyTorch without CUDA, and of a kernel launched without a GPU.
ABSENT = ("No viable backend", "_flash_attention_forward", "libcuda.so")


def of_one_call(timed):
    return lambda call, calls=0: timed(call, 1)


def attend_by_bounds(q, k, v, queries, keys, *longest):
    """`varlen_attn` of PyTorch, which needs a GPU: [N, H, D] on [M, H, D], by bounds [S + 1]."""
    for bounds, most in zip((queries, keys), longest, strict=True):
        assert bounds.dtype == torch.int32
        assert bounds.diff().max() == most
    counts, lengths = queries.diff().tolist(), keys.diff().tolist()
    samples = published.Samples(counts, lengths, (queries, keys))
    with mock.patch.object(published, "varlen_attn", None):
        return published.attend_samples(q[None], k[None], v[None], samples)[0]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(limits, "gemm_rate", lambda *_: 1e11)
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1)
    for name in ("host_us", "graph_us"):
        monkeypatch.setattr(measure, name, of_one_call(getattr(measure, name)))
    monkeypatch.setitem(PROMPTS, "chat_1k", Prompt([(128, [], 0)]))
    virtual_gpu.faults.clear()
    with virtual_gpu.present():
        yield
    assert not virtual_gpu.faults


@pytest.mark.parametrize("bench", OF_KERNELS, ids=lambda bench: bench.__name__)
def test_every_way_is_timed(gpu, bench, capsys, monkeypatch):
    if bench is train:
        monkeypatch.setattr(published, "varlen_attn", attend_by_bounds)
    options = options_of(bench, *OF_KERNELS[bench])
    rows = list(bench.run(options))
    passes = {row["pass"] for row in rows if row["way"].startswith("ours")}
    assert ON_GPU_ONLY[bench] <= passes
    assert not getattr(options, "failed", False)
    printed = capsys.readouterr().out.splitlines()
    left = [line for line in printed if "not timed" in line]
    assert all(any(name in line for name in ABSENT) for line in left), left


@pytest.mark.parametrize(
    "bench",
    # `bench.chat` on a CPU is tested in every run.
    [pytest.param(b, marks=SLOW if b is chat else ()) for b in OF_MODELS],
    ids=lambda bench: bench.__name__,
)
def test_models_run_to_the_end(gpu, bench, loaded, monkeypatch):
    model = copy.deepcopy(loaded[0]).to("cuda")
    monkeypatch.setattr(bench, "draw_model", lambda *_, **__: model)
    ways = {row["way"] for row in bench.run(options_of(bench, *OF_MODELS[bench]))}
    assert ways == WAYS_OF[bench]
