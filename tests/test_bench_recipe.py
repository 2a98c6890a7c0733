"""The benchmark of a training step: its packs, its ways, what is not timed."""

import pytest
import torch
from timed import options_of

from bench import recipe
from bench.recipe_batch import draw_batch, tiles_of_samples
from comemo import CoMemoConfig

pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_heap"),
    pytest.mark.no_virtual_gpu("the benchmark puts models where they are timed"),
]


@pytest.mark.parametrize(
    ("tokens", "tiles", "samples"), [(2048, 6, 8), (16384, 48, 8), (300, 1, 3)]
)
def test_a_pack_is_full(tokens, tiles, samples):
    config = CoMemoConfig(image_token_id=92546)
    if tiles > 8:
        config.vision_config.image_size = (112, 112)  # pixels are not needed
    tokens = tokens if tiles < 8 else tokens - tiles * (256 - config.tokens_per_tile)
    batch = draw_batch(config, tokens, tiles, samples)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, tokens)
    assert len(batch["pixel_values"]) == tiles
    assert (batch["cu_seqlens"][0], batch["cu_seqlens"][-1]) == (0, tokens)
    counts = tiles_of_samples(batch, config.tokens_per_tile, 92546)
    assert (sum(counts), len(counts)) == (tiles, samples)
    assert all(counts) or tiles < samples
    learnt = batch["labels"] != -100
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
    assert torch.equal(learnt, batch["loss_weights"] > 0)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(recipe, "IMAGE_ID", 450)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    text = {"vocab_size": 500, "num_key_value_heads": 1}
    mixin = {"language_dim": 64, "vision_dim": 64, "intermediate_size": 64}
    for part, values in (
        ("llm_config", sizes | text),
        ("vision_config", sizes | {"image_size": 112, "num_hidden_layers": 1}),
        ("mixin_config", mixin),
    ):
        for name, value in values.items():
            monkeypatch.setitem(recipe.TINY[part], name, value)
    words = ("--tokens", "100", "--tiles", "2", "--samples", "2", "--steps", "1")
    return options_of(recipe, "--size", "tiny", *words, "--dtype", "float32")


def test_rows(small):
    rows = list(recipe.run(small))
    assert [(row["way"], row["pass"]) for row in rows] == [
        (way, stage) for way in recipe.WAYS for stage in recipe.STAGES
    ]
    assert all(row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-4) for row in rows)
    assert all(row["tokens_per_s"] == pytest.approx(100 / row["step_s"]) for row in rows)
    trained = {(row["pass"], round(row["trained_millions"], 6)) for row in rows}
    assert len(trained) == 2  # the same weights in all ways


def test_a_way_with_another_loss_is_not_timed(small, monkeypatch):
    made = recipe._make

    def wrong(config, batch, way):
        model, loss = made(config, batch, way)
        return model, loss if way == "ours" else lambda: loss() * 1.01

    monkeypatch.setattr(recipe, "_make", wrong)
    small.stages = ["finetune"]
    with pytest.raises(RuntimeError, match="ours, whole logits is not timed: its loss is"):
        list(recipe.run(small))


def test_what_does_not_fit_is_told(small, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(recipe, "_make", full)
    assert list(recipe.run(small)) == []
    assert "finetune, published is not timed: out of memory at" in capsys.readouterr().out
