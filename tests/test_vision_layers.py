"""The vision layers from their weights: the bits of the modules, which are called if asked."""

import copy

import pytest
import torch
from torch import nn

from comemo import nano, vision_layers
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.vision_layers import encode


@pytest.fixture(scope="module")
def tower():
    model = CoMemoForConditionalGeneration.from_pretrained(nano.checkpoint(), dtype=torch.float32)
    return model.eval().model.vision_tower


@pytest.fixture
def layer(tower):
    return copy.deepcopy(tower.encoder.layer[0])


@pytest.fixture
def x(tower):
    return torch.randn(2, 17, tower.config.hidden_size)


@pytest.fixture
def calls(layer, monkeypatch):
    """How often `layer` was called; it may still be computed from its weights."""
    made = []
    forward = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x: made.append(1) or forward(self, x))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bits_are_those_of_the_module(layer, x, calls, dtype, attention):
    layer.to(dtype)
    layer.attention.config = copy.copy(layer.attention.config)
    layer.attention.config._attn_implementation = attention
    x = x.to(dtype)
    before = x.clone()
    with torch.no_grad():
        found = encode(layer, x)
        assert not calls
        assert torch.equal(found, layer(x))
    assert torch.equal(x, before)


def test_normed_queries_and_a_layer_without_a_second_scale(layer, x, calls):
    layer.attention.q_norm = vision_layers.InternVLVisionRMSNorm(x.shape[-1])
    layer.attention.k_norm = vision_layers.InternVLVisionRMSNorm(x.shape[-1])
    layer.lambda_2 = None
    with torch.no_grad():
        found = encode(layer, x)
        assert not calls
        assert torch.equal(found, layer(x))


def hook(layer):
    layer.mlp.fc1.register_forward_hook(lambda module, args, out: out * 0)


def adapt(layer):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    own = layer.mlp.fc2
    layer.mlp.fc2 = Adapted(own.in_features, own.out_features)


def activate(layer):
    layer.mlp.activation_fn = nn.ReLU()


def train(layer):
    layer.train()


@pytest.mark.parametrize("change", [hook, adapt, activate, train])
def test_what_is_not_plain_is_called(layer, x, calls, change):
    change(layer)
    with torch.no_grad():
        found = encode(layer, x)
        assert len(calls) == 1
        assert torch.equal(found, layer(x))


def test_gradients_and_autocast_are_the_modules(layer, x, calls):
    encode(layer, x).sum().backward()
    assert layer.mlp.fc1.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encode(layer, x)
    assert len(calls) == 2
