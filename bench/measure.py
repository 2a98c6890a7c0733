"""What every measurement needs: the machine in words, a clock, bytes, tables and files."""

import csv
import json
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers


def describe_machine() -> dict[str, Any]:
    """Processor, threads, versions, commit and date of this run."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*command: str) -> str:
    root = Path(__file__).parents[1]
    done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    """Median wall time of `run` in seconds; the caller warms up."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth(gibibytes: float = 1.0) -> float:
    """Bytes per second of a float32 matrix-vector product too large for any cache."""
    rows = int(gibibytes * 2**30 / 4 / 4096)
    matrix, vector = torch.ones(rows, 4096), torch.ones(4096)
    return matrix.nbytes / min(seconds(lambda: matrix @ vector) for _ in range(5))


def peak_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    scale = 1 if platform.system() == "Darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def write(name: str, rows: list[dict[str, Any]], machine: dict[str, Any], out: Path) -> None:
    """`name`.json with the machine, and `name`.csv, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    with (out / f"{name}.csv").open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in machine.items())
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as an aligned table."""
    cells = [list(rows[0])] + [[_text(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
