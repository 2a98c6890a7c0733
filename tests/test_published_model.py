"""The stand-in for the published code computes what the published code computed."""

import contextlib
import importlib.util
import json

import pytest
import torch
from harness import LOGITS, assert_relative, recorded
from safetensors.torch import load_file

import comemo_kernels as ops
from bench.published_model.chat_model import CoMemoChatConfig, CoMemoChatModel, repair_generate

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS = ["a/dhr_2x1", "a/rope_1x1", "a/text_only"]


@pytest.fixture(scope="module")
def model(golden):
    config = json.loads((golden / "ckpt_a/config.json").read_text())
    model = CoMemoChatModel(CoMemoChatConfig(**config)).eval()
    weights = load_file(golden / "ckpt_a/model.safetensors")
    model.load_state_dict({name: t.float() for name, t in weights.items()})
    model.img_context_token_id = 593
    return repair_generate(model)


@pytest.fixture(scope="module")
def draw(golden):
    spec = importlib.util.spec_from_file_location("golden_inputs", golden / "inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tiles


@pytest.mark.parametrize("patched", [False, True], ids=["as published", "patched"])
@pytest.mark.parametrize("name", CHATS)
def test_recorded_chats(golden, model, draw, name, patched):
    chat = json.loads((golden / "generate.json").read_text())[name]
    found = recorded(golden, "generate.safetensors", f"{name}/")
    ids = found["input_ids"].view(1, -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if chat.get("tile_seeds"):
        inputs["pixel_values"] = torch.cat([draw(*seed) for seed in chat["tile_seeds"]])
        inputs["position_ids"] = found["position_ids"].view(1, -1)
        media = found["media_position_ids"].view(1, -1)
        inputs["cross_attention_media_position_ids"] = media
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    with ops.patched(model) if patched else torch.no_grad():
        out = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    scores = torch.stack(out.scores)[:, 0]
    assert (scores - found["step_logits"][:6]).abs().max() < LOGITS
    assert out.sequences[0, -6:].tolist() == found["tokens"][1:7].tolist()


@pytest.mark.parametrize("patched", [False, True], ids=["as published", "patched"])
@pytest.mark.parametrize("case", ["plain", "packed"])
def test_recorded_block_with_gradients(golden, model, case, patched):
    found = recorded(golden, "components.safetensors", f"gated_block/{case}/")
    ids = recorded(golden, "components.safetensors", "gated_block/plain/")
    block = model.language_model.model.layers[1].gated_cross_attn_layer
    block.cross_attn_media_position_ids = ids["media_position_ids"]
    block.cross_attn_text_position_ids = ids["text_position_ids"]
    if case == "packed":
        bounds = recorded(golden, "components.safetensors", "cross_attn/packed/cu_seqlens_")
        block.cross_attn.cu_seqlens_q = bounds["q"].view(1, -1)
        block.cross_attn.cu_seqlens_k = bounds["k"].view(1, -1)
    inputs = {name: found[f"in/{name}"].requires_grad_() for name in ("x", "media")}
    parameters = dict(block.named_parameters())
    with ops.patched(model) if patched else contextlib.nullcontext():
        out = block(**inputs)
    block.cross_attn.cu_seqlens_q = block.cross_attn.cu_seqlens_k = None
    assert_relative(out, found["out"], "out")
    loss = (out * found["loss_weight"]).sum()
    leaves = {f"grad_in/{name}": t for name, t in inputs.items()}
    leaves |= {f"grad_param/{name}": p for name, p in parameters.items()}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        assert_relative(grad, found[name], name)
