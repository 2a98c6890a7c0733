"""What tests of the benchmarks share: options, rows, and limits of a machine that is made up."""

import argparse
import math

import torch

from bench.ways import Clock, Limits

GEMM, COPY = 1e12, 1e10  # FLOP/s and bytes/s, see `made_up_limits` of conftest.py


def options_of(module, *words):
    """A benchmark's options for these words of its command line."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    options = parser.parse_args(words)
    options.out = None
    return options


def rows_of(module, *words):
    """Rows of one round, and whether a case failed."""
    options = options_of(module, *words, "--rounds", "1")
    rows = list(module.run(options))
    for row in rows:
        numbers = [value for value in row.values() if not isinstance(value, str)]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        assert row["low_us"] <= row["us"] <= row["high_us"]
    return rows, getattr(options, "failed", False)


def clock():
    return Clock("cpu", torch.float32, Limits(GEMM, COPY), rounds=1)
