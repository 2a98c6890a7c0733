"""Position range, dynamic scaling and threads of `generate`."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from chats import (  # noqa: F401
    RAW,
    answers,
    case_of,
    message,
    prompts_of,
)
from conftest import TRACED
from harness import LOGITS
from PIL import Image
from small import place
from torch._dynamo.testing import CompileCounter


def test_nothing_is_left_after_an_exception(model, prompts_of):
    greedy = answers(model, prompts_of(0))

    class Stop(Exception):
        pass

    for layer in model.model.language_model.layers:
        calls = [0]

        def later(*_, calls=calls):
            calls[0] += 1
            if calls[0] == 3:  # in the middle of decoding
                raise Stop

        handle = layer.register_forward_hook(later)
        with pytest.raises(Stop):
            answers(model, prompts_of(1))
        handle.remove()
        assert answers(model, prompts_of(0)) == greedy
    state = {name: set(vars(module)) for name, module in model.named_modules()}
    answers(model, prompts_of(0))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == state


def test_two_threads_get_what_they_get_alone(golden, inputs, model, tokenizer):
    names = ["dhr_2x1", "dhr_1x1", "rope_2x1", "dhr_two"]
    cases = [case_of(golden, inputs, name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            futures = [pool.submit(model.chat, tokenizer, **case) for _, case in cases]
            for future, (record, _) in zip(futures, cases, strict=True):
                assert future.result() == record["response"]


@TRACED
@pytest.mark.slow  # with kernels and folded, too
def test_decode_step_compiles_whole(model, processor, inputs):
    """Few graphs, no graph break, and no new graph for further images."""
    model.config.decode_positions = "raw"
    counter, eager = CompileCounter(), model.forward
    compiled = torch.compile(eager, fullgraph=True, backend=counter)

    def forward(*args, **kwargs):
        step = compiled if kwargs["input_ids"].shape[1] == 1 else eager
        return step(*args, **kwargs)

    forward.__signature__ = inspect.signature(eager)
    frames = []
    for width, height in ((900, 448), (448, 448), (448, 1400), (1400, 900), (448, 900)):
        picture = Image.fromarray(inputs.picture(1, width, height))
        batch = processor.apply_chat_template(
            message("what?", picture), add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(model.device)
        options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"} | RAW
        plain = torch.cat(model.generate(**batch, **options).logits)
        model.forward = forward
        try:
            found = torch.cat(model.generate(**batch, **options).logits)
        finally:
            del model.forward
        assert (found - plain).abs().max() < LOGITS
        frames.append(counter.frame_count)
    assert frames[0] >= 1
    assert frames[-2] == frames[-1] <= 4


def test_attention_of_the_parts_can_be_chosen(checkpoint, model, prompts_of):
    batch = prompts_of(0)
    eager = (
        type(model)
        .from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
        .eval()
        .to(model.device)
    )
    with torch.no_grad():
        out = eager(**batch, output_hidden_states=True, output_attentions=True)
        wanted = model(**batch).logits
    layers = model.config.text_config.num_hidden_layers
    assert len(out.hidden_states) == layers + 1
    assert len(out.attentions) == layers
    assert (out.logits - wanted).abs().max() < LOGITS
    eager.set_attn_implementation("sdpa")
    assert eager.config.text_config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert (eager(**batch).logits - wanted).abs().max() < LOGITS


def test_a_prompt_beyond_the_position_range_is_refused(model, prompts_of):
    batch = prompts_of(0)
    model.config.mixin_config.max_position_embeddings, limit = 300, 32768
    try:
        with pytest.raises(ValueError, match=r"position ids up to \d+, the model has 300"):
            model.generate(**batch)
        model.config.mixin_config.max_position_embeddings = 500
        with pytest.raises(ValueError, match="decode_positions = 'compressed'"):
            model.generate(**batch)
        model.config.decode_positions = "compressed"
        assert answers(model, batch)
    finally:
        model.config.mixin_config.max_position_embeddings = limit


@pytest.mark.parametrize("rule", ["token_count", "position"])
def test_dynamic_scaling_is_not_sticky(model, prompts_of, rule):
    text = model.config.text_config
    model.config.ntk_length = rule
    batch = place({"input_ids": torch.arange(100, 160)[None]})
    short = answers(model, batch)
    text.max_position_embeddings, limit = 40, 32768
    try:
        scaled = answers(model, place({"input_ids": torch.arange(100, 160)[None]}))
    finally:
        text.max_position_embeddings = limit
    assert scaled != short
    assert answers(model, batch) == short


def test_scaling_by_position_ignores_the_tiles(model, prompts_of):
    """RoPE-DHR ids stay small: the token count would scale, the position does not."""
    text, batch = model.config.text_config, prompts_of(0)
    text.max_position_embeddings, limit = 600, 32768
    try:
        found = {}
        for rule in ("position", "token_count"):
            model.config.ntk_length = rule
            found[rule] = model.generate(**batch, max_new_tokens=1, do_sample=False, **RAW).logits[
                0
            ]
    finally:
        text.max_position_embeddings = limit
    plain = model.generate(**batch, max_new_tokens=1, do_sample=False, **RAW).logits[0]
    assert torch.equal(found["position"], plain)
    assert (found["token_count"] - plain).abs().max() > 10 * LOGITS


def test_image_marks_need_their_tiles(model, prompts_of):
    batch = dict(prompts_of(0))
    tiles = batch.pop("pixel_values")
    with pytest.raises(ValueError, match=r"2 tiles of 256 tokens for prompts that hold \[768\]"):
        model.generate(**batch, pixel_values=tiles[:2])
    with pytest.raises(ValueError, match="1 grids of 256 image tokens"):
        model.generate(**batch | {"tile_grid": [(1, 1)]}, pixel_values=tiles)
    with pytest.raises(ValueError, match=r"hold \[768\] image tokens, got neither"):
        model.generate(**{k: v for k, v in batch.items() if k != "tile_grid"})
    model.config.image_token_id = None
    with pytest.raises(ValueError, match="image_token_id is not set"):
        model.generate(**batch, pixel_values=tiles)
