"""Everything that a GPU is needed for, in one command: the GPU suite, then the benchmarks.

Writes into the folder `--out`: pytest.log, results.json (the machine, all rows), results.csv,
one PNG a benchmark where matplotlib is installed. Prints a short table last. Stages share
`--minutes`; one that fails or runs out of time does not stop the next, and makes the exit code 1;
what it measured until then is kept.
Needs no network, and of packages torch, triton, transformers, sentencepiece, pillow, pytest,
hypothesis and pytest-benchmark. Liger-Kernel, where installed, is timed beside the others.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import measure, plot

ROOT = Path(__file__).parents[1]
TUNED = ("decode_1", "decode_8", "few_500_13k", "prefill_8k_13k")  # a case for each kernel
STAGES: dict[str, list[str]] = {  # name -> arguments of python
    "suite": ["-m", "pytest", "-m", "kernel or gpu", "-p", "no:cacheprovider", "--maxfail=20"],
    "attend": ["-m", "bench", "attend"],
    "memory": ["-m", "bench", "memory"],
    "mixin": ["-m", "bench", "mixin"],
    "project": ["-m", "bench", "project"],
    "tune project": ["-m", "bench", "project", "--tune", "--sizes", "2B", "--tiles", "13", "52"],
    "vision": ["-m", "bench", "vision"],
    "tune attend": ["-m", "bench", "attend", "--tune", "--cases", *TUNED],
    "rotary": ["-m", "bench", "rotary"],
    "positions": ["-m", "bench", "positions"],
    "chat": ["-m", "bench", "chat", "--dtype", "bfloat16", "--tokens", "32"],
    "decode": ["-m", "bench", "decode", "--dtype", "bfloat16"],
    "tune mixin": ["-m", "bench", "mixin", "--tune", "--sizes", "2B", "--cases", "decode_1"],
    "tune memory": ["-m", "bench", "memory", "--tune", "--sizes", "2B", "--tiles", "13"],
    "tune rotary": ["-m", "bench", "rotary", "--tune", "--cases", "pack_16k"],
}
SUITE_SHARE = 0.45  # of the time, at most
# Seconds, at most, of stages whose compiled rivals take their time: what they measured counts.
LIMITS = {"attend": 110, "memory": 60, "mixin": 70, "tune attend": 50, "rotary": 60, "chat": 90}
LIMITS |= {"project": 60, "tune project": 40, "vision": 40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=8.5, help="for all stages together")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        raise SystemExit("python -m bench gpu: needs a GPU, torch sees none")
    if options.out is None:
        raise SystemExit("python -m bench gpu: needs --out, a folder for what it measures")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    outcome: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for name in options.stages:
        left = deadline - time.monotonic()
        limit = left * SUITE_SHARE if name == "suite" else min(left, LIMITS.get(name, left))
        began = time.monotonic()
        said, found = _run_stage(name, limit, options.out)
        seconds = time.monotonic() - began
        outcome.append({"stage": name, "seconds": round(seconds), "outcome": said})
        print(f"{name}: {said}, {seconds:.0f} s", flush=True)
        rows += found
        measure.write("results", rows or outcome, measure.describe_machine(), options.out)
    plot.draw(rows, options.out)
    options.failed = any(row["outcome"] != "passed" for row in outcome)
    if rows:
        measure.show(digest(rows))
    return outcome


def _run_stage(name: str, limit: float, out: Path) -> tuple[str, list[dict[str, Any]]]:
    """How a stage ended, and the rows that it measured."""
    if limit < 5:
        return "no time left", []
    suite = name == "suite"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *STAGES[name], *([] if suite else ["--out", folder])]
        environment = os.environ | {"PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"}
        environment.pop("TRITON_INTERPRET", None)
        log = out / ("pytest.log" if suite else "bench.log")
        with log.open("a") as file:
            file.write(f"--- {' '.join(command)}\n")
            file.flush()
            code: int | None = None  # out of time
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=False,
                ).returncode
        said = "passed" if code == 0 else f"failed, exit code {code}: see {log.name}"
        if code is None:
            said = f"out of time after {limit:.0f} s"
        elif code:
            tail = "\n".join(log.read_text().splitlines()[-30:])
            print(tail, flush=True)
        rows = [
            {"bench": file.stem, **row}
            for file in sorted(Path(folder).glob("*.json"))
            for row in json.loads(file.read_text())["rows"]
        ]
        return said, rows


def _python_path() -> str:
    return os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)


def digest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each case of ours: what it reaches, and how many times longer others take."""
    told = []
    same = ("bench", "case", "pass")
    first: dict[tuple[Any, ...], dict[str, Any]] = {}  # way of ours of each case
    for row in rows:
        if row["way"].split()[0] == "ours" and row["pass"] != "tune":
            first.setdefault(tuple(row[name] for name in same), row)
    reached = ("us", "of_copy", "of_limit", "host_us", "graph_us")
    for row in first.values():
        line = {name: row.get(name, "") for name in (*same, *reached)}
        for other in rows:
            if (
                all(other[name] == row[name] for name in same)
                and "us" in other
                and other is not row
            ):
                line[f"/ {other['way']}"] = other["us"] / row["us"]
        told.append(line)
    return told
