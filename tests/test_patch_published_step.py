"""Fused decode steps of the patched published model, and their graphs: the same as without."""

import copy
import functools

import pytest
import torch
from conftest import SLOW, SLOW_ON_CPU
from patching import assert_patched_matches, prompt_of, tiny_published
from published_steps import (  # noqa: F401
    GREEDY,
    TOKENS,
    assert_same,
    cache_of,
    compare,
    generate,
    made,
    model,
    place,
)
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import comemo_kernels as ops
from bench.published_model.chat_model import repair_generate
from bench.published_model.internlm2 import InternLM2ForCausalLM
from comemo_kernels.patching import published_decode
from comemo_kernels.patching.published_decode import Decoding
from comemo_kernels.patching.published_generate import generating_class, view_of
from comemo_kernels.patching.published_step import DecodeStep

pytestmark = pytest.mark.usefixtures("one_thread")


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


class Ends(LogitsProcessor):
    """Nothing but the end after some tokens."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == 7:
            scores = torch.full_like(scores, -1e4)
            scores[:, 5] = 0.0
        return scores


@pytest.mark.parametrize(
    ("grids", "options", "steps"),
    [
        ([(2, 1)], {}, TOKENS - 1),
        ([(1, 1), (2, 3)], {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, TOKENS - 1),
        ([], {"do_sample": True, "top_k": 20, "temperature": 1.3}, TOKENS - 1),
        pytest.param(
            [(2, 1)], {"do_sample": True, "num_return_sequences": 3}, TOKENS - 1, marks=SLOW
        ),
        ([(2, 1)], {"max_new_tokens": None, "max_length": 29}, 8),
        ([(2, 1)], {"eos_token_id": 5, "processor": Ends}, 7),
        pytest.param([(1, 2)], {"max_new_tokens": 1}, 0, marks=SLOW),
    ],
    ids=str,
)
def test_generates_the_same(model, made, place, grids, options, steps):
    ours = compare(model.to(place), *grids, **options)
    assert made[-1].fused == steps
    assert made[-1].captures == (place == "cuda" and steps >= 7)
    assert cache_of(ours)[0][0].shape[2] == cache_of(ours)[-1][1].shape[2]


def test_inference_mode(model, made, place):
    model.to(place)
    wanted = generate(repair_generate(copy.deepcopy(model)), (2, 1))
    with ops.patched(model), torch.inference_mode():
        assert_same(generate(model, (2, 1)), wanted)
    assert made[-1].fused == TOKENS - 1


def test_a_streamer_hears_each_token(model, made, place):
    heard = Heard()
    with ops.patched(model.to(place)):
        answer = generate(model, (2, 1), streamer=heard).sequences
    assert heard.tokens[-TOKENS - 1 :] == [*answer[0, -TOKENS:].tolist(), "end"]
    assert made[-1].fused == TOKENS - 1


def test_the_cache_is_as_published(model, made, place):
    """Also each earlier one, which later steps do not change."""
    model.to(place)
    wanted = generate(repair_generate(copy.deepcopy(model)), (2, 1))
    kept = []
    with pytest.MonkeyPatch.context() as patch, ops.patched(model):
        patch.setattr(
            DecodeStep,
            "past",
            lambda self, past=DecodeStep.past: kept.append(past(self)) or kept[-1],
        )
        generate(model, (2, 1))
    assert len(kept) == TOKENS - 1
    for past in kept:
        length = past[0][0].shape[2]
        for pair, other in zip(past, cache_of(wanted), strict=True):
            for one, two in zip(pair, other, strict=True):
                torch.testing.assert_close(one, two[:, :, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hole", [False, True], ids=["left", "middle"])
def test_padding(model, made, place, monkeypatch, hole):
    monkeypatch.setattr(published_decode, "MOST", 4)  # and the buffers grow
    model.to(place)
    ids = torch.randint(10, 40, (2, 6), device=place)
    mask = torch.ones_like(ids)
    mask[1, 1 if hole else 0 : 3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    published = repair_generate(copy.deepcopy(model)).generate(**inputs)
    with ops.patched(model):
        assert_same(model.generate(**inputs), published)
    assert made[-1].fused == (0 if hole else TOKENS - 1)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str
)
def test_beams_are_not_fused(model, made, options):
    published = generate(repair_generate(copy.deepcopy(model)), (2, 1), **options)
    with ops.patched(model):
        assert torch.equal(generate(model, (2, 1), **options).sequences, published.sequences)
    assert made[-1].fused == 0


def test_beams_keep_their_own_cache(model):
    """Whatever a release calls the cache, it is reordered: scores are those of whole sequences."""
    language_model = view_of(repair_generate(model).language_model)
    ids = torch.randint(10, 40, (1, 6))
    found = language_model.generate(input_ids=ids, **GREEDY, num_beams=4)
    with torch.no_grad():
        logits = language_model(input_ids=found.sequences[:, :-1]).logits[:, 5:]
    chosen = logits.log_softmax(-1).gather(2, found.sequences[:, 6:, None])
    torch.testing.assert_close(found.sequences_scores, chosen.mean((1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "something_else"])
def test_what_a_step_does_not_give_is_not_fused(model, made, monkeypatch, asked):
    kind, forward = InternLM2ForCausalLM, InternLM2ForCausalLM.forward
    prepare = kind.prepare_inputs_for_generation
    wanted = generate(repair_generate(copy.deepcopy(model)), (2, 1))

    @functools.wraps(prepare)
    def ask(self, *args, **kwargs):
        return prepare(self, *args, **kwargs) | {asked: True}

    @functools.wraps(forward)
    def take(self, something_else=None, **kwargs):
        return forward(self, **kwargs)

    monkeypatch.setattr(kind, "prepare_inputs_for_generation", ask)
    monkeypatch.setattr(kind, "forward", take)
    generating_class.cache_clear()
    with ops.patched(model):
        assert_same(generate(model, (2, 1)), wanted)
    generating_class.cache_clear()
    assert made[-1].fused == 0


def test_buffers_grow(model, made, place, monkeypatch):
    monkeypatch.setattr(published_decode, "MOST", 2)
    compare(model.to(place), (2, 1), do_sample=True, num_return_sequences=2)
    assert made[-1].fused == TOKENS - 1
    assert made[-1].captures == 2 * (place == "cuda")  # twice 22 tokens are enough


@pytest.mark.parametrize("kind", ["biases", "transposed", pytest.param("frozen", marks=SLOW)])
def test_what_kernels_do_not_read_is_called(made, kind):
    model = tiny_published(llm={"bias": kind == "biases"})
    layer = model.language_model.model.layers[0].decoder_layer
    if kind == "transposed":
        layer.attention.wo.weight.data = layer.attention.wo.weight.data.t().contiguous().t()
    elif kind == "frozen":  # which changes nothing
        model.requires_grad_(False)
    compare(model, (2, 1))
    assert made[-1].fused == (TOKENS - 1 if kind == "frozen" else 0)


def test_few_tokens_are_not_captured(model, made, place):
    compare(model.to(place), (2, 1), max_new_tokens=5)
    assert (made[-1].fused, made[-1].captures) == (4, 0)


def test_a_table_that_has_to_grow_is_not_read(made):
    """The dynamic rotary embedding of the layers grows after 24 tokens, for good."""
    model = tiny_published(llm={"max_position_embeddings": 24})
    published = generate(repair_generate(copy.deepcopy(model)), (2, 1))
    with ops.patched(model):
        assert_same(generate(model, (2, 1)), published)
    assert 0 < made[-1].fused < TOKENS - 1


class Forces(LogitsProcessor):
    """The same tokens, whatever the dtype."""

    def __call__(self, input_ids, scores):
        return torch.zeros_like(scores).index_fill(
            1, torch.tensor([11 + input_ids.shape[1]], device=scores.device), 9.0
        )


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=SLOW)],
    ids=str,
)
def test_logits_err_no_more(model, made, dtype):
    options = {"logits_processor": LogitsProcessorList([Forces()]), "output_logits": True}

    def run(model, factor):
        inputs = prompt_of((2, 1))
        inputs["pixel_values"] = (inputs["pixel_values"] * factor).to(model.dtype)
        out = repair_generate(model).generate(
            **inputs, **(GREEDY | options | {"max_new_tokens": 5})
        )
        return {f"logits {i}": logits for i, logits in enumerate(out.logits[1:])}

    assert_patched_matches(model.to(dtype), run)
    assert made[-1].fused == 4


class Poisons(LogitsProcessor):
    """The second row gets a token whose embedding is infinite."""

    def __call__(self, input_ids, scores):
        scores[1] = torch.arange(len(scores[1]), device=scores.device) == 9
        return scores


@SLOW_ON_CPU
@pytest.mark.kernel(reference=True)
def test_rows_do_not_reach_each_other(device, made):
    """Not even what is infinite in one of them, in the prompt or later."""
    model = tiny_published().to(device)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = torch.inf
    ids = torch.randint(10, 40, (3, 4), device=device)
    ids[0, 2] = 9
    options = GREEDY | {"max_new_tokens": 3, "attention_mask": torch.ones_like(ids)}
    poison = LogitsProcessorList([Poisons()])
    with ops.patched(model):
        ours = model.generate(input_ids=ids, logits_processor=poison, **options)
        alone = {"input_ids": ids[2:], "attention_mask": options["attention_mask"][2:]}
        wanted = model.generate(**(options | alone))
    assert made[0].fused == 2
    assert not ours.scores[1][0].isfinite().any()
    for one, other in zip(ours.scores, wanted.scores, strict=True):
        torch.testing.assert_close(one[2:], other, rtol=1e-4, atol=1e-4)


@SLOW_ON_CPU
@pytest.mark.kernel
def test_steps_on_kernels(device, made, monkeypatch):
    monkeypatch.setattr(published_decode, "FEWEST", 1)
    model = tiny_published().to(device)
    inputs = {name: t.to(device) for name, t in prompt_of((2, 1)).items()}
    options = GREEDY | {"max_new_tokens": 3}
    published = repair_generate(copy.deepcopy(model)).generate(**inputs, **options)
    with ops.patched(model):
        assert_same(model.generate(**inputs, **options), published)
    assert (made[-1].fused, made[-1].captures) == (2, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replay_never_syncs(made, monkeypatch, dtype):
    take = Decoding._take

    def unsynced(self, *args):
        if self._replay is None:
            return take(self, *args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return take(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Decoding, "_take", unsynced)
    model = tiny_published().to("cuda", dtype)
    inputs = {name: t.cuda() for name, t in prompt_of((2, 1)).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with ops.patched(model):
        captured = model.generate(**inputs, **GREEDY)
        monkeypatch.setattr(published_decode, "FEWEST", 100)
        eager = model.generate(**inputs, **GREEDY)
    assert [each.captures for each in made] == [1, 0]
    assert torch.equal(captured.sequences, eager.sequences)
    assert torch.equal(torch.stack(captured.scores), torch.stack(eager.scores))
