"""The model on kernels: the reference's results, and a decode step without a graph break."""

import inspect

import pytest
import torch
from conftest import SLOW, SLOW_ON_CPU, TRACED
from harness import LOGITS, assert_relative
from torch._dynamo.testing import CompileCounter

import comemo_kernels as ops
from comemo import CoMemoConfig, CoMemoForConditionalGeneration
from comemo.cli.tiny_checkpoint import spread_weights
from comemo_kernels import reference

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def model(device):
    """A model of few tokens, 16 a tile, because the interpreter is slow."""
    torch.manual_seed(0)
    llm = {"vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64}
    llm |= {"num_attention_heads": 4, "num_key_value_heads": 1}
    vision = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    vision |= {"num_attention_heads": 2, "image_size": 112, "patch_size": 14}
    mixin = {"language_dim": 64, "vision_dim": 64, "head_dim": 24, "num_heads": 2}
    mixin |= {"intermediate_size": 64, "mixin_every_n_layers": 2}
    config = CoMemoConfig(
        llm_config=llm, vision_config=vision, mixin_config=mixin, image_token_id=299
    )
    model = CoMemoForConditionalGeneration(config)
    spread_weights(model)
    return model.eval().to(device)


@pytest.fixture
def on_reference(monkeypatch):
    """Call it to run the model without kernels from then on."""

    def switch():
        for name in reference.__all__:
            monkeypatch.setattr(ops, name, getattr(reference, name))

    return switch


def prompts(model, grids, text=9):
    """Prompts of one image each, padded on the left, on the model's device."""
    config = model.config
    tiles = [ops.image_tokens(grid, config.side) // config.tokens_per_tile for grid in grids]
    width = max(tiles) * config.tokens_per_tile + text
    input_ids = torch.randint(10, 200, (len(grids), width))
    mask = torch.ones_like(input_ids)
    for row, count in enumerate(tiles):
        tokens = count * config.tokens_per_tile
        mask[row, : width - tokens - text] = 0
        input_ids[row, width - tokens - text // 2 :][:tokens] = config.image_token_id
    side = config.vision_config.image_size[0]
    batch = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(sum(tiles), 3, side, side),
    }
    return {n: t.to(model.device) for n, t in batch.items()} | {"tile_grid": list(grids)}


def test_logits_and_gradients_are_the_references(model, on_reference):
    batch = prompts(model, [(2, 1), (1, 1)])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def learn():
        model.zero_grad(set_to_none=True)
        out = model(**batch, labels=labels)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return out.logits.detach(), grads

    logits, grads = learn()
    on_reference()
    wanted, wanted_grads = learn()
    assert (logits - wanted).abs().max() < LOGITS
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        if name.endswith("k_proj.bias"):  # softmax cancels it: its gradient is rounding
            continue
        assert_relative(grad, wanted_grads[name], name)


@SLOW_ON_CPU
def test_generated_tokens_are_the_references(model, on_reference):
    batch = prompts(model, [(2, 1), (1, 1)])
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    ours = model.generate(**batch, **options)
    on_reference()
    assert torch.equal(ours, model.generate(**batch, **options))


@pytest.mark.slow
def test_folded_tokens_are_the_references(model, on_reference):
    batch = prompts(model, [(2, 1), (1, 1)])
    options = {"max_new_tokens": 4, "do_sample": False}
    model.requires_grad_(False)
    with model.fold_for_inference():
        ours = model.generate(**batch, **options)
    model.requires_grad_(True)
    on_reference()
    assert torch.equal(ours, model.generate(**batch, **options))


@pytest.mark.parametrize("tokens", [pytest.param(2, marks=SLOW)])
@TRACED
def test_decode_step_compiles_whole(model, tokens):
    counter, eager = CompileCounter(), model.forward
    compiled = torch.compile(eager, fullgraph=True, backend=counter)

    def forward(*args, **kwargs):
        step = compiled if kwargs["input_ids"].shape[1] == 1 else eager
        return step(*args, **kwargs)

    forward.__signature__ = inspect.signature(eager)
    frames = []
    options = {"max_new_tokens": tokens, "do_sample": False, "cache_implementation": "static"}
    for text in (6, 7, 8):
        batch = prompts(model, [(1, 1)], text)
        model.forward = forward
        try:
            found = model.generate(**batch, **options)
        finally:
            del model.forward
        frames.append(counter.frame_count)
    assert torch.equal(found, model.generate(**batch, **options))
    assert frames[0] >= 1
    assert frames[-2] == frames[-1] <= 4
