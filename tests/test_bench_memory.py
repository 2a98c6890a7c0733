"""Benchmarks of the image memory: cases, rows, limits, and wrong results that are not timed."""

import pytest
import torch
from timed import COPY, GEMM, clock, rows_of

import comemo_kernels as ops
from bench import attend, measure, memory, mixin
from bench.cases import PROMPTS
from bench.readings import READINGS, SMALL
from bench.ways import Limits, Work

pytestmark = pytest.mark.usefixtures("made_up_limits")

# --- cases ---


def test_readings_have_the_sizes_of_their_names():
    assert READINGS["prefill_8k_13k"].pairs == 8192 * 13312
    assert READINGS["few_500_40k"].shape == (1, 500)
    assert sum(READINGS["few_500_40k"].sizes) == 39936
    packed = READINGS["pack_16k"]
    assert packed.shape == (1, PROMPTS["pack_16k"].tokens)
    assert sum(packed.sizes) == 46 * 256
    assert packed.lengths.count(0) == 1
    spans = packed.spans("cpu")[0]
    assert (spans[:, 1] - spans[:, 0]).sum() == packed.pairs
    assert READINGS["decode_32"].shape == (32, 1)
    assert sum(READINGS["decode_32"].sizes) == 32 * sum(READINGS["decode_32_shared"].sizes)
    assert READINGS["decode_32_shared"].pairs == READINGS["decode_32"].pairs
    assert not READINGS["decode_8_ragged"].uniform


@pytest.mark.parametrize("case", [*SMALL, "decode_8_ragged", "decode_32_shared", "pack_16k"])
def test_spans_and_places_fit_the_memory(case):
    reading = {**READINGS, **SMALL}[case]
    ids, starts, biases = reading.places("cpu")
    spans = reading.spans("cpu")
    assert spans.min() >= 0
    assert spans.max() == len(ids) == sum(reading.sizes)
    held = ops.ImageMemory.from_media(torch.zeros(len(ids), 2), ids, [len(ids)], reading.sizes)
    assert (spans.dtype, ids.dtype) == (
        held.spans.dtype,
        held.ids.dtype,
    )  # the same variant of the kernel
    assert biases.shape == (1, len(starts))
    assert reading.positions("cpu").shape == reading.shape


# --- rows ---


WAYS = {
    "small_pack": {"dense mask"},
    "small_prompt": {"sdpa flash", "sdpa flash + rotary", "cached", "published"},
    "small_decode": {"ours fp8", "sdpa flash", "sdpa flash + rotary", "cached", "published"},
    "small_shared": {
        "ours fp8",
        "sdpa flash",
        "sdpa flash + rotary",
        "sdpa flash folded",
        "cached",
        "published",
    },
    "small_ragged": {"ours fp8", "dense mask", "cached"},
}


def test_attention_rows():
    rows, failed = rows_of(attend, "--sizes", "tiny")
    assert not failed
    for case, wanted in WAYS.items():
        found = {row["way"] for row in rows if row["case"] == f"{case} tiny"}
        assert found == {"ours", "ours no rotation", *wanted}


def test_attention_relative_to_the_limit():
    """48 queries read 512 keys of two heads, in float32."""
    rows, _ = rows_of(attend, "--sizes", "tiny", "--cases", "small_prompt")
    flops = 4 * 48 * 512 * 2 * 128
    moved = 4 * 2 * 128 * (2 * 48 + 2 * 512)
    least = 1e6 * max(flops / GEMM, moved / COPY)
    for row in rows:
        assert row["tflop_s"] == pytest.approx(flops / row["us"] / 1e6)
        assert row["gb_s"] == pytest.approx(moved / row["us"] / 1e3)
        assert row["of_limit"] == pytest.approx(least / row["us"])


def test_the_limit_is_the_slower_of_gemm_and_copy():
    limits = Limits(GEMM, COPY)
    assert limits.us(Work(flops=2e12, moved=1)) == pytest.approx(2e6)
    assert limits.us(Work(flops=1, moved=3e10)) == pytest.approx(3e6)
    assert clock().reached(4e6, Work(2e12, 1e10))["of_limit"] == pytest.approx(0.5)


def test_several_input_sets_only_for_memory_bound_work(monkeypatch):
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1000)
    assert clock().sets(Work(flops=1e9, moved=100)) == 1
    assert clock().sets(Work(flops=1, moved=100)) == 10
    assert clock().sets(Work(flops=1, moved=10**6)) == 2


def test_memory_rows():
    words = ("--sizes", "tiny", "--tiles", "2", "--layers", "2", "--no-compile")
    rows, failed = rows_of(memory, *words)
    assert not failed
    assert {row["case"] for row in rows} == {"tiny 2 tiles, 2 layers"}
    ours = {"ours exact", "ours folded", "ours fp8"}
    assert {row["way"] for row in rows} == {"published", "library", *ours}
    flops = 2 * 512 * 64 * (2 * 2 * 2 * 128)
    for row in rows:
        assert row["tflop_s"] == pytest.approx(flops / row["us"] / 1e6)


def test_mixin_rows():
    words = ("--sizes", "tiny", "--cases", "decode_1", "--no-compile")
    rows, failed = rows_of(mixin, *words)
    assert not failed
    layer = {row["way"] for row in rows if row["pass"] == "layer"}
    assert layer == {"ours", "published", "cached"}
    parts = [row for row in rows if row["pass"] != "layer"]
    verbs = {row["pass"].split()[0] for row in parts}
    assert verbs == {"norm_linear", "norm_swiglu", "gated_residual"}
    for row in parts:
        if torch.cuda.is_available():
            assert row["of_copy"] == pytest.approx(row["gb_s"] * 1e9 / COPY)
        else:
            least = max(row["gb_s"] * 1e9 / COPY, row["tflop_s"] * 1e12 / GEMM)
            assert row["of_limit"] == pytest.approx(least)
    swiglu = next(row for row in parts if row["pass"] == "norm_swiglu")
    assert swiglu["gb_s"] == pytest.approx(2 * 96 * 64 * 4 / swiglu["us"] / 1e3)


# --- wrong ways are not timed ---


def test_a_wrong_way_of_ours_is_not_timed_and_the_next_case_is(monkeypatch, capsys):
    right = ops.attend_spans

    def wrong(q, k, v, *others, **options):
        out = right(q, k, v, *others, **options)
        return 1.01 * out if q.shape[0] == 2 else out

    monkeypatch.setattr(ops, "attend_spans", wrong)
    rows, failed = rows_of(attend, "--sizes", "tiny", "--cases", "small_decode", "small_shared")
    assert failed
    assert {row["case"] for row in rows} == {"small_shared tiny"}
    assert "ours is not timed: relative error 1.0e-02" in capsys.readouterr().err


def test_outputs_of_empty_spans_must_be_zero(monkeypatch):
    right = ops.attend_spans
    monkeypatch.setattr(ops, "attend_spans", lambda *given, **named: right(*given, **named) + 1e-9)
    rows, failed = rows_of(attend, "--sizes", "tiny", "--cases", "small_pack")
    assert failed
    assert rows == []


def test_a_wrong_foreign_way_is_left_out(monkeypatch, capsys):
    right = attend.published.build
    monkeypatch.setattr(attend.published, "build", lambda *given: right(*given)[::-1])
    rows, failed = rows_of(attend, "--sizes", "tiny", "--cases", "small_decode")
    assert not failed
    assert {row["way"] for row in rows} == {"ours", "ours no rotation", *WAYS["small_decode"]} - {
        "published"
    }
    assert "published is not timed" in capsys.readouterr().out


def test_a_wrong_memory_is_not_timed(monkeypatch):
    right = ops.build_memory

    def wrong(media, *others, **options):
        right(media, *others, **options)
        if len(media) > 256:  # not in the small case in which every element is compared
            others[5][0][-1] = 0

    monkeypatch.setattr(ops, "build_memory", wrong)
    words = ("--sizes", "tiny", "--tiles", "2", "--layers", "1", "--no-compile")
    assert rows_of(memory, *words) == ([], True)


def test_a_wrong_layer_is_not_timed(monkeypatch):
    """Attention is a large enough part of the layer's output for the comparison."""
    right = ops.attend_gated
    monkeypatch.setattr(ops, "attend_gated", lambda x, q, *given: right(x, -q, *given))
    assert rows_of(mixin, "--sizes", "tiny", "--cases", "decode_1", "--no-compile") == ([], True)
