"""A model with norms and gates folded into its projections computes the same."""

import copy

import pytest
import torch
from chats import CHATS, case_of
from conftest import SLOW_ON_CPU, TRACED
from harness import assert_errs_no_more, assert_relative
from small import logits_of, make_model, make_prompts, one_more, place
from torch._dynamo.testing import CompileCounter

import comemo_kernels as ops
from comemo import CoMemoForConditionalGeneration

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "model.language_model."


@pytest.fixture
def model():
    return make_model()


def layers_of(model):
    return list(model.model.language_model.layers)


def folds():
    """Name of each vector -> names of the weights that it is folded into."""
    found = {f"{TEXT}norm.weight": ["lm_head"]}
    for i in range(4):
        at = f"{TEXT}layers.{i}."
        found[f"{at}input_layernorm.weight"] = [f"{at}self_attn.{name}_proj" for name in "qkv"]
        wide = [f"{at}mlp.gate_proj", f"{at}mlp.up_proj"]
        found[f"{at}post_attention_layernorm.weight"] = wide
        if i % 2:
            at += "mixin."
            found[f"{at}attn_norm.weight"] = [f"{at}q_proj", f"{at}kv_proj"]
            found[f"{at}mlp_norm.weight"] = [f"{at}mlp.gate_proj", f"{at}mlp.up_proj"]
            found[f"{at}attn_gate"] = [f"{at}o_proj"]
            found[f"{at}mlp_gate"] = [f"{at}mlp.down_proj"]
    return found


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_errors_are_no_larger_than_the_models_own(dtype, bias):
    model = make_model(dtype, bias=bias)
    prompts = make_prompts(model)
    exact = copy.deepcopy(model).double()
    truth = logits_of(exact, prompts | {"pixel_values": prompts["pixel_values"].double()})
    own = logits_of(model, prompts)
    with model.fold_for_inference():
        folded = logits_of(model, prompts)
    assert not torch.equal(folded, own), "other weights round differently"
    assert_errs_no_more(folded, own, truth)


def test_gives_every_recorded_answer(golden, inputs, checkpoint, tokenizer, request):
    """A quarter of them without --all."""
    names = CHATS if request.config.getoption("--all") else CHATS[::4]
    model = CoMemoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with model.eval().requires_grad_(False).fold_for_inference():
        for name in names:
            record, case = case_of(golden, inputs, name)
            assert model.chat(tokenizer, **case) == record["response"], name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_products_rounded_once(dtype):
    model = make_model(dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.fold_for_inference()
    after, exact = model.state_dict(), torch.promote_types(dtype, torch.float32)
    assert list(after) == list(before)
    for vector, linears in folds().items():
        factor = before.pop(vector).to(exact)
        if vector.endswith("gate"):
            factor = factor.tanh()
            assert after[vector].tanh().eq(1).all()
        else:
            assert after[vector].eq(1).all()
        for name in linears:
            wanted = (before.pop(f"{name}.weight").to(exact) * factor).to(dtype)
            assert torch.equal(after[f"{name}.weight"], wanted), name
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


# --- calls ---


def spy_on(monkeypatch, *verbs):
    calls = []
    for name in verbs:
        verb = getattr(ops, name)
        record = lambda *args, name=name, verb=verb: calls.append((name, args)) or verb(*args)  # noqa: E731
        monkeypatch.setattr(ops, name, record)
    return calls


def test_a_decode_step_takes_three_calls_a_layer(model, monkeypatch):
    prompts = make_prompts(model)
    with torch.no_grad(), model.fold_for_inference():
        out = model(**prompts, use_cache=True)
        # Where the norms and gates are among the arguments.
        places = {"norm_linear": [1], "gated_residual": [3], "attend_gated": [6]}
        places["gated_swiglu"] = [1, 5]
        calls = spy_on(monkeypatch, *places)
        model(**one_more(prompts, out))
        layer = ["norm_linear", "gated_residual", "gated_swiglu"]
        mixin = ["norm_linear", "attend_gated", "gated_swiglu"]
        assert [name for name, _ in calls] == (layer + mixin + layer) * 2
        for name, args in calls:
            assert all(args[place] is None for place in places[name])
        weights = [args[2] for name, args in calls if name == "norm_linear"]
        layers = layers_of(model)
        own = [(layer.self_attn.qkv, layer.mixin and layer.mixin.q_proj.weight) for layer in layers]
        first, second, third, fourth = own
        order = [first[0], *second[::-1], third[0], *fourth[::-1]]
        assert all(a is b for a, b in zip(weights, order, strict=True))


def test_memory_is_built_from_one_norm(model, monkeypatch):
    prompts, norms, build = make_prompts(model), [], ops.build_memory
    tokens = prompts["attention_mask"].bool()
    with torch.no_grad():
        own = model(**prompts, use_cache=True)
        record = lambda *args, **kw: norms.append(args[2]) or build(*args, **kw)  # noqa: E731
        monkeypatch.setattr(ops, "build_memory", record)
        with model.fold_for_inference():
            memory = model(**prompts, use_cache=True).image_memory
            # Each layer builds its own, by its modules.
            assert_relative(model(**prompts, use_cache=False).logits[tokens], own.logits[tokens])
            assert norms == [None]
            del prompts["pixel_values"]
            for held in (memory, own.image_memory):
                logits = model(**prompts, image_memory=held).logits
                assert_relative(logits[tokens], own.logits[tokens])
    for layer, key in own.image_memory.keys.items():
        assert_relative(memory.keys[layer], key)
        assert_relative(memory.values[layer], own.image_memory.values[layer])


def test_called_modules_compute_the_same(model):
    prompts, called, handles = make_prompts(model), set(), []
    with model.fold_for_inference():
        plain = logits_of(model, prompts)
        decoder = model.model.language_model
        linears = [part for part in decoder.modules() if isinstance(part, torch.nn.Linear)]
        for part in linears:
            handles.append(part.register_forward_hook(lambda part, *_: called.add(part)))
        assert_relative(logits_of(model, prompts), plain)
        assert called == set(linears)
        for handle in handles:
            handle.remove()


@SLOW_ON_CPU
@TRACED
def test_a_decode_step_compiles_without_graph_breaks(real_device):
    model = make_model().to(real_device)
    prompts = make_prompts(model)
    with torch.no_grad(), model.fold_for_inference():
        memory = model(**prompts, use_cache=True).image_memory
        step = place(
            {name: torch.full((2, 1), n) for name, n in (("input_ids", 7), ("position_ids", 90))}
        )
        step |= {"image_memory": memory, "use_cache": False}
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
        assert_relative(compiled(**step).logits, model(**step).logits)
    torch._dynamo.reset()  # otherwise shapes of other tests become dynamic
    assert counter.frame_count == 1


# --- storage of weights ---


def storages(weights):
    held = [weight.untyped_storage() for weight in weights]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def test_q_k_v_weights_are_concatenated_in_the_same_memory(model):
    before = storages(model.parameters())
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    model.fold_for_inference()
    assert sum(storages(model.parameters()).values()) == sum(before.values())
    assert {name: weight.shape for name, weight in model.named_parameters()} == shapes
    for layer in layers_of(model):
        attention = layer.self_attn
        weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        assert storages(weights) == {attention.qkv.data_ptr(): attention.qkv.nbytes}
        assert torch.equal(attention.qkv, torch.cat(weights))


def test_concatenated_weights_change_nothing(model):
    prompts = make_prompts(model)
    wanted = logits_of(model, prompts)
    for layer in layers_of(model):
        layer.self_attn.join()
    assert torch.equal(logits_of(model, prompts), wanted)


def test_projections_with_a_bias_are_called():
    model = make_model(bias=True)
    attention = layers_of(model)[0].self_attn
    bias = attention.q_proj.bias.clone()
    with model.fold_for_inference():
        assert attention.qkv is None
        assert torch.equal(attention.q_proj.bias, bias)


def test_weights_stay_concatenated_after_a_conversion(model):
    prompts = make_prompts(model)
    wanted, attention = logits_of(model, prompts), layers_of(model)[2].self_attn
    folded = model.fold_for_inference()
    model.double()
    assert attention.joined()
    assert attention.qkv.dtype == torch.float64
    model.float()
    assert attention.joined()
    assert_relative(logits_of(model, prompts), wanted)
    folded.undo()
    assert torch.equal(logits_of(model, prompts), wanted)


def test_a_replaced_weight_is_used(model):
    """As in merging an adapter; a copy of the model has its own weights, too."""
    prompts = make_prompts(model)
    with model.fold_for_inference():
        plain, other = logits_of(model, prompts), copy.deepcopy(model)
        assert_relative(logits_of(other, prompts), plain)
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layers_of(model)[0].self_attn, name).weight
            own = weight.data
            weight.data = own + 0.3
            assert (logits_of(model, prompts) - plain).abs().max() > 0.01
            weight.data = own
        assert torch.equal(logits_of(model, prompts), plain)
