"""All benchmarks on a GPU in under five minutes, the most important first.

Writes to the folder `--out`: gpu-bench.txt, the summary that is also printed at the end;
gpu-bench.log, the output of the stages; gpu-bench.tar.gz: results.json (the machine, all rows),
results.csv, a plot of each benchmark if matplotlib is installed, the logs. All are rewritten every
few seconds, so an interrupt loses no more than that. A stage that fails or runs out of time does
not stop the next; its rows so far count. Needs no network, and the packages torch, triton,
transformers, sentencepiece, pillow and safetensors.
"""

import argparse
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import digest, measure, plot, stages
from bench.stages import Stage

# A case for each kernel. Also a prompt of one image: with several, keys are rotated first.
TUNED = ("decode_1", "prefill_8k_3k", "prefill_8k_13k", "decode_8", "few_500_13k")
# The largest products, samples of uneven lengths, samples of one block of keys, a short row.
TRAINED = ("16k_1_many", "16k_8_many", "16k_64_one", "4k_8_one")
CHAT = ("chat", "--dtype", "bfloat16", "--tokens", "32")
DROPIN = ("internvl", "mllama")  # open_flamingo only where it is installed
RECIPE = ("--ways", "ours", "published")
STAGES: dict[str, tuple[float, list[str]]] = {  # name -> seconds, arguments of `python -m bench`
    "compile": (34, []),
    "attend": (38, ["attend", "--few-compiled"]),
    "tune attend": (26, ["attend", "--tune", "--cases", *TUNED]),
    "memory": (17, ["memory", "--few-compiled"]),
    "tune memory": (12, ["memory", "--tune", "--sizes", "2B", "--tiles", "13"]),
    "train": (26, ["train", "--no-compile", "--sizes", "2B", "--cases", *TRAINED]),
    "tune train": (12, ["train", "--tune", "--sizes", "2B", "--cases", *TRAINED[:2]]),
    "mixin": (18, ["mixin", "--few-compiled"]),
    "tune mixin": (8, ["mixin", "--tune", "--sizes", "2B", "--cases", "decode_1"]),
    "project": (14, ["project", "--few-compiled"]),
    "tune project": (8, ["project", "--tune", "--sizes", "2B", "--tiles", "13", "52"]),
    "rotary": (20, ["rotary", "--few-compiled"]),
    "tune rotary": (5, ["rotary", "--tune", "--cases", "pack_16k"]),
    "decode": (20, ["decode", "--dtype", "bfloat16"]),
    "chat": (26, [*CHAT, "--ways", "ours", "published"]),
    "dropin": (14, ["dropin", "--models", "published"]),
    "dropin others": (10, ["dropin", "--models", *DROPIN, "--layers", "10", "--tokens", "16"]),
    "recipe": (32, ["recipe", "--stages", "finetune", "--steps", "2", *RECIPE]),
    "vision": (6, ["vision"]),
    "positions": (4, ["positions"]),
    # Last, with the remaining time: most of it is compilation.
    "train compiled": (8, ["train", "--sizes", "2B", "--cases", "16k_8_many"]),
    "chat compiled": (
        8,
        [*CHAT, "--batches", "1", "--ways", "ours", "torch.compile, static cache"],
    ),
}

NOT_TIMED = re.compile(" is not timed: | cannot be captured: ")  # messages of `bench.ways`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=4.6, help="for all stages together")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))


def run(options: argparse.Namespace) -> int:
    """Exit code: 1 if a stage failed; running out of time is no failure."""
    if not torch.cuda.is_available():
        raise SystemExit("python -m bench gpu-bench: needs a GPU, torch sees none")
    options.out.mkdir(parents=True, exist_ok=True)
    machine = measure.describe_machine()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        chosen = [_stage(name, folder) for name in STAGES if name in options.stages]
        stages.share(chosen, options.minutes)

        def report() -> None:
            _write(machine, chosen, folder, options.out)

        with stages.stopped_in_order():
            stages.run_in_turn(chosen, folder, report)
        _draw(_rows(chosen, folder), folder)
        report()
    print((options.out / "gpu-bench.txt").read_text(), flush=True)
    return int(any(stage.failed for stage in chosen))


def _stage(name: str, folder: Path) -> Stage:
    seconds, words = STAGES[name]
    if name == "compile":
        return Stage(name, [sys.executable, "-m", "bench.warm"], seconds)
    out = folder / name.replace(" ", "-")
    command = [sys.executable, "-m", "bench", *words, "--wait", "--out", str(out)]
    return Stage(name, command, seconds, waits=True)


def _rows(chosen: Sequence[Stage], folder: Path) -> list[dict[str, Any]]:
    return [
        {"bench": file.stem, **row}
        for stage in chosen
        for file in sorted((folder / stage.name.replace(" ", "-")).glob("*.json"))
        for row in json.loads(file.read_text())["rows"]
    ]


def _draw(rows: list[dict[str, Any]], folder: Path) -> None:
    try:
        plot.draw([row for row in rows if row["pass"] != "tune"], folder)
    except Exception:  # no reason to lose the numbers
        traceback.print_exc()


def _write(machine: dict[str, Any], chosen: Sequence[Stage], folder: Path, out: Path) -> None:
    """Write all files with the results so far."""
    rows = _rows(chosen, folder)
    measure.write("results", rows, machine, folder)
    stages.join_logs(out / "gpu-bench.log", chosen, folder)
    left_out = [name for name in STAGES if name not in {s.name for s in chosen if s.took}]
    printed = [line for stage in chosen for line in stages.read_log(stage, folder)]
    left_out += [line[:160] for line in dict.fromkeys(printed) if NOT_TIMED.search(line)]
    table = stages.describe("gpu-bench", machine, chosen)
    parts = [
        ("configurations, of which the first is used:", digest.choose(rows)),
        ("ours, and others relative to its time:", digest.compare(rows)),
        ("left out:", left_out),
        *stages.reasons(chosen, folder),
    ]
    stages.write_archive(out / "gpu-bench.tar.gz", folder)
    stages.write_whole(out / "gpu-bench.txt", f"{table}\n{digest.fit(parts)}\n")
