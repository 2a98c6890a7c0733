"""What benchmarks tell while they run, what an interrupt keeps, and which cases are the default."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import GPU
from timed import options_of

from bench import __main__ as command
from bench import chat, decode, measure, memory, mixin, progress, rotary, ways

INTERRUPTED = """
import signal, sys, time
from bench import __main__ as command, memory

def run(options):
    yield {"case": "c", "way": "ours", "us": 1.0}
    yield {"case": "c", "way": "other", "us": 2.0}
    print("measuring", flush=True)
    time.sleep(60)
    yield {"case": "c", "way": "never", "us": 3.0}

memory.run = run
sys.argv = ["bench", "memory", *sys.argv[1:]]
command.main()
"""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_of(stream, name="rotary"):
    """A progress whose clock is set by hand."""
    clock = [100.0]
    told = progress.Progress(name, stream, lambda: clock[0])
    return told, clock


def test_a_line_for_each_case_where_there_is_no_terminal():
    stream = io.StringIO()
    told, clock = run_of(stream)
    told.plan([1, 1, 3])
    for case, weight in (("a", 1), ("b", 1), ("c", 3)):
        told.begin(case, weight)
        told.tell("ours, round 1 of 9")
        clock[0] += 10 * weight
    told.clear()
    assert stream.getvalue().splitlines() == [
        "rotary: 1 of 3, a, 0 s",
        "rotary: 2 of 3, b, 10 s, about 40 s left",
        "rotary: 3 of 3, c, 20 s, about 30 s left",
    ]


def test_one_line_is_rewritten_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    told, clock = run_of(stream)
    told.plan([1, 1])
    told.begin("a")
    told.tell("ours")  # too soon after the line before
    clock[0] += 3
    told.tell("ours, round 1 of 2")
    clock[0] += 3
    told.begin("b")
    told.clear()
    assert "\n" not in stream.getvalue()
    assert [part for part in stream.getvalue().split(progress.CLEAR) if part] == [
        "rotary: 1 of 2, a, 0 s",
        "rotary: 1 of 2, a, ours, round 1 of 2, 3 s",
        "rotary: 2 of 2, b, 6 s, about 6 s left",
    ]


def test_a_line_is_not_wider_than_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    told, _ = run_of(stream)
    told.begin("a case with a long name")
    assert len(stream.getvalue().removeprefix(progress.CLEAR)) == 19


def test_what_is_printed_takes_the_place_of_the_line():
    out, stream = Terminal(), Terminal()
    with progress.shown("rotary", out, stream):
        for case in progress.each(["a", "b"]):
            print(f"message of {case}")
    assert out.getvalue() == "message of a\nmessage of b\n"
    assert stream.getvalue().endswith(progress.CLEAR)
    assert sys.stdout is not out


def test_nothing_is_told_while_a_clock_runs(monkeypatch):
    """Nor outside `shown`, as in tests and other programs."""
    log, stream = [], Terminal()
    monkeypatch.setattr(progress, "PERIOD", 0.0)
    monkeypatch.setattr(stream, "write", lambda text: log.append("told") or len(text))
    monkeypatch.setattr(measure, "_cpu_round", lambda way, sets: log.append(way(0)) or 1.0)
    names = {"first": lambda _: "first", "second": lambda _: "second"}
    measure.compare(names, 1, "cpu", rounds=1)
    assert log == ["first", "second"] * 2
    log.clear()
    with progress.shown("rotary", io.StringIO(), stream):
        measure.compare(names, 1, "cpu", rounds=1)
    assert log == ["told", "first", "told", "second"] * 2 + ["told"]


def test_rows_are_aligned_as_they_come(capsys):
    table = measure.Table()
    table.show({"case": "a", "us": 1.23456})
    first = capsys.readouterr().out
    table.show({"case": "a long name", "us": 2.0})
    table.show({"case": "b", "host_us": 2.0})
    assert first.splitlines() == ["case       us", "a          1.235"]
    assert capsys.readouterr().out.splitlines() == [
        "a long name  2",
        "case         host_us",
        "b            2",
    ]


def test_an_interrupt_within_a_run(tmp_path, monkeypatch, capsys):
    def run(options):
        yield {"case": "c", "way": "ours", "us": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "run", run)
    for words, kept in (((), ""), (("--out", str(tmp_path)), ", written to ")):
        monkeypatch.setattr(sys, "argv", ["bench", "memory", *words])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        assert stopped.value.code == 130
        told = capsys.readouterr()
        assert told.err.startswith(f"interrupted: 1 row measured{kept}")
        assert len(told.err.splitlines()) == 1
        assert "ours" in told.out
    assert [row["us"] for row in json.loads((tmp_path / "memory.json").read_text())["rows"]] == [1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_an_interrupt_keeps_the_rows(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, "--out", str(tmp_path)]
    run = subprocess.Popen(
        command, cwd=measure.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    lines = []
    while "measuring" not in (line := run.stdout.readline()):
        assert line, run.stderr.read()
        lines.append(line)
    assert any("other" in line for line in lines)  # rows are printed as they come
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    _, told = run.communicate(timeout=30)
    assert time.monotonic() - began < 20
    assert run.returncode == 130
    files = os.path.join(tmp_path, "memory")
    wanted = f"interrupted: 2 rows measured, written to {files}.json and .csv"
    assert told.splitlines()[-1] == wanted
    assert "Traceback" not in told
    held = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [row["way"] for row in held] == ["ours", "other"]


# --- which cases are the default ---


def test_few_cases_on_a_cpu_all_on_a_gpu(monkeypatch):
    few, whole = options_of(rotary), options_of(rotary, "--all")
    given = options_of(rotary, "--cases", "pack_16k", "--heads", "9B")
    assert [measure.few(options) for options in (few, whole)] == [not GPU, False]
    monkeypatch.setattr(measure, "default_device", lambda: "cpu")
    assert len(rotary.cases_of(few)) == 4
    assert {case for _, case, _ in rotary.cases_of(few)} == {"chat_1k", "one_image_3k"}
    assert len(rotary.cases_of(whole)) == 12
    assert rotary.cases_of(given) == [("9B", "pack_16k", layout) for layout in rotary.LAYOUTS]
    monkeypatch.setattr(measure, "default_device", lambda: "cuda")
    assert rotary.cases_of(few) == rotary.cases_of(whole)


def test_default_batches(monkeypatch):
    monkeypatch.setattr(measure, "default_device", lambda: "cpu")
    every = [(1, "own"), *((n, kind) for n in (4, 8, 32) for kind in ("same", "own"))]
    assert decode.batches_of(options_of(decode, "--all")) == every
    assert decode.batches_of(options_of(decode)) == every[:5]
    assert decode.batches_of(options_of(decode, "--batches")) == []
    asked = options_of(decode, "--batches", "2", "--batch-pictures", "own")
    assert decode.batches_of(asked) == [(2, "own")]
    ways, batches = chat.steps_of(options_of(chat))
    assert ways == list(chat.WAYS)
    assert batches == [(1, "own", "ours"), (4, "same", "ours"), (4, "own", "ours")]
    assert len(chat.steps_of(options_of(chat, "--all"))[1]) == 7 * len(chat.WAYS)
    assert chat.grid_of(options_of(chat)) == (2, 1)
    assert chat.grid_of(options_of(chat, "--cols", "4", "--rows", "3")) == (4, 3)
    monkeypatch.setattr(measure, "default_device", lambda: "cuda")
    assert decode.batches_of(options_of(decode)) == []
    _, batches = chat.steps_of(options_of(chat))
    assert batches == [(n, "own", way) for n in (1, 8, 32) for way in chat.WAYS]
    assert chat.grid_of(options_of(chat)) == (4, 3)


def test_each_case_is_told(capsys, made_up_limits):
    stream = io.StringIO()
    options = options_of(mixin, "--sizes", "tiny", "--cases", "decode_1", "--rounds", "1")
    options.no_compile = True
    with progress.shown("mixin", sys.stdout, stream):
        rows = list(mixin.run(options))
    assert rows
    assert stream.getvalue() == "mixin: 1 of 1, tiny decode_1, 0 s\n"


def test_a_case_that_fails_is_counted(capsys):
    stream, options = io.StringIO(), options_of(mixin)

    def rows_of(case):
        if case[0] == 1:
            raise RuntimeError("not this one")
        yield {"case": str(case[0])}

    with progress.shown("mixin", sys.stdout, stream):
        rows = list(ways.each_case(options, [(0,), (1,), (2,)], rows_of))
    assert [row["case"] for row in rows] == ["0", "2"]
    assert options.failed
    assert len(stream.getvalue().splitlines()) == 3
    assert torch.is_grad_enabled()
