"""What a decode loop refuses, and what an exception leaves behind."""

from dataclasses import replace

import pytest
import torch
from decoding import (  # noqa: F401
    GREEDY,
    Collected,
    _model,
    ahead,
    assert_same,
    assert_same_cache,
    loop,
    model,
    text,
)
from small import make_model, make_prompts
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import comemo_kernels as ops
from comemo import DecodeLoop
from comemo.decode.cache import RoomyCache
from comemo.decode.interface import Prefilled

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("fail_at", [1, 4])
def test_a_call_that_fails_leaves_loop_and_cache_usable(model, loop, ahead, fail_at):
    batch, caches = make_prompts(model), []
    for extra in ({}, {"decode_loop": loop}):
        cache = RoomyCache(4)
        with pytest.raises(InterruptedError):
            model.generate(
                **batch, **GREEDY, **extra, past_key_values=cache, streamer=Collected(fail_at)
            )
        caches.append(cache)
    assert caches[0].get_seq_length() == batch["input_ids"].shape[1] + fail_at - 1
    assert_same_cache(caches[1], caches[0])
    assert_same(model, loop, batch)
    assert loop.captures == 1


def test_a_step_that_fails(model, loop, ahead, monkeypatch):
    monkeypatch.setattr(ops, "capture", lambda function, device: function)  # graphs call no hooks
    batch, cache = make_prompts(model), RoomyCache(4)
    calls = [0]

    def fail(*_):
        calls[0] += 1
        if calls[0] == 4:  # the prompt was the first
            raise InterruptedError

    handle = model.model.language_model.layers[2].register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        model.generate(**batch, **GREEDY, decode_loop=loop, past_key_values=cache)
    handle.remove()
    assert {layer.get_seq_length() for layer in cache.layers} == {batch["input_ids"].shape[1] + 2}
    assert_same(model, loop, batch)


def test_one_call_at_a_time(model, loop):
    batch = text(model)

    class Asks(Collected):
        def put(self, value):
            super().put(value)
            if len(self.given) > 1:
                model.generate(**batch, **GREEDY, decode_loop=loop)

    with pytest.raises(RuntimeError, match="another call uses this loop"):
        model.generate(**batch, **GREEDY, decode_loop=loop, streamer=Asks())
    assert_same(model, loop, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"assistant_model": 0}, "assistant_model"),
        ({"output_attentions": True, "num_beams": 3}, "output_attentions, num_beams=3"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"decode_loop": True}, "a loop of another model"),
        ({"hf_device_map": 0}, "layers on several devices"),
    ],
    ids=str,
)
def test_unsupported_options(model, loop, options, message, monkeypatch):
    options = {"decode_loop": loop} | options
    if "assistant_model" in options:
        options["assistant_model"] = model
    if options.pop("hf_device_map", None) is not None:
        monkeypatch.setattr(model, "hf_device_map", {"a": 0, "b": "cpu"}, raising=False)
    with pytest.raises(ValueError, match=f"decode_loop must be .*{message}"):
        model.generate(**text(model), **GREEDY | options)


def test_unsupported_prompts(model, loop):
    batch = make_prompts(model)
    options = GREEDY | {"decode_loop": loop}
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        DecodeLoop(model, keep=0)
    with pytest.raises(ValueError, match=r"decode_loop must be .* loop of another model"):
        model.generate(**batch, **options | {"decode_loop": DecodeLoop(make_model())})
    gaps = dict(batch, attention_mask=batch["attention_mask"].clone())
    gaps["attention_mask"][1, 30] = 0
    with pytest.raises(ValueError, match=r"padded on the left, got .* with gaps"):
        model.generate(**gaps, **options)
    sliding = DynamicCache()
    sliding.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(4)]
    with pytest.raises(ValueError, match=r"got DynamicCache with layers .*SlidingWindow"):
        model.generate(**batch, **options, past_key_values=sliding)
    with torch.no_grad():
        read = model(**batch, use_cache=True)
    core, ids = model.model, batch["input_ids"]
    places = core.prompt_position_ids(
        core.find_image_tokens(ids), batch["attention_mask"], batch["tile_grid"]
    )
    memory, cache = read.image_memory, read.past_key_values
    whole = Prefilled(read.logits[:, -1:], cache, places, memory, batch["attention_mask"])
    empty = replace(whole, cache=RoomyCache(4))
    with pytest.raises(ValueError, match=r"must hold the 41 tokens of position_ids, got 0"):
        model.generate(prefilled=empty, **options)
    short = replace(whole, image_memory=memory.reading(memory.spans[:1]))
    with pytest.raises(ValueError, match=r"spans \(2, 1, 2\), got \(1, 1, 2\)"):
        model.generate(prefilled=short, **options)
    held = memory.keys.pop(1)
    with pytest.raises(ValueError, match=r"mixin layers \[1, 3\] .* got layers \[3\] and a table"):
        model.generate(prefilled=whole, **options)
    memory.keys[1], memory.table = held, None
    with pytest.raises(ValueError, match=r"table of angles, got layers \[1, 3\] and no table"):
        model.generate(prefilled=whole, **options)
    assert_same(model, loop, batch)


def test_nan_probabilities(ahead):
    model = make_model()
    batch, loop = text(model), DecodeLoop(model)
    weight = model.lm_head.weight[5]
    kept = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="must be numbers to sample"):
        model.generate(**batch, **GREEDY | {"do_sample": True}, decode_loop=loop)
    weight.copy_(kept)
    for sampled in (False, True):
        assert_same(model, loop, batch, do_sample=sampled)
