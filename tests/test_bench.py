"""Benchmarks of rotary embedding and position ids; the machine, files and plots of all."""

import csv
import json
import os
import re
import subprocess
import sys

import harness
import pytest
import torch
from conftest import GPU, INTERPRET
from timed import options_of

import comemo_kernels as ops
from bench import __main__ as command
from bench import measure, memory, plot, positions, rotary, tuning, ways
from bench.cases import PROMPTS, Prompt


def test_cases_have_the_sizes_of_their_names():
    assert PROMPTS["chat_1k"].tokens == 1024
    assert PROMPTS["one_image_3k"].tokens == 3424
    assert PROMPTS["pack_16k"].tokens == 16384
    assert sum(ops.image_tokens(grid) for grid in PROMPTS["pack_16k"].grids) == 46 * 256
    for name in ("one_image_3k", "chat_1k"):
        prompt = PROMPTS[name]
        image, attention = prompt.masks("cpu")
        ids = ops.rope_dhr_positions(image, attention, prompt.grids)
        assert torch.equal(prompt.position_ids("cpu"), ids)
    assert (PROMPTS["pack_16k"].position_ids("cpu") == 0).sum() == 6  # samples
    assert PROMPTS["decode_32"].position_ids("cpu").shape == (32, 1)


@pytest.fixture
def tiny_copy(monkeypatch):
    monkeypatch.setitem(PROMPTS, "chat_1k", Prompt([(128, [], 0)]))
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1)


RUN = ("--cases", "chat_1k", "--heads", "2B", "--rounds", "1", "--no-compile")


def test_rotary_rows(tiny_copy):
    rows = list(rotary.run(options_of(rotary, *RUN)))
    assert {row["case"] for row in rows} == {"chat_1k 2B contiguous", "chat_1k 2B packed qkv"}
    both = {(kind, way) for kind in ("forward", "backward") for way in ("eager", "ours")}
    assert {(row["pass"], row["way"]) for row in rows} == both | {("forward", "ours in place")}
    moved = 2 * 128 * 24 * 128 * 4
    for row in rows:
        assert 0 < row["low_us"] <= row["us"] <= row["high_us"]
        assert row["gb_s"] == pytest.approx(moved / row["us"] / 1e3)
        assert row["of_copy"] == pytest.approx(row["gb_s"] / 10)


def test_a_wrong_kernel_is_not_timed(tiny_copy, monkeypatch, capsys):
    right = rotary.rotate_as_published
    monkeypatch.setattr(rotary, "rotate_as_published", lambda q, k, *t: right(k, q, *t))
    rows = rotary.run(options_of(rotary, *RUN, "--layouts", "contiguous"))
    assert {row["way"] for row in rows} == {"ours", "ours in place"}
    assert "eager is not timed" in capsys.readouterr().out
    monkeypatch.setattr(rotary, "rotate_as_published", lambda q, k, *t: (2 * right(q, k, *t)[0], k))
    assert {row["way"] for row in rotary.run(options_of(rotary, *RUN))} == {"ours", "ours in place"}
    apply_rotary = ops.apply_rotary
    monkeypatch.setattr(ops, "apply_rotary", lambda q, k, *a, **kw: apply_rotary(q, q, *a, **kw))
    with pytest.raises(AssertionError):
        list(rotary.run(options_of(rotary, *RUN)))


def test_position_rows_and_wrong_ids(monkeypatch):
    words = ("--rounds", "1", "--cases", "one_image_3k", "eight_of_3k")
    rows = list(positions.run(options_of(positions, *words)))
    assert len(rows) == 8
    assert all(row["us"] > 0 for row in rows)
    monkeypatch.setattr(ops, "rope_dhr_positions", lambda image, *_, **kw: image.long())
    with pytest.raises(RuntimeError, match="ours is not timed: other ids for one_image_3k"):
        list(positions.run(options_of(positions, *words)))


def test_tuning_needs_a_gpu(tiny_copy):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="needs a GPU, found none"):
        list(rotary.run(options_of(rotary, "--tune")))


def test_host_and_tuning_rows(tiny_copy, monkeypatch):
    """Rows that only a GPU has, with its clocks replaced."""
    monkeypatch.setattr(measure, "graph_us", lambda call: (call(), 1.5)[1])
    monkeypatch.setattr(measure, "host_us", lambda call: (call(), 9.5)[1])
    monkeypatch.setattr(tuning, "watch", lambda kernel, call: (call(), True))
    bench = rotary.RotaryBench("cpu", torch.float32, 1e10, rounds=1)
    rows = bench.time_host("2B")
    assert {(row["case"], row["way"]) for row in rows} == {
        (f"{case} 2B contiguous", way)
        for case in ("decode_1", "decode_32", "chat_1k")
        for way in ("eager", "ours")
    }
    assert all((row["host_us"], row["graph_us"]) == (9.5, 1.5) for row in rows)
    before = rotary.rotary_kernel.config
    tuned = list(bench.tune("chat_1k", ["2B"]))
    configs = rotary.rotary_kernel.configs
    assert [row["way"] for row in tuned] == [f"ours {config}" for config in configs]
    assert [row["first"] for row in tuned] == [True] + [False] * (len(configs) - 1)
    assert rotary.rotary_kernel.config is before


def test_a_round_on_a_gpu_is_timed_by_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 3.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("busy"))
    timing = measure.compare({"way": log.append}, 2, "cuda", rounds=1)["way"]
    assert log == ["wait", "busy", "event", 0, 1, "event", "wait"] * 2
    assert timing == measure.Timing(1500.0, 1500.0, 1500.0)


MEASURED = [
    {"bench": "a", "case": "c", "pass": "forward", "way": "ours", "us": 2.0, "of_copy": 0.9},
    {"bench": "a", "case": "c", "pass": "forward", "way": "eager", "us": 5.0, "of_copy": 0.4},
    {"bench": "a", "case": "c", "pass": "host", "way": "ours", "host_us": 9.0},
    {"bench": "b", "case": "c", "pass": "forward", "way": "ours", "us": 1.0},
]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the source tree without any information about its commit."""
    monkeypatch.delenv("COMEMO_COMMIT", raising=False)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    return tmp_path


def test_a_copy_without_a_repository_takes_its_commit_from_file_or_variable(copied, monkeypatch):
    assert measure.describe_machine()["commit"] == "unknown"
    (copied / ".commit").write_text("abc1234\n")
    assert measure.describe_machine()["commit"] == "abc1234"
    monkeypatch.setenv("COMEMO_COMMIT", "def5678")
    assert measure.describe_machine()["commit"] == "def5678"


def test_a_machine_without_git(copied, monkeypatch):
    (copied / ".git").mkdir()
    monkeypatch.setenv("PATH", str(copied))
    assert measure.describe_machine()["commit"] == "unknown"
    (copied / ".commit").write_text("abc1234\n")
    assert measure.describe_machine()["commit"] == "abc1234"


def test_a_commit_with_changes(copied):
    git = ["git", "-C", str(copied), "-c", "user.name=a", "-c", "user.email=a@b"]
    (copied / "file").write_text("a")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    head = measure.describe_machine()["commit"]
    assert re.fullmatch("[0-9a-f]{7,}", head)
    (copied / "file").write_text("b")
    assert measure.describe_machine()["commit"] == f"{head}+changes"


@pytest.mark.slow
def test_an_installed_package_does_not_shadow_the_harness(tmp_path):
    """Tests and benchmarks import the same module object."""
    for name in ("tests", "harness"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('shadowed')")
    paths = os.pathsep.join([str(tmp_path), str(measure.ROOT)])
    code = (
        "import sys, bench.harness, harness;"
        "assert harness.assert_matches is bench.harness.assert_matches;"
        "assert 'tests' not in sys.modules; print(harness.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(measure.ROOT / "tests" / "harness.py")
    assert harness.assert_matches is rotary.assert_matches


@pytest.mark.slow
@pytest.mark.skipif(GPU or INTERPRET, reason="replaces the driver of a machine without a GPU")
def test_host_time_of_a_call(tmp_path):
    """In a subprocess, because operators stay registered for the CPU."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench", "host", "--out", str(tmp_path)]
    subprocess.run(command, cwd=measure.ROOT, capture_output=True, check=True)
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    cases = {row["case"].split()[0] for row in rows}
    assert cases >= {"decode_1", "attend_spans", "norm_linear"}
    assert all(row["host_us"] > 1 for row in rows)
    by_us = {(row["case"], row["way"]): row["host_us"] for row in rows}
    assert all(by_us[case, "ours"] < by_us[case, "triton's launch"] for case, _ in by_us)


def test_files_and_plots(tmp_path):
    measure.write("results", MEASURED, measure.describe_machine(), tmp_path)
    held = json.loads((tmp_path / "results.json").read_text())
    assert held["rows"] == MEASURED
    assert {"gpu", "torch", "triton", "commit", "date"} <= held["machine"].keys()
    lines = [x for x in (tmp_path / "results.csv").open() if not x.startswith("#")]
    assert [row["host_us"] for row in csv.DictReader(lines)] == ["", "", "9.0", ""]
    pytest.importorskip("matplotlib")
    assert {file.name for file in plot.draw(MEASURED, tmp_path)} == {"a.png", "b.png"}
    assert (tmp_path / "a.png").stat().st_size > 1000


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


def test_our_ways_are_recognised_by_name():
    assert ways.is_ours("ours")
    assert ways.is_ours("ours fp8")
    assert not ways.is_ours("sdpa flash")
