"""The attention of mixin layers, chosen as in transformers: each computes what our kernels do."""

import copy

import pytest
import torch
from attention_inputs import make_inputs
from conftest import TRACED, every_two
from flash import Layer, flash  # noqa: F401
from harness import LOGITS, assert_matches, assert_relative
from small import logits_of, make_model, make_prompts, place
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface

import comemo_kernels as ops
from comemo import DecodeLoop, MixinConfig
from comemo.attention import attend_memory, attend_otherwise, mask_of_spans
from comemo_kernels import MemoryScales, QueryRotation, reference

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
OURS = "comemo_kernels"


def read_by_user(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """A function as a user may register it, without a mask of its own."""
    assert kwargs.pop("is_causal") is False
    assert not kwargs
    assert attention_mask.dtype == torch.bool
    assert attention_mask.shape == (len(query), 1, query.shape[2], key.shape[2])
    assert module.layer_idx in (1, 3)
    scores = (query @ key.transpose(2, 3) * scaling).float()
    weights = scores.masked_fill(~attention_mask, -torch.inf).softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("of_a_user", read_by_user)


@pytest.fixture(scope="module")
def _model():
    return make_model()


@pytest.fixture
def model(_model):
    before = dict(vars(_model.config))
    yield _model
    vars(_model.config).update(before)
    _model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "sdpa"})
    _model.set_attn_implementation({"mixin_config": OURS})


def choose(model, name):
    model.set_attn_implementation({"mixin_config": name})


# --- one attention ---


def otherwise(name, rest):
    """`attend_otherwise` by an implementation, as a function of tensors."""
    config = MixinConfig()
    config._attn_implementation = name

    def attend_by_name(q, k, v, spans, cos, sin):
        rotation = QueryRotation(cos, sin, **rest)
        return attend_otherwise(Layer(config), q, k, v, spans, rotation, None)

    return attend_by_name


def assert_reads_alike(name, inputs, rest):
    def theirs(q, k, v, spans, cos, sin):
        return reference.attend_spans(q, k, v, spans, QueryRotation(cos, sin, **rest))

    # An exact table: of a rounded one, two rotations are not the rotation by the sum.
    rows, half = inputs["cos"].shape
    frequencies = 100.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), frequencies)
    inputs |= place({"cos": angles.cos(), "sin": angles.sin()})
    for leaf in ("q", "k", "v"):
        inputs[leaf].requires_grad_()
    assert_matches(otherwise(name, rest), theirs, inputs)


@pytest.mark.parametrize(
    ("name", "spans", "images", "dtype"),
    every_two(
        ["sdpa", "eager", "of_a_user"],
        ["token", "prompt"],
        [((), 1), ((0,), 1), ((0, 32), 1), ((0, 20, 50), 3)],
        [torch.bfloat16, torch.float32],
    ),
)
def test_an_implementation_reads_spans_as_the_kernels_do(name, spans, images, dtype):
    starts, biases = images
    inputs, rest = make_inputs(3, 7, 2, 2, spans=spans, starts=starts, biases=biases, dtype=dtype)
    inputs["spans"][1] = inputs["spans"][1, :1, :1]  # empty
    assert_reads_alike(name, inputs, rest)


@pytest.mark.parametrize("images", [((), 1), ((0,), 1), ((0, 20, 50), 3)])
def test_flash_attention_reads_spans_of_prompts(flash, images):
    starts, biases = images
    inputs, rest = make_inputs(
        3, 7, 2, 2, spans="prompt", starts=starts, biases=biases, dtype=torch.bfloat16
    )
    inputs["spans"][:, 0] = torch.tensor([[5, 70], [9, 9], [0, 12]])  # in any order; one is empty
    assert_reads_alike("flash_attention_2", inputs, rest)
    kind, _, _, causal, queries, keys = flash.calls[0]
    assert (kind, causal) == ("varlen", False)
    assert queries == [0, 0, 7, 7, 14, 14, 21, 21]
    assert keys == [0, 5, 70, 79, 79, 140, 152, 210]


def test_what_flash_attention_cannot_express_is_refused(flash):
    inputs, rest = make_inputs(2, 7, 2, 2, spans="token", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"one span .* for each prompt, got a span for each token"):
        otherwise("flash_attention_2", rest)(**inputs)
    inputs, rest = make_inputs(2, 7, 2, 2, spans="prompt")
    with pytest.raises(ValueError, match=r"must get float16 or bfloat16, got torch.float32"):
        otherwise("flash_attention_2", rest)(**inputs)
    assert not flash.calls


def test_nothing_to_read_gives_zeros():
    for M, spans in ((0, [[0, 0]]), (8, [[3, 3]])):
        q = place(torch.randn(1, 4, 2, 16)).requires_grad_()
        k = place(torch.randn(M, 2, 16))
        table = (place(torch.ones(9, 8)), place(torch.zeros(9, 8)))
        rest = {"positions": place(torch.arange(4)[None])}
        for name in ("sdpa", "eager"):
            out = otherwise(name, rest)(q, k, k, place(torch.tensor([spans])), *table)
            assert torch.equal(out, torch.zeros_like(q))
            (grad,) = torch.autograd.grad(out.sum(), q)
            assert torch.equal(grad, torch.zeros_like(q))


def test_positions_beyond_the_table_are_nan():
    inputs, rest = make_inputs(1, 4, 2, 2, spans="prompt", starts=(0,), P=90)
    inputs["spans"][:] = torch.tensor([0, 70])
    rest["positions"] = rest["biases"] + torch.tensor([89, -89, 90, -90], device=inputs["q"].device)
    found = otherwise("sdpa", rest)(**inputs).isnan().all(-1).all(-1)[0]
    assert found.tolist() == [False, False, True, True]


def test_a_float8_memory_is_refused():
    inputs, rest = make_inputs(1, 4, 2, 2, spans="prompt", starts=(0,))
    ones = torch.ones(1, 2)
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)
    config = MixinConfig()
    config._attn_implementation = "sdpa"
    q, k, v, spans = inputs.values()
    with pytest.raises(
        ValueError, match="a float8 memory is read by 'comemo_kernels' only, got 's"
    ):
        attend_otherwise(Layer(config), q, k, v, spans, rotation, MemoryScales(ones, ones))


def test_ours_has_the_signature_of_the_interface():
    inputs, _ = make_inputs(2, 7, 2, 1, spans="token", starts=None)
    q, k, v, spans = (inputs[name] for name in ("q", "k", "v", "spans"))
    given = (None, q.transpose(1, 2), k.transpose(0, 1)[None], v.transpose(0, 1)[None])
    attend = AttentionInterface()[OURS]
    assert attend is attend_memory
    out, weights = attend(*given, None, spans=spans, scaling=0.25, dropout=0.0, is_causal=False)
    assert torch.equal(out, ops.attend_spans(q, k, v, spans))
    assert weights is None
    for options, error in (
        ({}, "spans must say which keys a query reads, got None: .*not for causal"),
        ({"spans": spans, "scaling": 1.0}, "scaling 0.25, got no mask, None and 1.0"),
        ({"spans": spans, "attention_mask": spans}, "got a mask"),
    ):
        with pytest.raises(ValueError, match=error):
            attend(*given, **options)
    with pytest.raises(ValueError, match=r"key must be \[1, G, M, D\], got \(2, "):
        attend(*given[:2], given[1], given[1], spans=spans)


@TRACED
@pytest.mark.slow
def test_flex_attention_gets_the_same_mask():
    inputs, _ = make_inputs(2, 7, 2, 2, spans="token", starts=None, device="cpu")
    masks = []
    for name in ("sdpa", "flex_attention"):
        config = MixinConfig()
        config._attn_implementation = name
        masks.append(mask_of_spans(config, inputs["spans"], 7, 70, inputs["q"]))
    assert masks[0].shape == (2, 1, 7, 70)
    assert torch.equal(create_mask(masks[1].mask_mod, 2, 1, 7, 70, "cpu"), masks[0])


# --- the model ---


def packed(model):
    """Two samples in a row, each with an image of its own, and one without."""
    prompts = make_prompts(model)
    ids, per = prompts["input_ids"], model.config.tokens_per_tile
    text = place(torch.randint(10, 200, (5,)))
    samples = [ids[0, per:], text, ids[1]]
    bounds = torch.tensor([0, *map(len, samples)]).cumsum(0)
    return {
        "input_ids": torch.cat(samples)[None],
        "pixel_values": prompts["pixel_values"],
        "tile_grid": prompts["tile_grid"],
        "cu_seqlens": bounds,
    }


@torch.no_grad()
def outputs(model, rows):
    """Logits of ragged prompts and a decode step, or of packed rows."""
    if rows == "packed":
        return model(**packed(model)).logits[0]
    return logits_of(model, make_prompts(model))


@pytest.mark.parametrize(
    ("name", "rows", "positions", "state"),
    every_two(
        ["sdpa", "eager", "of_a_user"],
        ["ragged", "packed"],
        ["relative", "absolute"],
        ["plain", "folded", "hooked"],
    ),
)
def test_logits_are_those_of_the_kernels(model, name, rows, positions, state):
    model.config.memory_positions = positions
    mixin = model.model.language_model.layers[1].mixin
    found = []
    for chosen in (OURS, name):
        choose(model, chosen)
        torch.manual_seed(1)
        undo = None
        if state == "folded":
            undo = model.fold_for_inference().undo
        if state == "hooked":
            undo = mixin.o_proj.register_forward_hook(lambda *_: None).remove
        found.append(outputs(model, rows))
        if undo:
            undo()
    torch.testing.assert_close(*found, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_the_kernels(model, beams):
    prompts = make_prompts(model)
    options = {"num_beams": beams, "num_return_sequences": beams, **GREEDY}
    wanted = model.generate(**prompts, **options)
    choose(model, "sdpa")
    assert torch.equal(model.generate(**prompts, **options), wanted)


def test_gradients_are_those_of_the_kernels(model):
    model = copy.deepcopy(model).train().requires_grad_(True)
    prompts = make_prompts(model)
    labels = prompts["input_ids"].masked_fill(prompts["attention_mask"] == 0, -100)
    grads = []
    for name, checkpointing in ((OURS, False), ("sdpa", False), ("eager", True)):
        choose(model, name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        model(**prompts, labels=labels, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("mixin.kv_proj" in name for name in grads[0])
    for found in grads[1:]:
        assert found.keys() == grads[0].keys()
        for name, grad in found.items():
            if name.endswith("vision_tower.encoder.layer.0.attention.k_proj.bias"):
                continue  # 0 but for rounding: a softmax ignores what all scores share
            assert_relative(grad, grads[0][name], name)


def test_rows_without_an_image_may_hold_nan(model):
    """A memory with spare room, as one that grows from turn to turn has."""
    prompts = make_prompts(model)
    with torch.no_grad():
        out = model(**prompts, use_cache=True)
        memory, length = out.image_memory, len(out.image_memory)
        for held in (memory.keys, memory.values):
            for index, t in held.items():
                held[index] = torch.cat([t, torch.full_like(t[:5], float("nan"))])
        del prompts["pixel_values"], prompts["tile_grid"]
        choose(model, "sdpa")
        again = model(**prompts, image_memory=memory)
    assert memory.capacity == length + 5
    seen = prompts["attention_mask"].bool()
    torch.testing.assert_close(again.logits[seen], out.logits[seen], atol=LOGITS, rtol=0)


@TRACED
@pytest.mark.slow
def test_a_layer_compiles_whole(real_device):
    model = make_model().to(real_device)
    choose(model, "sdpa")
    with torch.no_grad():
        memory = model(**place(make_prompts(model), real_device), use_cache=True).image_memory
        mixin = model.model.language_model.layers[1].mixin
        x = torch.randn(2, 3, 64, device=real_device)
        rotation = memory.rotation(torch.arange(3, device=real_device)[None] + 60)
        compiled = torch.compile(mixin, fullgraph=True, backend="eager")
        found = compiled(x, None, memory, rotation)
        torch.testing.assert_close(found, mixin(x, None, memory, rotation))


def test_a_decode_loop_is_refused_by_name(model):
    prompts, loop = make_prompts(model), DecodeLoop(model)
    choose(model, "sdpa")
    with pytest.raises(ValueError, match="got attention of mixin_config 'sdpa'"):
        model.generate(**prompts, decode_loop=loop, **GREEDY)


@TRACED
def test_a_static_cache_stays_with_transformers():
    model = make_model()
    prompts = make_prompts(model)
    wanted = model.generate(**prompts, **GREEDY)
    choose(model, "sdpa")
    assert torch.equal(model.generate(**prompts, cache_implementation="static", **GREEDY), wanted)
