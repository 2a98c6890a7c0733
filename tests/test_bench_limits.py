"""Limits of a CPU: rates of the best way, and the least that an answer costs."""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from timed import options_of
from torch.utils.flop_counter import FlopCounterMode

from bench import decode, limits, models
from bench.model_work import prompt_work, step_work
from bench.ways import Limits, Work
from comemo.mixin import MixinLayer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("limits of a CPU"),
]


def test_the_best_way_is_the_limit(monkeypatch):
    monkeypatch.setattr(limits, "reading_rates", lambda: {"sum": 2e10, "dot": 3e10})
    monkeypatch.setattr(limits, "product_rates", lambda dtype: {"matmul": 2e11, "torch": 1e11})
    assert Limits.of("cpu", torch.float32) == Limits(2e11, 3e10)
    monkeypatch.setattr(limits, "reading_rates", lambda: {"sum": 4e10, "dot": 3e10})
    assert limits.read_rate("cpu") == 4e10


def test_rates_are_of_the_fastest_call():
    # The start; for each call its start and end, from the third on after a look at the clock.
    clock = iter([0.0, 1.0, 4.0, 4.0, 6.0, 6.0, 6.0, 9.0, 9.0])
    with mock.patch.object(limits, "time", SimpleNamespace(perf_counter=clock.__next__)):
        assert limits.best_seconds({"a": lambda: None}, budget=6.0) == {"a": 2.0}


def test_measured_rates():
    """Of a small buffer and product: every way is timed, and each takes some time."""
    with mock.patch.object(limits, "best_seconds", side_effect=_call):
        read = limits.reading_rates(4000)
        products = limits.product_rates(torch.bfloat16, 8)
    assert read == dict.fromkeys(["sum", "extremes", "dot", "sum of bfloat16"], 4000 / 0.5)
    assert set(products.values()) == {2 * 8**3 / 0.5}
    assert len(products) > 1


def _call(ways, *_):
    for way in ways.values():
        way()
    return dict.fromkeys(ways, 0.5)


def test_a_step_reads_weights_cache_and_memory_once(model):
    """The tiny model: 4 bytes an element; all of the decoder but the projection of images."""
    text = model.config.text_config
    mixins = [module for module in model.modules() if isinstance(module, MixinLayer)]
    unread = sum(layer.kv_proj.weight.nbytes for layer in mixins)
    weights = sum(p.nbytes for p in model.model.language_model.layers.parameters()) - unread
    weights += model.lm_head.weight.nbytes
    token = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers * 4
    image = 2 * sum(layer.num_heads * layer.head_dim for layer in mixins) * 4
    assert step_work(model, [0]).moved == weights
    assert step_work(model, [10, 20], [256, 256], 512).moved == weights + 30 * token + 512 * image
    shared = step_work(model, [10, 20], [256, 256], 256)
    assert shared.moved == weights + 30 * token + 256 * image
    assert shared.flops == step_work(model, [10, 20], [256, 256], 512).flops


def test_flops_are_those_of_the_products(model):
    """Counted by PyTorch, which counts attention of all pairs, too."""
    inputs, image, memory = models.draw_prompts(model, (2, 1), 1)
    text, N, M = model.config.text_config, inputs["input_ids"].shape[1], len(memory)
    with torch.no_grad():
        embeds = model.model.embed(inputs["input_ids"], image, memory)
        model.model.language_model.build_memory(memory)
        with FlopCounterMode(display=False) as counter:
            model(
                inputs_embeds=embeds,
                position_ids=inputs["position_ids"],
                image_memory=memory,
                use_cache=False,
                logits_to_keep=1,
            )
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    heads = text.num_attention_heads * text.head_dim * text.num_hidden_layers
    mixin = sum(m.num_heads * m.head_dim for m in model.modules() if isinstance(m, MixinLayer))
    attended = 4 * (heads * N * (N + 1) / 2 + mixin * N * M)
    assert prompt_work(model, N, 0, M, 0).flops - attended == pytest.approx(products, rel=0.01)


def test_the_limit_of_a_step_is_the_slower_of_reading_and_computing():
    rates = Limits(flop_s=1e11, byte_s=1e10)
    assert rates.us(Work(flops=1e9, moved=1e9)) == pytest.approx(1e5)
    assert rates.us(Work(flops=1e11, moved=1e9)) == pytest.approx(1e6)


def test_rows_of_decoding(loaded, monkeypatch, made_up_limits, capsys):
    """In batches each row's logits are those of the prompt alone: `in_batch` compares them."""
    model = copy.deepcopy(loaded[0])
    monkeypatch.setattr(decode, "draw_model", lambda *_: model)
    words = ("--cols", "2", "--rows", "1", "--tokens", "2", "--vision-tiles", "1")
    rows = list(decode.run(options_of(decode, *words, "--batches", "1", "3")))
    assert [(row["pass"], row["way"]) for row in rows] == [
        ("decode", "memory"),
        ("decode", "recomputed"),
        ("decode, batch 1, own pictures", "memory"),
        ("decode, batch 3, one picture", "memory"),
        ("decode, batch 3, own pictures", "memory"),
    ]
    for row in rows:
        assert row["of_limit"] == pytest.approx(row["limit_s"] / row["token_s"])
    alone, one, same, own = rows[0], *rows[2:]
    assert alone["limit_s"] == one["limit_s"] < same["limit_s"] <= own["limit_s"]
    assert own["memory_mib"] == pytest.approx(3 * same["memory_mib"])
    assert own["tokens_per_s"] == pytest.approx(3 / own["token_s"])
    monkeypatch.setattr(decode.limits, "free_bytes", lambda: 1000)
    assert len(list(decode.run(options_of(decode, *words, "--batches", "3")))) == 2
    assert "batch 3, own pictures is not timed: needs" in capsys.readouterr().out
