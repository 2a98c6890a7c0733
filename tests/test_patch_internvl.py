"""Patched InternVLs of transformers project tiles as they do unpatched."""

import copy

import pytest
import torch
from conftest import SLOW, TRACED
from harness import assert_errs_no_more
from internvl_models import (  # noqa: F401, fixtures
    Counted,
    close,
    logits_of,
    make_internvl,
    make_prompts,
    model,
    prompts,
    shared,
)
from patching import assert_patched_matches

import comemo_kernels

pytestmark = pytest.mark.usefixtures("one_thread")
PROJECTOR = "model.multi_modal_projector"


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


def learn(model, prompts):
    """Logits, and gradients of the projector and the vision tower."""
    model.zero_grad()
    logits = model(**prompts).logits
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * cotangent).sum().backward()
    grads = {
        f"gradient of {name}": parameter.grad
        for name, parameter in model.model.named_parameters()
        if "projector" in name or "vision_tower.encoder.layer.1.mlp" in name
    }
    return {"output": logits.detach()} | grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_errs_no_more(model, prompts, dtype, counted):
    def run(model, factor):
        return learn(model, prompts | {"pixel_values": factor * prompts["pixel_values"]})

    assert_patched_matches(model.to(dtype).train(), run)
    assert counted.calls == 1


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.25},
        {"ratio": 1.0},
        {"vision_feature_layer": -2},
        {"vision_feature_layer": 1},
        {"projector_hidden_act": "gelu_pytorch_tanh"},
    ],
    ids=str,
)
def test_options_of_the_config(options, counted):
    ratio = options.get("ratio", 0.5)
    model, prompts = make_internvl(**options), make_prompts(ratio=ratio)
    wanted, features = logits_of(model, prompts), features_of(model, prompts)
    with comemo_kernels.patched(model) as patch:
        close(logits_of(model, prompts), wanted)
        found = features_of(model, prompts)
    assert found.keys() == features.keys()
    for name, value in features.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    fused = "projector_hidden_act" not in options
    assert counted.calls == 2 * fused
    left = patch.report().left.get(PROJECTOR, "")
    assert fused or "exact GELU" in left


@torch.no_grad()
def features_of(model, prompts, **options):
    return model.get_image_features(prompts["pixel_values"], return_dict=True, **options)


def test_arguments_of_get_image_features(model, prompts):
    calls = [
        {},
        {"vision_feature_layer": -2},
        {"vision_feature_layer": 1, "output_hidden_states": True},
        {"output_attentions": True},
        {"vision_feature_select_strategy": "default"},
    ]
    wanted = [features_of(model, prompts, **options) for options in calls]
    with comemo_kernels.patched(model):
        found = [features_of(model, prompts, **options) for options in calls]
        tuples = model.model.get_image_features(prompts["pixel_values"], return_dict=False)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        torch.testing.assert_close(dict(mine), dict(theirs), rtol=1e-4, atol=1e-4)
    close(tuples[-1], wanted[0].pooler_output)


def test_errors_are_those_of_the_model(model, prompts):
    pixels = prompts["pixel_values"]
    calls = [
        {"pixel_values": pixels, "vision_feature_select_strategy": "full"},
        {"pixel_values": pixels, "vision_feature_select_strategy": "none"},
        {"pixel_values": pixels[:, :2]},
        {"pixel_values": pixels, "vision_feature_layer": 9},
        {"pixel_values": pixels, "vision_feature_layer": [0, 1]},
    ]
    for given in calls:
        with pytest.raises(Exception) as wanted:  # noqa: PT011
            model.get_image_features(**given)
        with comemo_kernels.patched(model), pytest.raises(type(wanted.value)) as found:
            model.get_image_features(**given)
        assert str(found.value) == str(wanted.value)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("mode", ["greedy", "beams", "static"])
def test_it_generates_as_unpatched(model, prompts, mode):
    options = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }[mode]
    options |= {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(**prompts, **options)
    with comemo_kernels.patched(model):
        assert torch.equal(model.generate(**prompts, **options), wanted)


def test_the_model_without_its_head(model, prompts, counted):
    core = model.model
    wanted = core(**prompts).last_hidden_state
    with comemo_kernels.patched(core):
        close(core(**prompts).last_hidden_state, wanted)
    assert counted.calls == 1


def test_parts_that_are_called_alone_are_the_models_own(model):
    raster, folded = torch.randn(2, 4, 4, 16), torch.randn(2, 4, 64)
    core = model.model
    wanted = core.pixel_shuffle(raster), core.multi_modal_projector(folded)
    with comemo_kernels.patched(model):
        assert torch.equal(core.pixel_shuffle(raster), wanted[0])
        assert torch.equal(core.multi_modal_projector(folded), wanted[1])


def test_modified_features_are_used(model, prompts):
    """A subclass that changes features between tower, fold and projector."""

    class Scaling(type(model.model)):
        def pixel_shuffle(self, vision_features, scale_factor=0.5):
            return 2 * super().pixel_shuffle(vision_features, scale_factor)

    class Shifting(type(model.model)):
        def get_image_features(self, pixel_values, **kwargs):
            found = self.vision_tower(pixel_values).last_hidden_state
            raster = self.pixel_shuffle(found[:, 1:].unflatten(1, (4, 4)) + 1)
            return self.multi_modal_projector(raster.reshape(len(raster), -1, raster.shape[-1]))

    for kind in (Scaling, Shifting):
        other = copy.deepcopy(model).model
        other.__class__ = kind
        wanted = other.get_image_features(prompts["pixel_values"])
        with comemo_kernels.patched(other):
            found = other.get_image_features(prompts["pixel_values"])
        torch.testing.assert_close(found, wanted)


@TRACED
@pytest.mark.parametrize("call", [pytest.param(c, marks=SLOW) for c in ("features", "forward")])
def test_it_compiles_whole(model, prompts, call):
    def run():
        if call == "features":
            return model.get_image_features(prompts["pixel_values"]).pooler_output
        return model(**prompts).logits

    with torch.no_grad():
        wanted = run()
        with comemo_kernels.patched(model):
            close(torch.compile(run, fullgraph=True, backend="eager")(), wanted)


@pytest.mark.kernel
def test_on_kernels(device, monkeypatch):
    counted = Counted(monkeypatch)
    model, prompts = make_internvl().to(device), make_prompts()
    pixels = prompts["pixel_values"].to(device)
    with torch.no_grad():
        wanted = model.get_image_features(pixels).pooler_output
        exact = copy.deepcopy(model).double().get_image_features(pixels.double()).pooler_output
        with comemo_kernels.patched(model) as patch:
            found = model.get_image_features(pixels).pooler_output
            assert counted.calls == 1
            model.double()
            with pytest.warns(comemo_kernels.PatchWarning, match="float64 has no kernel"):
                torch.testing.assert_close(model.get_image_features(pixels).pooler_output, exact)
    assert_errs_no_more(found, wanted, exact)
    assert patch.report().refused == {
        "model.get_image_features": {"float64 has no kernel": 1},
    }
