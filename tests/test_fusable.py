"""Decoder layers by fused operations equal Llama's layers; modules that have to be called."""

import pytest
import torch
from conftest import DEVICE
from harness import assert_relative
from small import logits_of, make_model, make_prompts
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import comemo_kernels as ops
from comemo.weights.fusable import are_joined, is_fusable, join_weights

VERBS = ("gated_swiglu", "gated_residual")


def layer_and_inputs(**llm):
    layer = make_model(**llm).model.language_model.layers[0].requires_grad_(True)
    x = torch.randn(2, 20, 64).to(DEVICE).requires_grad_()
    angles = torch.rand(1, 20, 8).to(DEVICE)
    return layer, x, {"position_embeddings": (angles.cos(), angles.sin())}


def gradients(out, layer, x):
    names, leaves = zip(*layer.named_parameters(), strict=True)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad((out * weight).sum(), (x, *leaves))
    return dict(zip(("x", *names), found, strict=True))


@pytest.mark.parametrize("llm", [{}, {"bias": True}, {"hidden_act": "gelu"}, {"mlp_bias": True}])
def test_a_layer_equals_llamas_bit_for_bit(llm):
    layer, x, rest = layer_and_inputs(**llm)
    out, wanted = layer(x, **rest), LlamaDecoderLayer.forward(layer, x, **rest)
    assert torch.equal(out, wanted)
    ours, theirs = gradients(out, layer, x), gradients(wanted, layer, x)
    for name, gradient in theirs.items():  # fused norms and networks sum in another order
        assert_relative(ours[name], gradient, name)


@pytest.mark.parametrize(
    ("llm", "wanted"),
    [({}, (1, 1)), ({"bias": True}, (1, 0)), ({"hidden_act": "gelu"}, (0, 1))],
    ids=str,
)
def test_modules_with_bias_or_another_activation_are_called(monkeypatch, llm, wanted):
    layer, x, rest = layer_and_inputs(**llm)
    calls = count(monkeypatch)
    layer(x, **rest)
    assert tuple(calls[name] for name in VERBS) == wanted


def count(monkeypatch):
    calls = dict.fromkeys(VERBS, 0)
    for name in VERBS:
        verb = getattr(ops, name)

        def spy(*args, name=name, verb=verb):
            calls[name] += 1
            return verb(*args)

        monkeypatch.setattr(ops, name, spy)
    return calls


@pytest.mark.parametrize("only", ["self_attn", "mlp", "self_attn.o_proj", ""])
def test_hooks_get_the_inputs_and_outputs_of_llamas_layer(only):
    """On any submodule, including the attention itself."""
    layer, x, rest = layer_and_inputs()
    seen: dict[str, list] = {}

    def record(name):
        def hook(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            first = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, []).extend((given, first))

        return hook

    parts = {name: part for name, part in layer.named_modules() if name and only in ("", name)}
    for name, part in parts.items():
        part.register_forward_hook(record(name), with_kwargs=True)
    layer(x, **rest)
    ours, seen = seen, {}
    LlamaDecoderLayer.forward(layer, x, **rest)
    assert ours.keys() == seen.keys() == parts.keys()
    for name, tensors in seen.items():
        assert all(torch.equal(a, b) for a, b in zip(ours[name], tensors, strict=True)), name


def test_returning_attention_weights_changes_nothing():
    model = make_model()
    model.set_attn_implementation("eager")
    prompts = make_prompts(model)
    own = logits_of(model, prompts)
    with torch.no_grad():
        out = model(**prompts, output_attentions=True, output_hidden_states=True)
    assert [tuple(t.shape[:2]) for t in out.attentions] == [(2, 4)] * 4
    assert len(out.hidden_states) == 5
    assert_relative(logits_of(model, prompts), own)


HOOKS = {
    "forward": lambda part: part.register_forward_hook(print),
    "pre": lambda part: part.register_forward_pre_hook(print),
    "backward": lambda part: part.register_full_backward_hook(print),
    "backward pre": lambda part: part.register_full_backward_pre_hook(print),
    "another forward": lambda part: setattr(part, "forward", print),
    "offloading": lambda part: setattr(part, "_hf_hook", print),
    "another class": lambda part: setattr(part, "__class__", type("Own", (type(part),), {})),
    "meta": lambda part: part.to("meta"),
}


@pytest.mark.parametrize("change", HOOKS)
@pytest.mark.parametrize("at", ["up_proj", ""])
def test_modified_modules_are_not_fusable(change, at):
    mlp = make_model().model.language_model.layers[0].mlp
    assert is_fusable(mlp)
    HOOKS[change](mlp.get_submodule(at))
    assert not is_fusable(mlp)


def test_a_weight_of_another_class_is_not_fusable():
    linear = nn.Linear(4, 4, bias=False)
    assert is_fusable(linear)
    linear.weight = type("Quantised", (nn.Parameter,), {})(linear.weight.data)
    assert not is_fusable(linear)


def test_a_bias_is_fusable_only_with_biased():
    linear = nn.Linear(4, 4)
    assert not is_fusable(linear)
    assert is_fusable(linear, biased=True)
    mlp = make_model(mlp_bias=True).model.language_model.layers[0].mlp
    assert not is_fusable(mlp)
    assert is_fusable(mlp, biased=True)
    assert not is_fusable(nn.ModuleList([linear]), biased=True)


def test_concatenated_weights_are_views_until_one_is_replaced():
    linears = [nn.Linear(6, n, bias=False) for n in (4, 2, 3)]
    before = [linear.weight.data.clone() for linear in linears]
    whole = join_weights(*linears)
    assert torch.equal(whole, torch.cat(before))
    assert are_joined(whole, *linears)
    assert not are_joined(whole, *linears[::-1])
    for linear in linears:
        own = linear.weight.data
        linear.weight.data = own.clone()
        assert not are_joined(whole, *linears)
        linear.weight.data = own
    assert are_joined(whole, *linears)
