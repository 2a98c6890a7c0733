"""The benchmark of models that people already run: rows, and models of the published sizes."""

import pytest
import torch
import virtual_gpu
from conftest import GPU
from patching import prompt_of, tiny_published
from timed import options_of

from bench import dropin, dropin_models
from bench.published_model.cached import add_cache, remove_cache
from bench.published_model.chat_model import repair_generate

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("the benchmark puts models where they are timed"),
]


def tiny(*_):
    model = repair_generate(tiny_published())

    def generate(**options):
        return model.generate(**prompt_of((2, 1)), **options)[0, -options["max_new_tokens"] :]

    return dropin_models.Subject(
        model, generate, "tiny", {"with a simple cache": (add_cache, remove_cache)}
    )


@pytest.mark.slow
def test_rows(monkeypatch):
    monkeypatch.setattr(dropin, "SUBJECTS", {"published": tiny})
    options = options_of(dropin, "--models", "published", "--tokens", "6", "--dtype", "float32")
    rows = list(dropin.run(options))
    assert [row["way"] for row in rows] == ["ours, patched", "with a simple cache", "as shipped"]
    assert all(row["same_tokens"] for row in rows)
    assert all(0 < row["token_s"] < 60 for row in rows)
    assert all(row["tokens_per_s"] == pytest.approx(1 / row["token_s"]) for row in rows)
    assert 0 < rows[0]["patch_s"] < 1


def test_the_simple_cache_computes_what_is_published():
    model = repair_generate(tiny_published())
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    wanted = [model.generate(**prompt_of(*grids), **options) for grids in ([(2, 1)], [(1, 2)])]
    calls = []
    block = model.language_model.model.layers[1].gated_cross_attn_layer
    block.cross_attn.to_kv.register_forward_hook(lambda *_: calls.append(1))
    add_cache(model)
    found = [model.generate(**prompt_of(*grids), **options) for grids in ([(2, 1)], [(1, 2)])]
    assert all(map(torch.equal, wanted, found))
    assert len(calls) == 2  # one for each call of generate
    remove_cache(model)
    assert torch.equal(model.generate(**prompt_of((2, 1)), **options), wanted[0])


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="make gpu-bench runs them")
@pytest.mark.parametrize("name", dropin_models.SUBJECTS)
def test_real_widths_on_a_virtual_gpu(monkeypatch, name):
    """One tile and few layers: that models, inputs and ways fit together where there is a GPU."""
    monkeypatch.setattr(dropin_models, "GRID", (1, 1))
    options = options_of(
        dropin, "--models", name, "--layers", "4", "--tokens", "3", "--dtype", "float32"
    )
    virtual_gpu.faults.clear()
    with virtual_gpu.present():
        rows = list(dropin.run(options))
    assert not virtual_gpu.faults
    assert all(row["same_tokens"] for row in rows)
