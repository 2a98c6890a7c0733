"""Importing comemo_kernels loads torch, triton and einops, and costs little beyond torch itself."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

MODULES = """
import sys, torch, triton.language
before = set(sys.modules)
import comemo_kernels
print(*sorted(set(sys.modules) - before))
"""
SECONDS = """
import time
start = time.process_time()
import torch
middle = time.process_time()
import comemo_kernels
print(middle - start, time.process_time() - middle)
"""


def run(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_no_other_package_is_imported():
    """Neither heavy parts of torch (its compiler, ONNX) nor transformers."""
    found = [name for name in run(MODULES) if name.split(".")[0] != "comemo_kernels"]
    assert {name.split(".")[0] for name in found} <= {"einops"}


@pytest.mark.slow
def test_the_import_takes_at_most_300_ms():
    """CPU time, the least of five runs; on a slow machine relative to torch, which takes 1.1 s."""
    runs = [[float(seconds) for seconds in run(SECONDS)] for _ in range(5)]
    torch_seconds, ours = map(min, zip(*runs, strict=True))
    assert ours <= 0.3 * max(torch_seconds / 1.1, 1.0)
