"""Starts of training that are wrong: one error that says what must be there."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from start_parts import (  # noqa: F401
    EVERY_TWO,
    make,
    write,
)

from comemo.processing.tokenizer_files import CheckpointTokenizer
from comemo.train.models.start import start_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("a model is made on the CPU"),
]


def copy_of(directory, folder):
    """A copy of a directory that a test may change: its weights, its config, and the folder."""
    folder.mkdir()
    for path in Path(directory).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config, folder


def edited(make, folder, part="language", change=None, config=None, files=()):
    """Settings with a copy of a directory, after changes of its weights and its config."""
    settings, _ = make()
    weights, old, copied = copy_of(getattr(settings, part), folder / "edited")
    if change is not None:
        change(weights)
    write(copied, weights, old | (config or {}))
    for name in files:
        (copied / name).write_bytes(b"\x80")
    setattr(settings, part, str(copied))
    return settings


def lose_two(weights):
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]


def add_one(weights):
    weights["model.layers.0.mlp.extra.weight"] = torch.zeros(2)


def cut_one(weights):
    weights["model.norm.weight"] = torch.zeros(3)


def quantise(weights):
    weights["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)


def make_deeper(weights):
    weights["encoder.layers.1.ls1"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"change": lose_two}, ["missing: ['model.language_model.layers.0.mlp.up_proj.weight', "]),
        ({"change": add_one}, ["unexpected: ['model.layers.0.mlp.extra.weight']"]),
        ({"change": cut_one}, ["of another shape: ['model.norm.weight (3,)", "(64,)"]),
        ({"change": quantise}, ["model.norm.weight I8"]),
        ({"part": "vision", "change": make_deeper}, ["unexpected: ['encoder.layers.1.ls1']"]),
        ({"part": "vision", "config": {"model_type": "clip"}}, ["start.vision", "clip"]),
        ({"part": "vision", "config": {"use_mean_pooling": False}}, ["no final norm"]),
        ({"config": {"model_type": "qwen2"}}, ["start.language: model_type", "qwen2"]),
        ({"config": {"architectures": ["MistralForCausalLM"]}}, ["MistralForCausalLM"]),
        ({"config": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}}, ["dynamic"]),
        ({"config": {"hidden_size": None}}, ["start.language", "hidden_size"]),
        ({"config": {"head_dim": "16"}}, ["head_dim", "'16'"]),
        ({"config": {"hidden_size": "64"}}, ["hidden_size", "'64'"]),
    ],
)
def test_wrong_directories(make, tmp_path, options, words):
    pattern = ".*".join(map(re.escape, words))
    with pytest.raises(ValueError, match=pattern):
        start_model(edited(make, tmp_path, **options), seed=0)


def without(folder, name):
    (folder / "edited" / name).unlink()


@pytest.mark.parametrize(
    ("name", "left", "words"),
    [
        ("model.safetensors", "pytorch_model.bin", "save_pretrained"),
        ("model.safetensors", "a.txt", "must hold model.safetensors"),
        ("config.json", None, "must hold a config.json"),
        ("tokenizer.json", None, "must hold a tokenizer.json"),
    ],
)
def test_absent_files(make, tmp_path, name, left, words):
    settings = edited(make, tmp_path, files=[left] if left else ())
    without(tmp_path, name)
    with pytest.raises(ValueError, match=words):
        start_model(settings, seed=0)


def test_a_tokenizer_that_is_none(make, tmp_path):
    settings = edited(make, tmp_path)
    (tmp_path / "edited" / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"start\.language: .* cannot read the tokenizer in"):
        start_model(settings, seed=0)
    with pytest.raises(ValueError, match="cannot read the tokenizer in"):
        CheckpointTokenizer.from_pretrained(tmp_path / "edited")


@pytest.mark.parametrize(
    "named", [{"a": "../x.safetensors"}, {"a": "x.bin"}, {"a": "absent.safetensors"}, {}, []]
)
def test_wrong_indices(make, tmp_path, named):
    settings = edited(make, tmp_path)
    index = tmp_path / "edited" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": named}))
    with pytest.raises(ValueError, match="must name safetensors files beside it"):
        start_model(settings, seed=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vision": None}, "either checkpoint, or both"),
        ({"checkpoint": "x"}, "either checkpoint, or both"),
        (
            {"checkpoint": "/absent", "vision": None, "language": None},
            "start.checkpoint: there is no directory '/absent'",
        ),
        ({"vision": 3}, "start.vision: must be a path"),
        ({"vision": "/absent"}, "there is no directory '/absent'"),
        ({"tokenizer": "/absent"}, "there is no directory '/absent'"),
        ({"projector": "/absent.safetensors"}, "there is no file"),
        ({"projector": "a.bin"}, "pickle"),
        ({"model": []}, "start.model: must be values by name"),
        ({"model": {"tile_oder": "row"}}, "got 'tile_oder'"),
        ({"model": {"image_token_id": 3}}, "got 'image_token_id'"),
        ({"model": {"tile_order": "diagonal"}}, "tile_order must be one of"),
        ({"model": {"template": "chatml", **EVERY_TWO}}, "'chatml'"),
        ({"model": {"mixin_config": 3}}, "mixin_config must be values by name"),
        ({"model": {"mixin_config": {"heads": 3}}}, "got 'heads'"),
        ({"model": {"mixin_config": {"num_heads": 0}}}, "num_heads"),
        ({"model": {}}, "mixin_every_n_layers"),  # every fourth: the fixture's settings have two
        ({"model": {"force_image_size": 100, **EVERY_TWO}}, "multiple of the patch size 14"),
        ({"model": {"force_image_size": "x", **EVERY_TWO}}, "force_image_size must be a number"),
        ({"model": {"force_image_size": 126, **EVERY_TWO}}, "downsample_ratio"),
    ],
)
def test_wrong_settings(make, given, words):
    settings, _ = make()
    if given == {"model": {}}:
        settings.model = {"mixin_config": {"mixin_every_n_layers": 5}}
    else:
        for name, value in given.items():
            setattr(settings, name, value)
    with pytest.raises(ValueError, match=words):
        start_model(settings, seed=0)


def test_a_projector_of_another_width(make, tmp_path):
    settings, _ = make()
    settings.projector = str(tmp_path / "p.safetensors")
    save_file({"0.weight": torch.zeros(7), "mlp1.1.bias": torch.zeros(64)}, settings.projector)
    with pytest.raises(ValueError, match=r"start\.projector.*missing.*of another shape"):
        start_model(settings, seed=0)
    save_file({"2.weight": torch.zeros(7)}, settings.projector)
    with pytest.raises(ValueError, match=r"keys must be mlp1"):
        start_model(settings, seed=0)


def test_a_projector_that_does_not_fit_begins_anew(make, demo_checkpoint, caplog):
    settings, _ = make()
    settings.vision = str(demo_checkpoint)
    model, _ = start_model(settings, seed=0)
    assert "does not fit" in caplog.text
    norm = model.model.multi_modal_projector[0]
    assert torch.equal(norm.weight, torch.ones(256))
    assert model.config.tokens_per_tile == 256
