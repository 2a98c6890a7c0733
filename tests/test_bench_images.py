"""Benchmarks of images: projection, vision tower, store."""

import pytest
import torch
from timed import GEMM, options_of, rows_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import project, store, vision

pytestmark = pytest.mark.usefixtures("made_up_limits")


def test_rows_of_the_projection():
    rows, failed = rows_of(project, "--sizes", "tiny", "--tiles", "1", "2", "--no-compile")
    assert not failed
    assert [(row["case"], row["pass"], row["way"]) for row in rows] == [
        (f"tiny {tiles} tiles", name, way)
        for tiles in (1, 2)
        for name in ("forward", "backward")
        for way in ("published", "library", "ours")
    ]
    for row in rows:
        d, W, R = 64, 4096, 256 * int(row["case"].split()[1])
        passes = 3 if row["pass"] == "backward" else 1
        assert row["tflop_s"] == pytest.approx(passes * 2 * R * d * (W + d) / row["us"] / 1e6)


def test_a_wrong_projection_is_not_timed(monkeypatch):
    """If ours is wrong there are no rows; otherwise rows of the correct ways."""
    wrong = project.project_as_published
    monkeypatch.setattr(project, "project_as_published", lambda *args: wrong(*args).flip(1))
    rows, failed = rows_of(project, "--sizes", "tiny", "--tiles", "1", "--no-compile")
    assert {row["way"] for row in rows} == {"library", "ours"}
    ours = project.ops.project_tiles
    monkeypatch.setattr(project.ops, "project_tiles", lambda *a, **k: ours(*a, **k).mul_(1.5))
    rows, failed = rows_of(project, "--sizes", "tiny", "--tiles", "1", "--no-compile")
    assert failed
    assert not rows


def test_rows_of_the_vision_tower(model, monkeypatch):
    monkeypatch.setattr(vision, "draw_model", lambda *_, **__: model)
    words = ("--dtype", "float32", "--tiles", "3", "--at-once", "1", "2")
    rows = list(vision.run(options_of(vision, *words)))
    assert [row["way"] for row in rows] == ["ours, 1 at once", "ours, 2 at once"]
    for row in rows:
        assert row["tiles_s"] == pytest.approx(3e6 / row["us"])
        assert row["pictures_s"] == pytest.approx(row["tiles_s"] / 13)
        assert row["of_limit"] == pytest.approx(row["tflop_s"] * 1e12 / GEMM)


def test_rows_of_a_store(model, monkeypatch):
    monkeypatch.setattr(store, "draw_model", lambda *_: model)
    rows = {row["way"]: row for row in store.run(options_of(store, "--tiles", "1"))}
    assert len(rows) == 7
    for row in rows.values():
        assert row["gb_s"] == pytest.approx(row["mib"] * 2**20 / row["us"] / 1e3)
    summed, digested = list(rows.values())[:2]
    assert summed["mib"] == digested["mib"] > 0
    assert rows["hit in memory"]["mib"] == rows["hit in a file"]["mib"] > 0


def test_flops_of_the_vision_tower(model):
    """Equal to PyTorch's counter."""
    config, tiles = model.config, torch.randn(1, 3, 448, 448, device=model.device)
    vision_config, width = config.vision_config, config.text_config.hidden_size
    whole = sdpa_kernel(SDPBackend.MATH)  # fused attention is not counted on a CPU
    with torch.no_grad(), whole, FlopCounterMode(display=False) as counter:
        model.model.project_images(tiles)
    found = vision.flops_of_tile(vision_config, width, config.tokens_per_tile)
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-6)
