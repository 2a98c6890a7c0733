"""`gpu-check`: its summary of failing tests and of findings of compute-sanitizer."""

import argparse
import contextlib
import json
import re
import time

import pytest
from test_bench_gpu import archived, made_up_machine  # noqa: F401

from bench import gpu_check, measure, stages

TESTS = """
import harness, pytest, torch

@pytest.mark.parametrize("i", range(3))
def test_fails(i):
    raise RuntimeError(f"Triton Error [CUDA]: {i} misaligned address\\nand more")

def test_errs():
    x = torch.linspace(0.5, 1.0, 99).half()
    off = lambda x: (2 * x.double() + 5e-3).half()
    harness.assert_matches(off, lambda x: 2 * x, {"x": x})

def test_right():
    harness.assert_matches(torch.sin, torch.sin, {"x": torch.randn(9)})

@pytest.mark.skip(reason="no goldens")
def test_skipped():
    pass
"""


@pytest.fixture
def check(monkeypatch, tmp_path):
    """`gpu-check` with other tests and another tool."""

    def run(tests=TESTS, tool=None, names=("suite", "memcheck", "racecheck"), parallel=()):
        place = tmp_path / "tests"
        place.mkdir()
        (place / "test_some.py").write_text(tests)
        words = (*gpu_check.SUITE[:2], *gpu_check.SUITE[4:], "-c", "/dev/null", str(place))
        monkeypatch.setattr(gpu_check, "SUITE", words)
        monkeypatch.setattr(gpu_check, "PARALLEL", parallel)
        monkeypatch.setenv("PYTHONPATH", str(measure.ROOT / "tests"))
        monkeypatch.setattr(gpu_check, "TOOL_FOLDER", str(tmp_path))
        (tmp_path / "bin").mkdir()
        if tool is not None:
            file = tmp_path / "bin" / gpu_check.TOOL
            file.write_text(f"#!/bin/sh\n{tool}\n")
            file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        options = argparse.Namespace(out=tmp_path / "out", minutes=9.0, stages=names)
        return gpu_check.run(options), (tmp_path / "out" / "gpu-check.txt").read_text()

    return run


@pytest.mark.slow
def test_failures_errors_and_skips_are_printed(check, tmp_path, capsys):
    code, table = check()
    assert code == 1
    first = "3x RuntimeError: Triton Error [CUDA]: 0 misaligned address  in "
    assert first in table
    assert "1x AssertionError: output 0: largest error" in table
    assert table.index(first) < table.index("1x AssertionError")
    (line,) = [x for x in table.splitlines() if x.startswith("  some float16: ")]
    assert float(line.split()[2].rstrip(",")) > 1
    assert line.endswith(", the largest of 1, output 0, test_some.py::test_errs")
    assert re.search(
        r"some float32: 0\.\d\d, the largest of 1, output 0, test_some.py::test_r", table
    )
    assert "1 tests: Skipped: no goldens" in table
    assert "memcheck     0.0 s  left out: there is no compute-sanitizer" in table
    assert "4 failed, 1 passed" in table
    assert table in capsys.readouterr().out
    held = archived(tmp_path / "out")
    assert len(held["tests.jsonl"].splitlines()) == 6
    assert {"suite.log", "errors-None.jsonl"} <= held.keys()
    assert len(list((tmp_path / "out").iterdir())) == 3


LOSES = """
import pytest, time, torch

def synchronize():
    if LOST:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

LOST, torch.cuda.is_initialized, torch.cuda.synchronize = [], lambda: True, synchronize

@pytest.mark.parametrize("i", range(9))
def test_some(i):
    time.sleep(0.05)
    if i == 1:
        LOST.append(i)
    torch.cuda.synchronize()
"""


@pytest.mark.slow
def test_a_worker_with_a_destroyed_context_fails_no_other_test(check, tmp_path):
    code, table = check(LOSES, names=("suite",), parallel=("-n", "1", "--dist", "worksteal"))
    assert code == 1
    lines = [json.loads(x) for x in archived(tmp_path / "out")["tests.jsonl"].splitlines()]
    failed = [line for line in lines if line["outcome"] == "failed"]
    assert {line["test"].rpartition("::")[2] for line in failed} == {"test_some[1]"}
    assert "1x RuntimeError: CUDA error: an illegal memory access was encountered  in" in table
    assert "crashed while running" in table
    assert sum(line["outcome"] == "passed" for line in lines) == 8


@pytest.mark.slow
def test_tests_without_time_are_counted(check, monkeypatch):
    slow = "import pytest, time\n@pytest.mark.parametrize('i', range(5))\ndef test_a(i): "
    monkeypatch.setattr(gpu_check, "SECONDS", {"suite": 1.0})
    began, run = time.monotonic(), stages.run_in_turn

    def until_two_have_run(chosen, folder, look):
        def stop():
            look()
            held = folder / "tests.jsonl"
            if held.is_file() and len(held.read_text().splitlines()) >= 2:
                raise TimeoutError
            assert time.monotonic() - began < 60

        with contextlib.suppress(TimeoutError):
            run(chosen, folder, stop)

    monkeypatch.setattr(stages, "run_in_turn", until_two_have_run)
    _, table = check(slow + "time.sleep(i)", names=("suite",))
    assert re.search(r"[123] tests: not run so far", table)


def test_findings_of_the_tool_are_printed(check):
    tool = 'echo "========= $2 Invalid read"; echo "========= ERROR SUMMARY: 3 errors"; exit 99'
    code, table = check(tool=tool, names=("memcheck", "racecheck"))
    assert code == 1
    for name in ("memcheck", "racecheck"):
        assert f"{name}:\n  ERROR SUMMARY: 3 errors\n  {name} Invalid read" in table
    assert table.count("failed, exit code 99") == 2


def test_a_check_without_findings(check):
    tool = 'echo "========= ERROR SUMMARY: 0 errors"'
    code, table = check(tool=tool, names=("memcheck", "racecheck"))
    assert code == 0
    assert table.count("  passed") == 2
    assert "failures" not in table


@pytest.mark.slow
def test_a_failed_import_of_tests_is_printed(check):
    code, table = check("import nothing_of_that_name", names=("suite",))
    assert code == 1
    assert "1x ModuleNotFoundError: No module named 'nothing_of_that_name'  in" in table
    assert "memcheck: not selected" in table
