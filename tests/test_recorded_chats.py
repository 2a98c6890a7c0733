"""Recorded chats of the published model: tokens, logits and every layer."""

import json

import pytest
import torch
from chats import (  # noqa: F401
    CHATS,
    GREEDY,
    RAW,
    case_of,
    count_builds,
    prepared,
)
from conftest import DEVICE
from harness import CLEAR_MARGIN, LOGITS, assert_relative, recorded
from small import place

import comemo


@pytest.mark.parametrize("name", CHATS)
def test_recorded_chat(golden, inputs, model, tokenizer, name, count_builds):
    record, case = case_of(golden, inputs, name)
    wanted = place(recorded(golden, "generate.safetensors", f"a/{name}/"))
    builds = count_builds()
    ready = prepared(model, tokenizer, case)
    assert torch.equal(ready["position_ids"][0], wanted["position_ids"].long())
    memory = ready["image_memory"]
    assert torch.equal(memory.position_ids, wanted["media_position_ids"].long())
    out = model.generate(
        **ready, **case["generation_config"], **RAW, eos_token_id=record["eos_token_id"]
    )
    logits = torch.cat(out.logits)
    assert logits.shape == wanted["step_logits"].shape
    assert (logits - wanted["step_logits"]).abs().max() < LOGITS
    assert out.sequences[0].tolist() == record["tokens"]
    # The published code built the memory in every layer for every token.
    assert builds() == record["n_mixin"] < record["expected_to_kv"] == record["to_kv_calls"]


@pytest.mark.parametrize("name", CHATS)
def test_recorded_answer(golden, inputs, model, tokenizer, name):
    record, case = case_of(golden, inputs, name)
    history = None if case["history"] is None else list(case["history"])
    answer, new = model.chat(tokenizer, **case, return_history=True)
    assert answer == record["response"]
    assert [list(turn) for turn in new] == record["history_returned"]
    assert case["history"] == history, "the caller's history was changed"


def test_every_recorded_margin_allows_equal_tokens(golden):
    records = json.loads((golden / "generate.json").read_text())
    for name in CHATS:
        margin = records[f"a/{name}"]["min_top2_margin"]
        assert margin > CLEAR_MARGIN or name in ("rope_2x3",), name


def test_recorded_text_only_chat(golden, model, tokenizer, count_builds):
    record = json.loads((golden / "generate.json").read_text())["a/text_only"]
    wanted = place(recorded(golden, "generate.safetensors", "a/text_only/"))
    builds = count_builds()
    question = "hello world, describe a cat"
    prompt, ready = model.prepare_chat(tokenizer, None, [(question, None)])
    assert prompt == record["prompt"]
    out = model.generate(**ready, **GREEDY, **RAW, eos_token_id=589)
    assert out.sequences[0].tolist()[1:] == record["tokens"][-24:]
    if "step_logits" in wanted:
        assert (torch.cat(out.logits) - wanted["step_logits"]).abs().max() < LOGITS
    assert builds() == 0
    assert model.chat(tokenizer, None, question, GREEDY) == record["text"].strip()


@pytest.mark.parametrize("name", ["dhr_2x1", "dhr_two", "rope_2x1"])
def test_recorded_layers(golden, inputs, model, tokenizer, name):
    _, case = case_of(golden, inputs, name)
    wanted = place(recorded(golden, "generate.safetensors", f"a/{name}/"))
    if "prefill_rows" not in wanted:
        pytest.skip("recorded for three chats only")
    rows, ready = wanted["prefill_rows"].long(), prepared(model, tokenizer, case)
    assert_relative(ready["inputs_embeds"][0, rows], wanted["prefill_inputs_embeds"], "embeddings")
    gated, layers, handles = [], [], []
    for layer in model.model.language_model.layers:
        handles.append(layer.register_forward_hook(lambda *a: layers.append(a[-1][0, rows])))
        if layer.mixin is not None:
            handles.append(
                layer.mixin.register_forward_hook(lambda *a: gated.append(a[-1][0, rows]))
            )
    ready.pop("input_ids")
    with torch.no_grad():
        model(**ready)
    for handle in handles:
        handle.remove()
    assert_relative(torch.stack(layers), wanted["prefill_layer_out"], "layers")
    assert_relative(torch.stack(gated), wanted["prefill_gated_out"], "mixin layers")


@pytest.mark.parametrize("name", ["dhr_2x1", "rope_2x1", "dhr_1x1"])
def test_bfloat16_is_no_further_off_than_published(golden, inputs, checkpoint, tokenizer, name):
    record = json.loads((golden / "generate.json").read_text())[f"a/bf16_{name}"]
    exact = place(recorded(golden, "generate.safetensors", f"a/{name}/"))["step_logits"][0]
    model = comemo.CoMemoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ready = prepared(model.eval().to(DEVICE), tokenizer, case_of(golden, inputs, name)[1])
    ready.pop("input_ids")
    with torch.no_grad():
        logits = model(**ready, logits_to_keep=1).logits[0, 0].float()
    error = (logits - exact).norm() / exact.norm()
    assert error <= 2 * record["prefill_logit_rel_vs_f32"]
