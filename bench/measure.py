"""Shared by all measurements: the machine, clocks, bandwidth, memory, tables and files."""

import argparse
import contextlib
import csv
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import comemo_kernels as ops
from bench import progress

ROOT = Path(__file__).parents[1]


def describe_machine() -> dict[str, Any]:
    """Processor, threads, versions, commit and date of this run."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        **_describe_gpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _describe_gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": "none"}
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        answer = f"unknown ({error})"
    return {"gpu": torch.cuda.get_device_name(), query: answer}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """From COMEMO_COMMIT, from git, or from the file `.commit` in a copy without a repository."""
    if commit := os.environ.get("COMEMO_COMMIT"):
        return commit
    if (ROOT / ".git").exists():  # otherwise git would look in the parent folders
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            changed = _git("status", "--porcelain", "--untracked-files=no")
            return _git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    file = ROOT / ".commit"
    return file.read_text().strip() if file.is_file() else "unknown"


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def add_all(parser: argparse.ArgumentParser) -> None:
    """The argument of every benchmark that measures fewer cases on a CPU; see `few`."""
    words = "every case; on a CPU the default is what two cores measure in two minutes"
    parser.add_argument("--all", action="store_true", help=words)


def few(options: argparse.Namespace) -> bool:
    """Whether a benchmark measures few cases where none are given: on a CPU, without --all."""
    return default_device() == "cpu" and not options.all


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    """Seconds of a clock, read after a sync of the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    """Median wall time of `run` in seconds, without a warm-up."""
    times = []
    for _ in range(repeats):
        start = now()
        run()
        times.append(now() - start)
    return statistics.median(times)


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 20th and 80th percentile over the rounds."""

    us: float
    low_us: float
    high_us: float


def compare(
    ways: dict[str, Callable[[int], Any]], sets: int, device: str, rounds: int = 15
) -> dict[str, Timing]:
    """Time several ways to compute one thing, interleaved.

    Args:
        ways: name -> a call on input set i. With enough sets every call finds cold caches.
        sets: number of input sets; a round calls each once.
        device: where the work runs. On a GPU a round is timed by events, and the GPU is kept busy
            until the host has queued the round, so that launch latencies do not count.
        rounds: of each way, after one more as a warm-up.
    """
    seconds_of: dict[str, list[float]] = {name: [] for name in ways}
    queueing = dict.fromkeys(ways, 2e-3)  # seconds in which the host queues a round
    for turn in range(rounds + 1):
        for name, way in ways.items():
            progress.tell(f"{name}, round {turn} of {rounds}")
            if device == "cuda":
                seconds, queueing[name] = _gpu_round(way, sets, queueing[name])
            else:
                seconds = _cpu_round(way, sets)
            if turn:
                seconds_of[name].append(seconds / sets)
    timings = {}
    for name, found in seconds_of.items():
        found.sort()
        fifth = len(found) // 5
        marks = statistics.median(found), found[fifth], found[-1 - fifth]
        timings[name] = Timing(*(1e6 * mark for mark in marks))
    return timings


def _cpu_round(way: Callable[[int], Any], sets: int) -> float:
    start = time.perf_counter()
    for i in range(sets):
        way(i)
    return time.perf_counter() - start


def _gpu_round(way: Callable[[int], Any], sets: int, queueing: float) -> tuple[float, float]:
    """Seconds of the GPU, and seconds in which the host queued the round."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # In cycles, at most 2 GHz. A way with a sync waits for this, too, so it is bounded.
    torch.cuda._sleep(int(2e9 * min(1.5 * queueing, 0.05)))
    began = time.perf_counter()
    start.record()
    for i in range(sets):
        way(i)
    end.record()
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, queued


def host_us(call: Callable[[], Any], calls: int = 300) -> float:
    """Microseconds that a call takes on the host, without a sync: best of 6 rounds."""
    best = math.inf
    for _ in range(6):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return 1e6 * best


def graph_us(call: Callable[[], Any], calls: int = 50) -> float:
    """Microseconds of a call in a CUDA graph of `calls` such calls."""

    def repeat() -> None:
        for _ in range(calls):
            call()

    replay = ops.capture(repeat, "cuda", warmups=1)
    return compare({"graph": lambda _: replay()}, 1, "cuda")["graph"].us / calls


def extra_mib(call: Callable[[], Any]) -> float:
    """MiB of GPU memory that a call allocates at its peak, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy that exceeds all caches."""
    elements = 2**30 if device == "cuda" else 2**27
    source = torch.randn(elements // 2**10, device=device).repeat(2**10)
    target = torch.empty_like(source)
    timing = compare({"copy": lambda _: target.copy_(source)}, 1, device, rounds=9)
    return 2e6 * source.nbytes / timing["copy"].us


def cache_bytes(device: str) -> int:
    """Bytes of inputs that evict everything else from the cache."""
    if device == "cpu":
        return 2**28
    return 3 * torch.cuda.get_device_properties(0).L2_cache_size


def cold_sets(device: str, nbytes: int, most: int) -> int:
    """Input sets of so many bytes that evict each other from the cache: 2 to `most`."""
    return max(2, min(most, -(-cache_bytes(device) // nbytes)))


def peak_gib() -> float:
    """Peak GPU memory, or without a GPU peak resident memory of this process, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    scale = 1 if platform.system() == "Darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def write(name: str, rows: list[dict[str, Any]], machine: dict[str, Any], out: Path) -> None:
    """Write `name`.json with the machine, and `name`.csv, to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    part = out / f"{name}.json.part"  # renamed when complete: an interrupt leaves the previous file
    part.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    part.replace(out / f"{name}.json")
    with (out / f"{name}.csv").open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in machine.items())
        writer = csv.DictWriter(file, _columns(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)


class Table:
    """Prints rows as they come, aligned, and the header whenever the columns change."""

    def __init__(self) -> None:
        self.columns: list[str] = []
        self.widths: dict[str, int] = {}

    def show(self, row: dict[str, Any]) -> None:
        cells = {name: _text(value) for name, value in row.items()}
        for name, cell in cells.items():
            self.widths[name] = max(self.widths.get(name, 9), len(name), len(cell))
        if list(row) != self.columns:
            self.columns = list(row)
            self._print({name: name for name in row})
        self._print(cells)

    def _print(self, cells: dict[str, str]) -> None:
        line = "  ".join(cell.ljust(self.widths[name]) for name, cell in cells.items())
        print(line.rstrip(), flush=True)


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """All columns, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
