"""Benchmarks of the image memory: cases that are what they say, rows, limits, wrong ways."""

import argparse
import json
import math
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import comemo_kernels as ops
from bench import __main__ as command
from bench import attend, measure, memory, mixin, project, store, vision, ways
from bench.cases import PROMPTS
from bench.readings import READINGS, SMALL, Reading
from bench.ways import Clock, Limits, Work
from comemo_kernels._op import Kernel

GEMM, COPY = 1e12, 1e10  # of the machine that the fixture makes up


@pytest.fixture(autouse=True)
def made_up_machine(monkeypatch):
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: COPY)
    monkeypatch.setattr(measure, "gemm_rate", lambda *_: GEMM)
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1)


def options_of(module, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([*words, "--rounds", "1"])


def rows_of(module, *words):
    options = options_of(module, *words)
    rows = list(module.run(options))
    for row in rows:
        numbers = [value for value in row.values() if not isinstance(value, str)]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        assert row["low_us"] <= row["us"] <= row["high_us"]
    return rows, getattr(options, "failed", False)


def clock(rounds=1):
    return Clock("cpu", torch.float32, Limits(GEMM, COPY), rounds)


# --- cases ---


def test_readings_are_what_they_say():
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
    assert (spans.dtype, ids.dtype) == (held.spans.dtype, held.ids.dtype)  # one variant for both
    assert biases.shape == (1, len(starts))
    assert reading.positions("cpu").shape == reading.shape


# --- rows ---


WAYS = {
    "small_pack": {"dense mask"},
    "small_prompt": {"sdpa flash", "sdpa flash + rotary", "cached", "published"},
    "small_decode": {"ours fp8", "sdpa flash", "sdpa flash + rotary", "cached", "published"},
    "small_shared": {
        *("ours fp8", "sdpa flash", "sdpa flash + rotary", "sdpa flash folded"),
        *("cached", "published"),
    },
    "small_ragged": {"ours fp8", "dense mask", "cached"},
}


def test_attention_rows():
    rows, failed = rows_of(attend, "--sizes", "tiny")
    assert not failed
    for case, wanted in WAYS.items():
        found = {row["way"] for row in rows if row["case"] == f"{case} tiny"}
        assert found == {"ours", "ours no rotation", *wanted}


def test_what_of_the_limit_attention_reaches():
    """48 queries read 512 keys of two heads, in float32."""
    rows, _ = rows_of(attend, "--sizes", "tiny", "--cases", "small_prompt")
    flops = 4 * 48 * 512 * 2 * 128
    moved = 4 * 2 * 128 * (2 * 48 + 2 * 512)
    least = 1e6 * max(flops / GEMM, moved / COPY)
    for row in rows:
        assert row["tflop_s"] == pytest.approx(flops / row["us"] / 1e6)
        assert row["gb_s"] == pytest.approx(moved / row["us"] / 1e3)
        assert row["of_limit"] == pytest.approx(least / row["us"])


def test_the_limit_is_the_slower_of_product_and_copy():
    limits = Limits(GEMM, COPY)
    assert limits.us(Work(flops=2e12, moved=1)) == pytest.approx(2e6)
    assert limits.us(Work(flops=1, moved=3e10)) == pytest.approx(3e6)
    assert clock().reached(4e6, Work(2e12, 1e10))["of_limit"] == pytest.approx(0.5)


def test_sets_rotate_only_where_caches_count(monkeypatch):
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
    assert {row["pass"].split()[0] for row in parts} == {
        *("norm_linear", "norm_swiglu", "gated_residual")
    }
    for row in parts:
        assert row["of_copy"] == pytest.approx(row["gb_s"] * 1e9 / COPY)
    swiglu = next(row for row in parts if row["pass"] == "norm_swiglu")
    assert swiglu["gb_s"] == pytest.approx(2 * 96 * 64 * 4 / swiglu["us"] / 1e3)


# --- what is wrong is not timed ---


def test_a_wrong_way_of_ours_is_not_timed_and_the_next_case_is(monkeypatch, capsys):
    right = ops.attend_spans

    def wrong(q, k, v, *others, **options):
        out = right(q, k, v, *others, **options)
        return 1.01 * out if q.shape[0] == 2 else out

    monkeypatch.setattr(ops, "attend_spans", wrong)
    rows, failed = rows_of(attend, "--sizes", "tiny", "--cases", "small_decode", "small_shared")
    assert failed
    assert {row["case"] for row in rows} == {"small_shared tiny"}
    assert "ours is not timed: it errs by 1.0e-02" in capsys.readouterr().err


def test_what_is_read_where_there_is_nothing_is_wrong(monkeypatch):
    right = ops.attend_spans
    monkeypatch.setattr(ops, "attend_spans", lambda *given, **named: right(*given, **named) + 1e-9)
    rows, failed = rows_of(attend, "--sizes", "tiny", "--cases", "small_pack")
    assert failed
    assert rows == []


def test_a_wrong_rival_is_left_out(monkeypatch, capsys):
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
        if len(media) > 256:  # not where every element is looked at
            others[5][0][-1] = 0

    monkeypatch.setattr(ops, "build_memory", wrong)
    words = ("--sizes", "tiny", "--tiles", "2", "--layers", "1", "--no-compile")
    assert rows_of(memory, *words) == ([], True)


def test_a_wrong_layer_is_not_timed(monkeypatch):
    """Attention is a share of what a layer adds that the comparison sees."""
    right = ops.attend_spans
    monkeypatch.setattr(
        ops, "attend_spans", lambda q, k, v, *given, **named: right(-q, k, v, *given, **named)
    )
    assert rows_of(mixin, "--sizes", "tiny", "--cases", "decode_1", "--no-compile") == ([], True)


# --- what only a GPU is asked for ---


def test_graphs_of_what_fits(monkeypatch, capsys):
    monkeypatch.setattr(measure, "graph_us", lambda call, calls: (call(), call(), 3.0)[-1])
    seen = []

    def unfit(i):
        raise RuntimeError("no capture")

    calls = {"ours": seen.append, "other": unfit}
    labels = {"case": "c", "pass": "forward"}
    rows = list(clock().time_graphs(labels, calls, 2, Work(1, 6e4)))
    assert [(row["way"], row["pass"], row["us"]) for row in rows] == [
        ("ours", "forward graph", 3.0)
    ]
    assert rows[0]["of_limit"] == pytest.approx(2.0)
    assert seen == [0, 1]
    assert "other fits no graph: RuntimeError: no capture" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no capture"):
        list(clock().time_graphs(labels, {"ours": unfit}, 2, Work(1, 1)))


@pytest.mark.parametrize(
    ("tune", "least"),
    [
        (lambda: attend.tune("tiny", "small_decode", clock()), 2),
        (lambda: memory.MemoryBench(clock(), 1).tune(("tiny", 2)), 4),
        (lambda: mixin.tune("tiny", "decode_1", clock()), 8),
    ],
    ids=["attend", "memory", "mixin"],
)
def test_tuning_times_every_configuration(tune, least, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(ways, "watch", lambda kernel, call: (call(), True))
    rows = list(tune())
    assert len(rows) >= least
    assert {row["pass"] for row in rows} == {"tune"}
    assert len({(row["case"], row["way"]) for row in rows}) == len(rows)
    firsts = [(row["case"], row["kernel"]) for row in rows if row["first"]]
    assert len(firsts) == len(set(firsts)) == len({(r["case"], r["kernel"]) for r in rows})


class Nothing(Kernel):
    """A kernel of two configurations that says in which it was launched."""

    def __init__(self):
        self.function = types.SimpleNamespace(fn=types.SimpleNamespace(__name__="nothing"))
        self.configs = ({"BLOCK_M": 1, "num_warps": 4}, {"BLOCK_M": 2, "num_warps": 8})
        self.config, self.launched = self.configs[0], []

    def _choose(self, config):
        self.config = config

    def launch(self, *args):
        self.launched.append(self.config)


def test_a_configuration_counts_only_where_its_kernel_is_launched(capsys):
    one, other = Nothing(), Nothing()
    calls = ways.each_configuration({"one": one, "other": other}, lambda i: one.launch(i))
    right = ways.keep_right("c", calls, lambda *_: 0.0, 0.1, must=False)
    assert list(right) == [f"one {config}" for config in one.configs]
    assert (
        capsys.readouterr().out.count("is not timed: RuntimeError: nothing was not launched") == 2
    )
    for call in right.values():
        call(0)
    # Each once to be looked at, then the other's two, and once to be timed.
    assert one.launched == [*one.configs, one.configs[0], one.configs[0], *one.configs]
    rows = list(ways.tell_configurations([{"way": way} for way in right], {"one": one}))
    assert [(row["kernel"], row["config"], row["first"]) for row in rows] == [
        ("one", "M 1 warps 4", True),
        ("one", "M 2 warps 8", False),
    ]


def test_descriptors_are_timed_where_they_are_launched(monkeypatch):
    """By their own name, and as the last."""
    attention = pytest.importorskip("comemo_kernels.attention")
    from comemo_kernels import _attend_tma, _descriptors

    if not _descriptors.AVAILABLE:
        pytest.skip("triton below 3.4 makes no descriptors in a kernel")
    kernels = {"plain": Nothing(), "descriptors": Nothing()}
    right = ops.attend_spans

    def attend_spans(*given, **named):
        kernels["descriptors" if attention.USE_TMA else "plain"].launch()
        return right(*given, **named)

    monkeypatch.setattr(ops, "attend_spans", attend_spans)
    monkeypatch.setattr(attention, "attend_many", kernels["plain"])
    monkeypatch.setattr(attention, "_kernel_for", lambda *_: kernels["plain"])
    monkeypatch.setattr(_attend_tma, "attend_tma", kernels["descriptors"])
    monkeypatch.setitem(SMALL, "case", Reading(((48, ((1, 1), (1, 1))),)))
    rows = list(attend.tune("tiny", "case", clock()))
    assert [row["kernel"] for row in rows] == ["ours"] * 2 + ["descriptors"] * 2
    assert kernels["descriptors"].launched
    assert not attention.USE_TMA


def test_splits_of_a_decode_step_are_timed(monkeypatch):
    attention = pytest.importorskip("comemo_kernels.attention")
    kernel, asked = Nothing(), []
    right = ops.attend_spans

    def attend_spans(*given, **named):
        kernel.launch()
        return right(*given, **named)

    def attention_workspace(q, k, splits=None):
        asked.append(splits)
        return

    monkeypatch.setattr(ops, "attend_spans", attend_spans)
    monkeypatch.setattr(ops, "attention_workspace", attention_workspace)
    monkeypatch.setattr(attention, "_kernel_for", lambda *_: kernel)
    monkeypatch.setattr(attention, "_choose_splits", lambda *_: 3)
    monkeypatch.setitem(SMALL, "case", Reading(((1, ((1, 1),)),)))
    rows = [row for row in attend.tune("tiny", "case", clock()) if row["kernel"] == "splits"]
    assert [(row["config"], row["first"]) for row in rows] == [
        *(("1", False), ("2", False), ("3", True), ("4", False), ("8", False))
    ]
    assert asked == [None, 1, 2, 3, 4, 8]


def test_the_build_by_descriptors_is_timed_last_and_by_its_name(monkeypatch):
    build = pytest.importorskip("comemo_kernels.memory_build")
    from comemo_kernels import _descriptors
    from comemo_kernels import _memory_build_tma as _build_tma

    if not _descriptors.AVAILABLE:
        pytest.skip("triton below 3.4 makes no descriptors in a kernel")
    kernels = {"plain": Nothing(), "project by TMA": Nothing()}
    right = ops.build_memory

    def build_memory(*given, **named):
        kernels["project by TMA" if build.USE_TMA else "plain"].launch()
        return right(*given, **named)

    monkeypatch.setattr(ops, "build_memory", build_memory)
    for name in ("norm_media", "project_media"):
        monkeypatch.setattr(build, name, kernels["plain"])
    monkeypatch.setattr(_build_tma, "project_tma", kernels["project by TMA"])
    rows = list(memory.MemoryBench(clock(), 1).tune(("tiny", 2)))
    assert [row["kernel"] for row in rows[::2]] == [
        f"ours {form} {name}"
        for names in (("norm", "project"), ("project by TMA",))
        for form in ("exact", "folded")
        for name in names
    ]
    assert kernels["project by TMA"].launched
    assert not build.USE_TMA


@pytest.mark.parametrize("module", [attend, memory, mixin])
def test_tuning_needs_a_gpu(module):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--tune: needs a GPU, found none"):
        list(module.run(options_of(module, "--tune")))


def test_rows_of_the_projection():
    rows, failed = rows_of(project, "--sizes", "tiny", "--tiles", "1", "2", "--no-compile")
    assert not failed
    assert [(row["case"], row["pass"], row["way"]) for row in rows] == [
        (f"tiny {tiles} tiles", name, way)
        for tiles in (1, 2)
        for name in ("forward", "backward")
        for way in ("published", "library", "ours")
    ]
    for row in rows:
        d, W, R = 64, 4096, 256 * int(row["case"].split()[1])
        passes = 3 if row["pass"] == "backward" else 1
        assert row["tflop_s"] == pytest.approx(passes * 2 * R * d * (W + d) / row["us"] / 1e6)


def test_a_wrong_projection_is_not_timed(monkeypatch):
    """Of ours nothing is told then; of the others the right ones."""
    wrong = project.project_as_published
    monkeypatch.setattr(project, "project_as_published", lambda *args: wrong(*args).flip(1))
    rows, failed = rows_of(project, "--sizes", "tiny", "--tiles", "1", "--no-compile")
    assert {row["way"] for row in rows} == {"library", "ours"}
    ours = project.ops.project_tiles
    monkeypatch.setattr(project.ops, "project_tiles", lambda *a, **k: ours(*a, **k).mul_(1.5))
    rows, failed = rows_of(project, "--sizes", "tiny", "--tiles", "1", "--no-compile")
    assert failed
    assert not rows


def test_rows_of_the_vision_tower(model, monkeypatch):
    monkeypatch.setattr(vision, "draw_model", lambda *_, **__: model)
    parser = argparse.ArgumentParser()
    vision.add_arguments(parser)
    words = ("--dtype", "float32", "--tiles", "3", "--at-once", "1", "2")
    rows = list(vision.run(parser.parse_args(words)))
    assert [row["way"] for row in rows] == ["ours, 1 at once", "ours, 2 at once"]
    for row in rows:
        assert row["tiles_s"] == pytest.approx(3e6 / row["us"])
        assert row["pictures_s"] == pytest.approx(row["tiles_s"] / 13)
        assert row["of_limit"] == pytest.approx(row["tflop_s"] * 1e12 / GEMM)


def test_rows_of_a_store(model, monkeypatch):
    monkeypatch.setattr(store, "draw_model", lambda *_: model)
    parser = argparse.ArgumentParser()
    store.add_arguments(parser)
    rows = {row["way"]: row for row in store.run(parser.parse_args(["--tiles", "1"]))}
    assert len(rows) == 7
    for row in rows.values():
        assert row["gb_s"] == pytest.approx(row["mib"] * 2**20 / row["us"] / 1e3)
    summed, digested = list(rows.values())[:2]
    assert summed["mib"] == digested["mib"] > 0
    assert rows["hit in memory"]["mib"] == rows["hit in a file"]["mib"] > 0


def test_flops_of_the_vision_tower(model):
    """Against what PyTorch counts."""
    config, tiles = model.config, torch.randn(1, 3, 448, 448, device=model.device)
    vision_config, width = config.vision_config, config.text_config.hidden_size
    whole = sdpa_kernel(SDPBackend.MATH)  # a fused attention is not counted on a CPU
    with torch.no_grad(), whole, FlopCounterMode(display=False) as counter:
        model.model.project_images(tiles)
    found = vision.flops_of_tile(vision_config, width, config.tokens_per_tile)
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_rows_are_written_as_they_come(tmp_path, monkeypatch):
    held = []

    def run(options):
        yield {"case": "c", "way": "ours", "us": 1.0}
        held.append(json.loads((tmp_path / "memory.json").read_text())["rows"])
        yield {"case": "c", "way": "other", "us": 2.0}

    monkeypatch.setattr(memory, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench", "memory", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 0
    assert [len(rows) for rows in held] == [1]
    assert len(json.loads((tmp_path / "memory.json").read_text())["rows"]) == 2


def test_ways_of_ours_by_name():
    assert ways.is_ours("ours")
    assert ways.is_ours("ours fp8")
    assert not ways.is_ours("sdpa flash")
