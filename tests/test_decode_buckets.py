"""Buckets of the decode loop: which lengths share buffers and graphs, and new captures."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TRACED
from decoding import (  # noqa: F401
    GREEDY,
    _model,
    ahead,
    assert_same,
    loop,
    model,
    one_prompt,
    poison,
    text,
)
from small import make_model, make_prompts, place
from transformers import StaticCache

from comemo import DecodeLoop
from comemo.decode import answer as decode_answer
from comemo.decode import loop as decode
from comemo.decode.arena import capacity_for

pytestmark = pytest.mark.usefixtures("one_thread")


def test_capacities():
    found = [capacity_for(n) for n in (0, 1, 1024, 1025, 2048, 2049, 4096, 5000)]
    assert found == [1024, 1024, 1024, 2048, 2048, 4096, 4096, 8192]
    assert [capacity_for(n, 16) for n in (1, 16, 17, 40)] == [16, 16, 32, 64]


def test_many_lengths_and_pictures_share_a_capture(model, loop):
    for case in range(50):
        grids = [(1 + case % 3, 1)] * (1 + case % 5)
        batch = one_prompt(model, grids)
        batch["input_ids"] = F.pad(batch["input_ids"], (7 * case % 90, 0), value=30)
        options = GREEDY | {"max_new_tokens": 3}
        found = model.generate(**batch, **options, decode_loop=loop)
        if case % 10 == 0:
            assert torch.equal(found, model.generate(**batch, **options))
    assert loop.captures == loop.buckets == 1


def test_alternating_calls_do_not_affect_each_other(model, loop):
    first, second = make_prompts(model), make_prompts(model)
    second["pixel_values"] = second["pixel_values"].flip(0) + 1
    for batch in (first, second, first, text(model, 3), second, text(model, 30), first):
        poison(loop)
        assert_same(model, loop, batch)
    assert loop.captures == 2
    for grids in ([(1, 1)] * 3, [(2, 1)], [(1, 1)], [(3, 1), (1, 1)]):
        poison(loop)
        assert_same(model, loop, one_prompt(model, grids))
    assert loop.captures == 3


def test_an_answer_continues_in_a_larger_bucket(model, loop, ahead, monkeypatch):
    monkeypatch.setattr(decode, "capacity_for", lambda n: -(-n // 4) * 4)
    monkeypatch.setattr(decode, "ROOM_FOR_ANSWER", 1)
    monkeypatch.setattr(decode_answer, "ROOM", 2)  # the ids are reallocated, too
    for prompts in (make_prompts, text):
        torch.manual_seed(2)
        batch = prompts(model)
        out = assert_same(model, loop, batch, max_new_tokens=14)
        tokens = out.sequences[0, -14:].tolist()
        end = max(tokens, key=tokens.index)  # the last to appear
        assert_same(model, loop, batch, max_new_tokens=14, eos_token_id=end, pad_token_id=5)
    assert loop.buckets == 4
    assert loop.captures > 6
    loop = DecodeLoop(model, keep=1)
    assert_same(model, loop, make_prompts(model), max_new_tokens=14)
    assert loop.buckets == 1


def test_few_buckets_are_kept(model):
    loop = DecodeLoop(model, keep=2)
    one = place({"input_ids": torch.randint(10, 200, (1, 5))})
    for batch in (one, text(model), one, make_prompts(model), one):
        assert_same(model, loop, batch)
    assert loop.buckets == 2
    assert loop.captures == 3  # the least recently used one was dropped
    assert_same(model, loop, text(model))
    assert loop.captures == 4


def test_a_changed_model_is_captured_again():
    model = make_model()
    loop, batch = DecodeLoop(model), text(model)
    for change in (
        lambda: None,
        lambda: model.lm_head.register_parameter(
            "weight", torch.nn.Parameter(-model.lm_head.weight, requires_grad=False)
        ),
        lambda: model.lm_head.register_forward_hook(lambda m, args, out: out.roll(1, -1)),
        lambda: setattr(model.config, "ntk_length", "token_count"),
    ):
        before = loop.captures
        change()
        assert_same(model, loop, batch)
        assert loop.captures == before + 1
        assert_same(model, loop, batch)
        assert loop.captures == before + 1


@TRACED
def test_static_buffers_are_a_loop(model, monkeypatch):
    made, batch = [], make_prompts(model)

    class Noted(DecodeLoop):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr("comemo.generation.DecodeLoop", Noted)
    wanted = model.generate(**batch, **GREEDY)
    static = {"cache_implementation": "static"} | GREEDY
    out = model.generate(**batch, **static, return_dict_in_generate=True)
    assert torch.equal(out.sequences, wanted)
    assert isinstance(out.past_key_values, StaticCache)
    assert out.past_key_values.get_seq_length() == wanted.shape[1] - 1
    assert [loop.captures for loop in made] == [1]
    model.generate(**batch, **static, num_beams=2)
    model.generate(**batch, **static, return_dict_in_generate=True, output_attentions=True)
    model.generate(**batch, **GREEDY)
    assert len(made) == 1
