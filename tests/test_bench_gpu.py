"""`gpu-bench`: stages that fail, hang or are killed, and the summary."""

import argparse
import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import gpu_bench, measure, stages, warm
from bench.stages import Stage

ROW = {"case": "c", "pass": "forward", "way": "ours", "us": 1.5}
MEASURE = (
    "import json, sys, pathlib, time; out = pathlib.Path(sys.argv[-1]); out.mkdir();"
    f"(out / 'b.json').write_text(json.dumps({{'rows': [{ROW}]}})); "
)


@pytest.fixture(autouse=True)
def made_up_machine(monkeypatch):
    machine = dict.fromkeys(("gpu", "torch", "triton", "commit", "date"), "none")
    monkeypatch.setattr(measure, "describe_machine", lambda: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stages, "GRACE", 0.2)
    monkeypatch.setattr(stages, "STEP", 0.2)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """`gpu-bench` with other stages: name -> seconds, code."""

    def run(found, minutes, names=None):
        monkeypatch.setattr(gpu_bench, "STAGES", {n: (s, [c]) for n, (s, c) in found.items()})
        monkeypatch.setattr(gpu_bench, "_stage", stage)
        options = argparse.Namespace(out=tmp_path, minutes=minutes, stages=names or list(found))
        return gpu_bench.run(options), (tmp_path / "gpu-bench.txt").read_text()

    def stage(name, folder):
        seconds, (code,) = gpu_bench.STAGES[name]
        words = [sys.executable, "-c", f"input(); {code}", str(folder / name)]
        return Stage(name, words, seconds, waits=True)

    return run


def archived(folder):
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def is_running(pid):
    """Whether a process that is not our child runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition, seconds=30):
    began = time.monotonic()
    while not condition() and time.monotonic() - began < seconds:
        time.sleep(0.02)
    assert condition()


def test_stages_are_valid_commands(tmp_path):
    names = list(gpu_bench.STAGES)
    assert names[:5] == ["compile", "attend", "tune attend", "memory", "tune memory"]
    for name in names[1:]:
        words = gpu_bench._stage(name, tmp_path).command
        assert words[1:3] == ["-m", "bench"]
        parser = argparse.ArgumentParser()
        command.BENCHMARKS[words[3]].add_arguments(parser)
        parser.add_argument("--wait", action="store_true")
        parser.add_argument("--out")
        parser.parse_args(words[4:])


def test_shipped_kernels_are_compiled_into_the_cache(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    places = warm.variants("sm_90")
    cases = warm._cases()
    held = {(cases[i].kernel, j) for i, j in places}
    kernels = {case.kernel for case in cases if "sm_90" in case.chips}
    assert held == {(kernel, j) for kernel in kernels for j in range(len(kernel.configs))}
    assert [cases[i].dot for i, _ in places] == sorted((cases[i].dot for i, _ in places))[::-1]
    from comemo_kernels import _rows_kernel

    place = next(p for p in places if cases[p[0]].kernel is _rows_kernel.one_weight_kernel)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cases[place[0]].kernel.function.device_caches.clear()
    assert warm.compile_variant("sm_90", place) > 0
    assert len(list(tmp_path.rglob("*.cubin"))) == 1


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(bench, tmp_path, capsys):
    found = {
        "fails": (1, MEASURE + "print('c: library is not timed: it errs'); raise KeyError(3)"),
        "hangs": (1, MEASURE + "time.sleep(60)"),
        "measures": (2, MEASURE),
    }
    code, table = bench(found, 4 / 60)
    assert code == 1
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == list(found)
    assert "failed, exit code 1" in lines[1]
    assert "out of time" in lines[2]
    assert "passed" in lines[3]
    assert "b c forward: 1.5 us, ours x1, ours x1" in table  # of three stages
    assert table in capsys.readouterr().out
    held = archived(tmp_path)
    assert len(json.loads(held["results.json"])["rows"]) == 3
    assert {"results.csv", "fails.log", "fails/b.json"} <= held.keys()
    assert "KeyError: 3\n" in (tmp_path / "gpu-bench.log").read_text()
    assert "left out:\n  c: library is not timed: it errs\nwhy fails failed:\n  1x Key" in table
    assert len(list(tmp_path.iterdir())) == 3


def test_a_selected_stage_has_all_the_time_and_the_others_are_listed(bench):
    found = {"a": (1, MEASURE), "b": (99, MEASURE)}
    code, table = bench(found, 0.5, ["a"])
    assert code == 0
    assert "left out:\n  b" in table


def test_a_plot_that_fails_loses_no_rows(bench, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no axis")

    monkeypatch.setattr(gpu_bench.plot, "draw", fail)
    code, table = bench({"a": (1, MEASURE)}, 0.5)
    assert code == 0
    told = capsys.readouterr()
    assert told.out.endswith(table + "\n")
    assert "1.5 us" in table
    assert "no axis" in told.err


def test_stages_without_time_are_listed(bench):
    code, table = bench({"a": (1, MEASURE)}, 0.0)
    assert code == 0
    assert "not run: no time left" in table
    assert "left out:\n  a" in table


def test_shares_sum_to_the_minutes():
    found = [Stage("a", [], 1.0), Stage("b", [], 3.0)]
    stages.share(found, 2)
    assert [stage.seconds for stage in found] == [30.0, 90.0]


@pytest.mark.slow
def test_a_waiting_stage_imports_while_another_runs(tmp_path):
    told = tmp_path / "told"
    code = (
        "import sys, time; f = open(sys.argv[1], 'a', 1); print('loaded', sys.argv[2], file=f);"
        "input(); print('begun', sys.argv[2], file=f); time.sleep(1);"
        "print('ended', sys.argv[2], file=f)"
    )
    found = [
        Stage(name, [sys.executable, "-c", code, str(told), name], 9.0, waits=True)
        for name in ("a", "b")
    ]
    stages.run_in_turn(found, tmp_path, lambda: None)
    lines = told.read_text().splitlines()
    assert sorted(lines) == sorted(f"{w} {n}" for w in ("loaded", "begun", "ended") for n in "ab")
    assert lines.index("loaded b") < lines.index("ended a") < lines.index("begun b")
    assert all(stage.outcome == "passed" for stage in found)


@pytest.mark.slow
def test_a_waiting_stage_that_is_not_needed_ends(tmp_path, monkeypatch):
    """A stage without time left when its turn comes, and one whose stdin is closed."""
    pid = tmp_path / "pid"
    write_pid = (
        f"import os, pathlib; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); input()"
    )
    stages.run_in_turn(
        [
            Stage("long", [sys.executable, "-c", "import time; time.sleep(9)"], 2.0),
            Stage("none", [sys.executable, "-c", write_pid], 0.0, waits=True),
        ],
        tmp_path,
        lambda: None,
    )
    assert not is_running(int(pid.read_text()))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys, "argv", ["bench", "positions", "--wait"])
    with pytest.raises(SystemExit, match="positions --wait: stdin was closed"):
        command.main()


def test_child_processes_end_with_their_stage(tmp_path):
    """Such as workers of pytest-xdist."""
    (tmp_path / "test_a.py").write_text(
        "import os, pathlib, time, pytest\n"
        "@pytest.mark.parametrize('i', range(2))\n"
        "def test_a(i):\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.pid').touch()\n"
        "    time.sleep(60)\n"
    )
    words = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "-c", "/dev/null"]
    stage = Stage("suite", [*words, str(tmp_path)], 9.0)
    process = stages.Process(stage, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    stages.run_together([process], 0.1, lambda: None)
    assert stage.outcome == "out of time after 0 s"
    workers = [int(file.stem) for file in tmp_path.glob("*.pid")]
    wait_for(lambda: not any(map(is_running, workers)), 5)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_measured_rows_survive_a_kill(end, bench, tmp_path):
    pid = tmp_path / "pid"
    write_pid = f"pathlib.Path({str(pid)!r}).write_text(str(__import__('os').getpid())); "
    code = "import pathlib; " + write_pid + MEASURE + "time.sleep(60)"
    run = multiprocessing.get_context("fork").Process(target=bench, args=({"a": (60, code)}, 1))
    run.start()

    def written():
        table = tmp_path / "gpu-bench.txt"
        return table.is_file() and "1.5 us" in table.read_text()

    wait_for(written)
    os.kill(run.pid, end)
    run.join(30)
    child = int(pid.read_text())
    pid.unlink()
    try:
        assert len(list(tmp_path.iterdir())) <= 8
        assert json.loads(archived(tmp_path)["results.json"])["rows"] == [{"bench": "b"} | ROW]
        assert is_running(child) == (end == signal.SIGKILL)
    finally:
        if is_running(child):
            os.kill(child, signal.SIGKILL)


def test_commands_need_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in command.COMMANDS:
        monkeypatch.setattr(sys, "argv", ["bench", name, "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match=f"bench {name}: needs a GPU, torch sees none"):
            command.main()
    assert not list(tmp_path.iterdir())
