"""The plan of a run counts what the loader gives out."""

import itertools
import json
from collections import Counter

import pytest
from conftest import SLOW
from PIL import Image
from train_lines import (
    loader_of,
    settings_for,
    small_config,
    talk,
    words,  # noqa: F401
    write_lines,
    write_meta,
    write_picture,
)

from comemo.train.data.plan import plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mixed(tmp_path):
    wide = write_picture(tmp_path / "w.png", 120, 56)
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (120, 56)).save(tmp_path / "t.jpg", exif=turned)
    lines = [talk(f"what {j}?", "a boat", image=[wide, "t.jpg"][j % 2]) for j in range(7)]
    lines += [b"{", b"[]", talk("<video>\nwhat?", "a film", video=[wide] * 9)]
    write_lines(tmp_path / "a.jsonl", lines)
    write_lines(tmp_path / "b.jsonl", [talk(f"say {j}", "y" * (j + 1)) for j in range(9)])
    meta = {
        "a": {"root": "", "annotation": "a.jsonl", "data_augment": True, "max_dynamic_patch": 4},
        "b": {"root": "", "annotation": "b.jsonl", "repeat_time": 1.5},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return str(tmp_path / "meta.json")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize(
    ("epochs", "mixing", "restart"), [(2, "length", False), (1.5, "sqrt", True)]
)
def test_a_plan_is_what_is_read(words, mixed, workers, epochs, mixing, restart):
    settings = settings_for(
        mixed, workers=workers, mixing=mixing, restart=restart, min_frames=2, max_frames=9
    )
    found = plan(settings, words, small_config(), total=3, seed=1, epochs=epochs)
    packs, tokens, labels, tiles, samples = [], Counter(), Counter(), Counter(), Counter()
    for stream in range(3):
        loader = loader_of(words, settings, [stream], 3, epochs=epochs)
        batches = list(itertools.takewhile(lambda batch: batch["samples"], loader))
        packs.append(len(batches))
        for batch in batches:
            bounds = batch["cu_seqlens"].tolist()
            for (name, _, _), (start, end) in zip(
                batch["samples"], itertools.pairwise(bounds), strict=True
            ):
                samples[name] += 1
                tokens[name] += end - start
                labels[name] += int((batch["labels"][0, start:end] != -100).sum())
            tiles["all"] += len(batch.get("pixel_values", ()))
    assert [sum(part) for part in found.packs] == packs
    assert [len(part) for part in found.packs] == [2] * 3
    assert found.steps == max(packs)
    for name, part in found.datasets.items():
        assert (part.samples, part.tokens, part.labels) == (
            samples[name],
            tokens[name],
            labels[name],
        )
    assert found.samples == samples.total()
    assert found.tokens == tokens.total()
    assert found.labels == labels.total()
    assert found.tiles == tiles["all"]
    assert found.padding == 0
    assert found.filled == pytest.approx(tokens.total() / sum(packs) / settings.max_tokens)
    assert found.datasets["a"].bad == {"broken JSON": 1, "not an object": 1}
    assert (found.datasets["a"].lines, found.datasets["b"].lines) == (10, 9)
    assert found.faults.total == 2


def test_a_video_may_be_bad_at_times(words, tmp_path):
    """With many frames it has more tiles than a pack holds."""
    picture = write_picture(tmp_path / "w.png", 56, 56)
    films = [talk(f"what {j}?", "a film", video=[picture] * 9) for j in range(12)]
    path = write_lines(tmp_path / "a.jsonl", films)
    settings = settings_for(path, min_frames=2, max_frames=9, max_tiles=5)
    found = plan(settings, words, small_config(), total=1, seed=1, epochs=2)
    loader = loader_of(words, settings, epochs=2)
    batches = list(itertools.takewhile(lambda batch: batch["samples"], loader))
    assert sum(found.packs[0]) == len(batches)
    assert found.samples == sum(len(batch["samples"]) for batch in batches)
    assert 24 - found.samples == loader.faults.counts["a"]["larger than a pack"] > 4
    assert found.samples > 4


def test_plans_that_cannot_be_made(words, tmp_path):
    meta = write_meta(tmp_path, {"a": 3, "b": 2})
    write_lines(tmp_path / "b.jsonl", [b"{", b"["])
    arguments = {"total": 1, "seed": 0, "epochs": 1}
    with pytest.raises(ValueError, match=r"dataset 'b' .* must have a sample .*2 x broken JSON"):
        plan(settings_for(meta), words, small_config(), **arguments)
    with pytest.raises(ValueError, match=r"b\.jsonl:1: broken JSON"):
        plan(settings_for(meta, bad_data="stop"), words, small_config(), **arguments)
    left_out = settings_for(meta, mixing={"a": 1, "b": 0})
    assert plan(left_out, words, small_config(), **arguments).datasets["b"].lines == 0
    for epochs in (None, 0, "2"):
        with pytest.raises(ValueError, match="epochs must be a number"):
            plan(left_out, words, small_config(), **{**arguments, "epochs": epochs})
