"""All correctness checks on a GPU in under five minutes: the GPU tests, then compute-sanitizer.

Writes to the folder `--out`: gpu-check.txt, the summary that is also printed at the end;
gpu-check.log, the output of the stages; gpu-check.tar.gz: the outcome of each test, every
comparison of the harness, the logs. All are rewritten every few seconds. The tests run in twelve
processes that share compiled kernels; a failure does not stop them. Then memcheck and racecheck run
in parallel, each on one small launch of every kernel (`bench.sanitize`). Needs no network, and the
packages torch, triton, transformers, sentencepiece, pillow, safetensors, pytest, hypothesis and
pytest-benchmark; with pytest-xdist it takes a tenth of the time.
"""

import argparse
import importlib.util
import json
import math
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import comemo_kernels
from bench import digest, measure, stages
from bench.stages import Process, Stage

SUITE = ("-m", "pytest", "-m", "kernel or gpu", "-p", "no:cacheprovider", "-p", "bench.reports")
PARALLEL = ("-n", "12", "--dist", "worksteal")
SECONDS = {"suite": 200.0, "memcheck": 80.0, "racecheck": 80.0}  # the last two in parallel
TOOL, TOOL_FOLDER = "compute-sanitizer", "/usr/local/cuda/bin"  # if it is not on the PATH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=4.6, help="for all stages together")
    parser.add_argument("--stages", nargs="+", choices=SECONDS, default=list(SECONDS))


def run(options: argparse.Namespace) -> int:
    """Exit code: 1 if a stage failed or ran out of time."""
    if not torch.cuda.is_available():
        raise SystemExit("python -m bench gpu-check: needs a GPU, torch sees none")
    options.out.mkdir(parents=True, exist_ok=True)
    machine, deadline = measure.describe_machine(), time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        chosen = [_stage(name, folder) for name in SECONDS if name in options.stages]
        suite = [stage for stage in chosen if stage.name == "suite"]
        tools = [stage for stage in chosen if stage.name != "suite"]
        stages.share([*suite, *tools[:1]], options.minutes)

        def report() -> None:
            _write(machine, chosen, folder, options.out)

        with stages.stopped_in_order():
            stages.run_in_turn(suite, folder, report)
            left = deadline - time.monotonic() - stages.GRACE
            if tools and _find_tool() is None:
                for stage in tools:
                    stage.outcome = f"left out: there is no {TOOL}"
            elif tools and left > 0:
                stages.run_together([Process(stage, folder) for stage in tools], left, report)
        report()
    print((options.out / "gpu-check.txt").read_text(), flush=True)
    return int(any(stage.failed or stage.outcome.startswith("out of") for stage in chosen))


def _stage(name: str, folder: Path) -> Stage:
    if name == "suite":
        parallel = PARALLEL if importlib.util.find_spec("xdist") else ()
        # One thread per process: there are as many processes as cores.
        command = ["env", "OMP_NUM_THREADS=1", sys.executable, *SUITE]
        command += ["--reports", str(folder), *parallel]
    else:
        # The tool does not see the bounds of tensors in PyTorch's cached blocks.
        command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", _find_tool() or TOOL, "--tool", name]
        command += ["--error-exitcode", "99"]
        command += [sys.executable, "-m", "bench.sanitize"]
    return Stage(name, command, SECONDS[name])


def _find_tool() -> str | None:
    return shutil.which(TOOL) or shutil.which(TOOL, path=TOOL_FOLDER)


def _write(machine: dict[str, Any], chosen: Sequence[Stage], folder: Path, out: Path) -> None:
    """Write all files with the results so far."""
    stages.join_logs(out / "gpu-check.log", chosen, folder)
    tests = _lines(folder / "tests.jsonl")
    errors = [line for file in sorted(folder.glob("errors-*.jsonl")) for line in _lines(file)]
    left_out = [f"{name}: not selected" for name in SECONDS if name not in {s.name for s in chosen}]
    skipped = Counter(test["message"] for test in tests if test["outcome"] == "skipped")
    left_out += [f"{count} tests: {reason}" for reason, count in skipped.most_common()]
    if (folder / "collected").is_file():
        missing = int((folder / "collected").read_text()) - len({test["test"] for test in tests})
        left_out += [f"{missing} tests: not run so far"] if missing > 0 else []
    failures, tools = group_failures(tests), [s for s in chosen if s.name != "suite"]
    found_by_tool = [(f"{tool.name}:", _findings(stages.read_log(tool, folder))) for tool in tools]
    parts = [
        ("failures, by message:", failures),
        *found_by_tool,
        *stages.reasons([stage for stage in chosen if stage in tools or not failures], folder),
        ("largest errors, as shares of their budget:", group_errors(errors)),
        ("left out:", left_out),
        ("tests by file:", _count(tests)),
    ]
    table = stages.describe("gpu-check", machine, chosen)
    stages.write_archive(out / "gpu-check.tar.gz", folder)
    stages.write_whole(out / "gpu-check.txt", f"{table}\n{digest.fit(parts)}\n")


def _lines(file: Path) -> list[dict[str, Any]]:
    """Complete lines of a file that may still be written."""
    if not file.is_file():
        return []
    whole = file.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def group_failures(tests: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each message, numbers ignored: how often it occurs, and the name of one test."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for test in tests:
        if test["outcome"] == "failed":
            message = (test["message"].strip() or "?").splitlines()[0]
            groups.setdefault(re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", message), []).append(test)
    lines = []
    for held in sorted(groups.values(), key=len, reverse=True):
        first_line = held[0]["message"].strip().splitlines()[:1]
        lines.append(f"{len(held)}x {''.join(first_line)[:200]}  in {held[0]['test']}")
    return lines


def group_errors(errors: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each op and dtype: the largest share, number of comparisons, output and test."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for error in errors:
        name = error["op"] if error["op"] in comemo_kernels.__all__ else error["file"]
        groups.setdefault((name, error["dtype"]), []).append(error)
    lines = []
    for (name, dtype), held in sorted(groups.items()):
        worst = max(held, key=lambda error: (math.isnan(error["share"]), error["share"]))
        test = worst["test"].rpartition("/")[2]
        words = [f"{worst['share']:.2f}, the largest of {len(held)}", worst["output"], test[:90]]
        lines.append(f"{name} {dtype}: {', '.join(filter(None, words))}")
    return lines


def _count(tests: Sequence[dict[str, Any]]) -> list[str]:
    files: dict[str, Counter[str]] = {}
    for test in tests:
        count = files.setdefault(test["test"].split("::")[0], Counter())
        count[test["outcome"]] += 1
        count["seconds"] += test["seconds"]
    return [
        f"{file}: {', '.join(f'{round(n)} {what}' for what, n in sorted(count.items()))}"
        for file, count in sorted(files.items())
    ]


def _findings(log: Sequence[str]) -> list[str]:
    """Findings of compute-sanitizer: the summaries, then the first lines."""
    findings = [line for line in log if "=====" in line]
    sums = [line for line in findings if "SUMMARY" in line]
    return [
        line.lstrip("= ")[:160] for line in [*sums, *(x for x in findings[:16] if x not in sums)]
    ]
