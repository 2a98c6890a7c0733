"""Everything that a GPU is needed for, in one command: the GPU suite, then the benchmarks.

Writes into the folder `--out`: pytest.log, results.json (the machine, all rows), results.csv,
one PNG a benchmark where matplotlib is installed. Prints a short table last. Stages share
`--minutes`; one that fails or runs out of time does not stop the next, and makes the exit code 1.
Needs no network, and of packages torch, triton, transformers, sentencepiece, pillow, pytest,
hypothesis and pytest-benchmark. Liger-Kernel, where installed, is timed beside the others.
"""

import argparse
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
STAGES: dict[str, list[str]] = {  # name -> arguments of python
    "suite": ["-m", "pytest", "-m", "kernel or gpu", "-p", "no:cacheprovider", "--maxfail=20"],
    "rotary": ["-m", "bench", "rotary"],
    "tune rotary": ["-m", "bench", "rotary", "--tune", "--cases", "pack_16k"],
    "positions": ["-m", "bench", "positions"],
    "decode": ["-m", "bench", "decode", "--dtype", "bfloat16"],
}
SUITE_SHARE = 0.5  # of the time, at most


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
        limit = left * SUITE_SHARE if name == "suite" else left
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
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                return f"out of time after {limit:.0f} s", []
        if code:
            tail = "\n".join(log.read_text().splitlines()[-30:])
            print(tail, flush=True)
            return f"failed, exit code {code}: see {log.name}", []
        rows = [
            {"bench": file.stem, **row}
            for file in sorted(Path(folder).glob("*.json"))
            for row in json.loads(file.read_text())["rows"]
        ]
        return "passed", rows


def _python_path() -> str:
    return os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)


def digest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each case of ours: what it reaches, and how many times longer others take."""
    told = []
    for row in (row for row in rows if row["way"] == "ours"):
        same = ("bench", "case", "pass")
        line = {name: row.get(name, "") for name in (*same, "us", "of_copy", "host_us", "graph_us")}
        for other in rows:
            if (
                all(other[name] == row[name] for name in same)
                and "us" in other
                and other is not row
            ):
                line[f"/ {other['way']}"] = other["us"] / row["us"]
        told.append(line)
    return told
