"""A config that is read without transformers says what `CoMemoConfig` says, or is not read."""

import copy
import json
import random

import pytest
from small import make_model

from comemo import nano
from comemo.config import CoMemoConfig
from comemo.config_plain import DEFAULTS, _read, read_plain

PARTS = {
    "text_config": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    "vision_config": ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size"),
    "mixin_config": ("language_dim", "head_dim", "num_heads", "mixin_every_n_layers"),
}
VALUES = (None, True, False, 0, 1, -1, 2, 3, 0.0, 1.5, 1e6, "x", "silu", "float64", [], [1], {})
VALUES += (float("nan"), float("inf"), 2**40, [448, 448], {"type": "dynamic", "factor": 2.0})


def facts(config):
    names = [*DEFAULTS, "llm_architecture", "tokens_per_tile", "side", "mixin_layers"]
    sizes = {part: {n: getattr(getattr(config, part), n) for n in PARTS[part]} for part in PARTS}
    heads = (config.text_config.num_key_value_heads, config.text_config.head_dim)
    pixels = [tuple(getattr(config.vision_config, n)) for n in ("image_size", "patch_size")]
    del sizes["vision_config"]["image_size"]
    return {name: getattr(config, name) for name in names}, sizes, heads, pixels


@pytest.fixture(scope="module")
def contents(golden, tmp_path_factory):
    """Configs as published, as saved here, and of another language model."""
    own = tmp_path_factory.mktemp("own")
    make_model(architectures=["LlamaForCausalLM"]).config.save_pretrained(own)
    files = (nano.checkpoint(), own, golden / "ckpt_a")
    return [json.loads((folder / "config.json").read_text()) for folder in files]


def test_usual_configs_are_read_alike(contents):
    for content in contents:
        assert facts(_read(content)) == facts(CoMemoConfig.from_dict(content))


def test_defaults_are_those_of_the_config():
    config = CoMemoConfig()
    own = {name: getattr(config, name) for name in DEFAULTS if name != "force_image_size"}
    assert own | {"force_image_size": None} == DEFAULTS


def changed(content, draw):
    """A copy in which one setting has another value, is missing, or is new."""
    content = copy.deepcopy(content)
    part = draw.choice(["", "", *(k for k, v in content.items() if k in (*PARTS, "llm_config"))])
    held = content[part] if part else content
    others = ["layer_types", "quantization_config", "rope_scaling", "hidden_act", "bias", "name"]
    name = draw.choice([*sorted(held), *others])
    if draw.random() < 0.15:
        held.pop(name, None)
    else:
        held[name] = draw.choice(VALUES)
    return content, f"{part}.{name}"


def test_unusual_configs_are_left_to_the_config(contents):
    draw, read = random.Random(0), 0
    for _ in range(600):
        content, name = changed(draw.choice(contents), draw)
        plain = read_plain(content)
        if plain is not None:
            assert facts(plain) == facts(CoMemoConfig.from_dict(content)), name
            read += 1
    assert read > 60


@pytest.mark.parametrize("content", [None, [], "x", 1, {}, {"model_type": "comemo_chat"}])
def test_what_is_no_config_is_not_read(content):
    assert read_plain(content) is None
