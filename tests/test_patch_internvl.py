"""Patched InternVLs of transformers project tiles as they do unpatched, whatever is plugged in."""

import contextlib
import copy
import io

import pytest
import torch
from conftest import SLOW, TRACED
from harness import assert_errs_no_more
from internvl_models import make_internvl, make_prompts
from patching import assert_patched_matches, unchanged
from torch import nn

import comemo_kernels

accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")
PROJECTOR = "model.multi_modal_projector"
PARTS = ["layer_norm", "linear_1", "act", "linear_2"]


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    return make_internvl()


@pytest.fixture
def model(shared):
    """A model that a test may change."""
    return copy.deepcopy(shared)


@pytest.fixture
def prompts():
    return make_prompts(padding="left")


@torch.no_grad()
def logits_of(model, prompts):
    return model(**prompts).logits


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Counted(nn.Module):
    """Counts the calls of `project_tiles`."""

    def __init__(self, monkeypatch):
        super().__init__()
        from comemo_kernels.patching import internvl_features

        self.calls, run = 0, internvl_features.project_tiles

        def counted(*args, **kwargs):
            self.calls += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(internvl_features, "project_tiles", counted)


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


@contextlib.contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["vision_tower", "multi_modal_projector", *PARTS])
def test_hooks_run_and_their_results_are_used(model, prompts, name):
    plain, fired = logits_of(model, prompts), []
    parent = f"{PROJECTOR}." if name in PARTS else "model."
    module = model.get_submodule(parent + name)

    def hook(module, args, output):
        fired.append(module)
        if isinstance(output, torch.Tensor):
            return 1.2 * output
        output.last_hidden_state = 1.2 * output.last_hidden_state
        return output

    with hooked(module, hook):
        wanted = logits_of(model, prompts)
        with comemo_kernels.patched(model):
            close(logits_of(model, prompts), wanted)
    with comemo_kernels.patched(model):
        with hooked(module, hook):
            close(logits_of(model, prompts), wanted)
        close(logits_of(model, prompts), plain)
    assert len(fired) == 3
    assert not torch.equal(wanted, plain) or name == "vision_tower"


@pytest.mark.parametrize("name", ["linear_1", "linear_2"])
def test_adapters(model, prompts, name):
    first = logits_of(model, prompts)
    comemo_kernels.patch(model)
    config = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=[f"{PROJECTOR}.{name}"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config).eval()
    after = logits_of(adapted, prompts)
    comemo_kernels.unpatch(adapted)
    wanted = logits_of(adapted, prompts)
    close(after, wanted)
    assert (wanted - first).abs().max() > 1e-2
    with comemo_kernels.patched(adapted):
        close(logits_of(adapted, prompts), wanted)
        close(logits_of(adapted.merge_and_unload(), prompts), wanted)


def test_a_projector_that_is_trained_as_a_whole(model, prompts):
    """peft copies it, and wraps both."""
    first = logits_of(model, prompts)
    config = peft.LoraConfig(
        r=2,
        target_modules=["language_model.layers.0.self_attn.q_proj"],
        modules_to_save=["multi_modal_projector"],
    )
    with comemo_kernels.patched(model):
        adapted = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(1.5)
        after = logits_of(adapted, prompts)
    wanted = logits_of(adapted, prompts)
    close(after, wanted)
    assert (wanted - first).abs().max() > 1e-2
    with comemo_kernels.patched(adapted):
        close(logits_of(adapted, prompts), wanted)


class Rounded(nn.Linear):
    """A linear layer that keeps its weight as integers, as int8 layers do."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter((linear.weight * 100).round().to(torch.int8), False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100, self.bias)


@pytest.mark.parametrize("name", ["linear_1", "linear_2"])
def test_integer_weights(model, prompts, name):
    projector = model.model.multi_modal_projector
    with comemo_kernels.patched(model):
        setattr(projector, name, Rounded(getattr(projector, name)))
        after = logits_of(model, prompts)
    wanted = logits_of(model, prompts)
    close(after, wanted)
    with comemo_kernels.patched(model):
        close(logits_of(model, prompts), wanted)


@pytest.mark.parametrize("placed", ["offloaded", "dispatched"])
def test_hooks_of_accelerate(model, prompts, placed):
    first = logits_of(model, prompts)

    def place(module):
        if placed == "offloaded":
            accelerate.cpu_offload(module, execution_device="cpu")
        else:
            accelerate_hooks.attach_align_device_hook(module)
            for part in module.modules():
                hook = accelerate_hooks.AlignDevicesHook("cpu", io_same_device=True)
                accelerate_hooks.add_hook_to_module(part, hook, append=True)

    before, after = copy.deepcopy(model), copy.deepcopy(model)
    place(before)
    with comemo_kernels.patched(before):
        close(logits_of(before, prompts), first)
    close(logits_of(before, prompts), first)
    with comemo_kernels.patched(after):
        place(after)
        close(logits_of(after, prompts), first)
    close(logits_of(after, prompts), first)


def test_copies_pickles_and_what_is_left(model, prompts):
    wanted = logits_of(copy.deepcopy(model), prompts)  # transformers 5.24 cannot pickle it after
    with unchanged(model), comemo_kernels.patched(model):
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
    for other in (copied, torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        close(logits_of(other, prompts), wanted)
        assert vars(other)["forward"].module is other
        comemo_kernels.unpatch(other)
        assert not any("forward" in vars(module) for module in other.modules())
        close(logits_of(other, prompts), wanted)


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
