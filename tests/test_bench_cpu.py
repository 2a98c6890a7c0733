"""Benchmarks of a CPU's linear layers and of where time goes: rows, and what they say."""

import copy
import itertools

import pytest
import torch
from timed import options_of

from bench import linear, profile

pytestmark = pytest.mark.usefixtures("one_thread", "made_up_limits")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_way_of_a_product_is_timed(monkeypatch, dtype):
    monkeypatch.setattr(linear, "SHAPES", ((1024, 256),))
    monkeypatch.setattr(linear, "BYTES", 2**22)
    monkeypatch.setattr(linear, "SECONDS", 0.0)
    monkeypatch.setenv("COMEMO_LINEAR", "defaults")
    words = ("--dtypes", dtype, "--rows", "1", "16", "--no-compile")
    rows = list(linear.run(options_of(linear, *words)))
    ways = [(row["rows"], row["way"].split(" ")[0]) for row in rows]
    if dtype == "float32":
        assert ways[:3] == [(1, "ours"), (1, "onednn"), (1, "torch")]
        assert ways[3:] == [(16, way) for way in ("ours", "turned", "onednn", "torch")]
    else:
        assert ways[3:] == [(16, way) for way in ("ours", "widened", "torch")]
    for row in rows:
        assert row["of_limit"] == pytest.approx(row["limit_us"] / row["us"])
        assert row["relative_error"] < (1e-6 if dtype == "float32" else 1e-2)


def test_profiled_operators_add_up_to_each_part(loaded, monkeypatch):
    monkeypatch.setattr(profile, "draw_model", lambda *_: copy.deepcopy(loaded[0]))
    words = ("--cols", "1", "--rows", "1", "--batch", "2")
    rows = list(profile.run(options_of(profile, *words)))
    parts = {name: list(own) for name, own in itertools.groupby(rows, lambda row: row["pass"])}
    assert list(parts) == ["vision", "prefill", "decode"]
    for own in parts.values():
        assert sum(row["share"] for row in own) == pytest.approx(1)
        assert own[-1]["operator"] == "others"
        assert all(row["share"] >= profile.LEAST for row in own[:-1])
        assert all(0 < row["seconds"] < 60 for row in own)
    named = {row["operator"] for row in rows}
    assert any("scaled_dot_product" in name for name in named)
    assert not torch.is_inference_mode_enabled()
