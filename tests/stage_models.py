"""Tiny models for the stages of training: with parts frozen, with adapters, with more layers."""

import copy

import pytest
import torch
from conftest import here
from small import make_model

import comemo
from comemo.cli.tiny_checkpoint import spread_weights
from comemo.train.models.adapters import add_adapters
from comemo.train.models.freezing import choose_trainable, is_adapter
from comemo.train.settings import LoraSettings, StageSettings


@pytest.fixture(scope="module")
def source():
    """A model that no test changes."""
    return make_model()


@pytest.fixture
def small(source):
    return copy.deepcopy(source)


def deep_model(depth, select_layer=-1):
    """A model with so many vision layers."""
    config = copy.deepcopy(make_model().config)
    config.vision_config.num_hidden_layers, config.select_layer = depth, select_layer
    model = comemo.CoMemoForConditionalGeneration(config)
    spread_weights(model)
    return model.eval().to(here())


def trained(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def shift(model):
    """Change what is trained, as a stage would."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight) * (1 if is_adapter(name) else 0.2)


def adapted_model(small, lora=None, **stage):
    lora = lora or LoraSettings(vision=2, language=2, mixin=2)
    add_adapters(small, lora, seed=0)
    choose_trainable(small, StageSettings(lora=lora, **stage))
    shift(small)
    return small
