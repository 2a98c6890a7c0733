"""What benchmarks do on a GPU only, run on a CPU: CUDA graphs, and `--tune`."""

import types

import pytest
import torch
from timed import clock, options_of

import comemo_kernels as ops
from bench import attend, measure, memory, mixin, train, tuning, ways
from bench.readings import SMALL, Reading
from bench.ways import Work
from comemo_kernels._op import Kernel

pytestmark = pytest.mark.usefixtures("made_up_limits")


def test_graphs_of_ways_that_can_be_captured(monkeypatch, capsys):
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
    assert "other cannot be captured: RuntimeError: no capture" in capsys.readouterr().out
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
    monkeypatch.setattr(tuning, "watch", lambda kernel, call: (call(), True))
    rows = list(tune())
    assert len(rows) >= least
    assert {row["pass"] for row in rows} == {"tune"}
    assert len({(row["case"], row["way"]) for row in rows}) == len(rows)
    firsts = [(row["case"], row["kernel"]) for row in rows if row["first"]]
    assert len(firsts) == len(set(firsts)) == len({(r["case"], r["kernel"]) for r in rows})


class Nothing(Kernel):
    """A kernel with two configurations that records which was launched."""

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
    calls = tuning.each_configuration({"one": one, "other": other}, lambda i: one.launch(i))
    right = ways.keep_right("c", calls, lambda *_: 0.0, 0.1, must=False)
    assert list(right) == [f"one {config}" for config in one.configs]
    assert (
        capsys.readouterr().out.count("is not timed: RuntimeError: nothing was not launched") == 2
    )
    for call in right.values():
        call(0)
    # Each once to be checked, then the other kernel's two, then each once to be timed.
    assert one.launched == [*one.configs, one.configs[0], one.configs[0], *one.configs]
    rows = list(tuning.tell_configurations([{"way": way} for way in right], {"one": one}))
    assert [(row["kernel"], row["config"], row["first"]) for row in rows] == [
        ("one", "M 1 warps 4", True),
        ("one", "M 2 warps 8", False),
    ]


def test_descriptors_are_timed_last_under_their_own_name(monkeypatch):
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
    assert attention.USE_TMA


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
        ("1", False),
        ("2", False),
        ("3", True),
        ("4", False),
        ("8", False),
    ]
    assert asked == [None, 1, 2, 3, 4, 8]


def test_a_build_with_descriptors_is_timed_last_under_its_own_name(monkeypatch):
    memory_build = pytest.importorskip("comemo_kernels.memory_build")
    from comemo_kernels import _descriptors, _memory_build_tma

    if not _descriptors.AVAILABLE:
        pytest.skip("triton below 3.4 makes no descriptors in a kernel")
    kernels = {"plain": Nothing(), "project by TMA": Nothing()}
    right = ops.build_memory

    def build_memory(*given, **named):
        kernels["project by TMA" if memory_build.USE_TMA else "plain"].launch()
        return right(*given, **named)

    monkeypatch.setattr(ops, "build_memory", build_memory)
    for name in ("norm_media", "project_media"):
        monkeypatch.setattr(memory_build, name, kernels["plain"])
    monkeypatch.setattr(_memory_build_tma, "project_tma", kernels["project by TMA"])
    rows = list(memory.MemoryBench(clock(), 1).tune(("tiny", 2)))
    assert [row["kernel"] for row in rows[::2]] == [
        f"ours {form} {name}"
        for names in (("norm", "project"), ("project by TMA",))
        for form in ("exact", "folded")
        for name in names
    ]
    assert kernels["project by TMA"].launched
    assert memory_build.USE_TMA


@pytest.mark.parametrize("module", [attend, memory, mixin, train])
def test_tuning_needs_a_gpu(module):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--tune: needs a GPU, found none"):
        list(module.run(options_of(module, "--tune")))
