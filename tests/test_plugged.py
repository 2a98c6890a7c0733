"""Whatever replaces a module is called: hooks, adapters, quantised and offloaded modules.

The model computes many modules from their weights, in fewer launches. Each test replaces one module
after the other, including those of the vision tower, and compares with a model that calls them all.
"""

import copy

import pytest
import torch
from conftest import SLOW
from small import logits_of, make_model, make_prompts
from torch import nn
from torch.utils import _pytree as pytree

import comemo

accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")
peft = pytest.importorskip("peft")

TOLERANCE = 2e-4  # of logits of about 3, summed in another order
# One layer of each kind is enough: the second decoder layer has a mixin layer.
LEFT_OUT = ("layers.0", "layers.2", "layers.3")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def prompts(model):
    return make_prompts(model)


@pytest.fixture(scope="module")
def called(model):
    """A model in which every module is called."""
    other = copy.deepcopy(model)
    for module in other.modules():
        module.register_forward_hook(lambda *_: None)
    return other


def names_of(model, *kinds):
    """Names of modules, one layer of each kind; only of classes `kinds` if given."""
    return [
        name
        for name, module in model.named_modules()
        if name
        and not isinstance(module, nn.ModuleList)
        and not any(part in name for part in LEFT_OUT)
        and (not kinds or isinstance(module, kinds))
    ]


def put(model, name, module):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def distance(model, other, prompts):
    return (logits_of(model, prompts) - logits_of(other, prompts)).abs().max().item()


def weighted(model):
    """Names of modules that have parameters, submodules included."""
    return [n for n in names_of(model) if any(True for _ in model.get_submodule(n).parameters())]


def test_the_modules_to_replace(model, called, prompts):
    names = names_of(model)
    for part in ("vision_tower", "encoder.layer.0.attention.q_proj", "multi_modal_projector.1"):
        assert any(name.endswith(part) for name in names), part
    for part in ("mixin", "mixin.kv_proj", "mixin.mlp.act_fn", "self_attn.o_proj", "lm_head"):
        assert any(name.endswith(part) for name in names), part
    assert distance(model, called, prompts) < TOLERANCE


def test_hooks_run_and_their_results_are_used(model, called, prompts):
    fired = []

    def hook(module, args, output):
        fired.append(module)
        return pytree.tree_map(
            lambda t: t * 1.2 if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
            output,
        )

    before = logits_of(model, prompts)
    for name in names_of(model):
        handles = [m.get_submodule(name).register_forward_hook(hook) for m in (model, called)]
        try:
            fired.clear()
            found = logits_of(model, prompts)
            assert fired, name
            assert (found - logits_of(called, prompts)).abs().max() < 10 * TOLERANCE, name
            assert (found - before).abs().max() > 0, name
        finally:
            for handle in handles:
                handle.remove()
    assert torch.equal(logits_of(model, prompts), before)


def test_a_called_projector_gets_one_round_of_tiles_at_a_time(model, prompts):
    tiles, core, order = prompts["pixel_values"], copy.deepcopy(model.model), []
    wanted = core.project_images(tiles)
    core.config = copy.deepcopy(core.config)
    core.config.tiles_at_once = 1
    core.multi_modal_projector.register_forward_hook(lambda *_: order.append("projector"))
    core.vision_tower.embeddings.register_forward_hook(lambda *_: order.append("tower"))
    assert torch.allclose(core.project_images(tiles), wanted, atol=1e-5)
    assert order == ["tower", "projector"] * 3


def test_a_global_hook_runs_for_every_module(model, prompts):
    called = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.add(m))
    try:
        logits_of(model, prompts)
    finally:
        handle.remove()
    missed = [name for name in names_of(model) if model.get_submodule(name) not in called]
    assert not missed


def test_lora_equals_its_merged_weights(model, prompts):
    before = logits_of(model, prompts)
    for name in names_of(model, nn.Linear, nn.Embedding, nn.Conv2d):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=[name], init_lora_weights=False)
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        found = logits_of(adapted, prompts)
        merged = logits_of(adapted.merge_and_unload(), prompts)
        assert (found - merged).abs().max() < 10 * TOLERANCE, name
        assert (found - before).abs().max() > 1e-3, name


@pytest.mark.slow
def test_modules_to_save_are_used(model, prompts):
    target = "model.language_model.layers.3.self_attn.q_proj"
    for name in weighted(model):
        if target.startswith(f"{name}."):  # peft cannot copy a module with an adapter in it
            continue
        config = peft.LoraConfig(r=2, target_modules=[target], modules_to_save=[name])
        wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
        wanted = copy.deepcopy(model)
        with torch.no_grad():
            for weight in wanted.get_submodule(name).parameters():
                weight.mul_(1.3)
            for part, weight in wrapped.named_parameters():
                if ".modules_to_save." in part:
                    weight.mul_(1.3)
        assert distance(wrapped, wanted, prompts) < 10 * TOLERANCE, name
        assert distance(wrapped, model, prompts) > 1e-4, name


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale per row, like those of quantisers."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantised(self):
        return self.weight * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantised(), self.bias)


def test_int8_layers_equal_their_dequantised_weights(model, prompts):
    for name in names_of(model, nn.Linear):
        quantised, wanted = copy.deepcopy(model), copy.deepcopy(model)
        linear = wanted.get_submodule(name)
        layer = Int8Linear(linear)
        put(quantised, name, layer)
        with torch.no_grad():
            linear.weight.copy_(layer.dequantised())
        assert distance(quantised, wanted, prompts) < TOLERANCE, name
    everywhere = copy.deepcopy(model)
    for name, module in list(everywhere.named_modules()):
        if isinstance(module, nn.Linear):
            put(everywhere, name, Int8Linear(module))
    answer = everywhere.generate(**prompts, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] == prompts["input_ids"].shape[1] + 3


@pytest.mark.parametrize("whole", [pytest.param(False, marks=SLOW), True], ids=["leaves", "whole"])
def test_offloaded_modules_are_loaded_when_called(model, prompts, whole):
    """Leaf by leaf, or a module with all its submodules, like `_no_split_modules`."""
    before = logits_of(model, prompts)
    for name in weighted(model):
        if whole and "model.language_model.embed_tokens".startswith(f"{name}."):
            continue  # embeddings are called outside of their parents, as in transformers
        offloaded = copy.deepcopy(model)
        module = offloaded.get_submodule(name)
        weights = {n: t.clone() for n, t in module.state_dict().items()}
        if whole:
            hook = accelerate_hooks.AlignDevicesHook(
                execution_device=model.device,
                offload=True,
                weights_map=weights,
                place_submodules=True,
            )
            accelerate_hooks.add_hook_to_module(module, hook)
        else:
            accelerate_hooks.attach_align_device_hook(
                module, execution_device=model.device, offload=True, weights_map=weights
            )
        assert all(weight.is_meta for weight in module.parameters()), name
        assert (logits_of(offloaded, prompts) - before).abs().max() < TOLERANCE, name


@pytest.mark.parametrize("way", ["disk", "cpu_offload"])
def test_a_completely_offloaded_model_generates(model, prompts, tmp_path, way):
    wanted = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    if way == "disk":
        model.save_pretrained(tmp_path / "model")
        parts = [f"model.{name}" for name in ("vision_tower", "multi_modal_projector")]
        parts += [f"model.language_model.{name}" for name in ("embed_tokens", "norm")]
        parts += [f"model.language_model.layers.{i}" for i in range(4)]
        places = dict.fromkeys(parts, "disk") | {"lm_head": model.device.type}
        offloaded = (
            type(model)
            .from_pretrained(
                tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights"
            )
            .eval()
        )
    else:
        offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=model.device)
    assert offloaded.device.type == model.device.type
    assert sum(weight.is_meta for weight in offloaded.parameters()) > 40
    assert torch.equal(offloaded.generate(**prompts, max_new_tokens=4, do_sample=False), wanted)
    with torch.no_grad():
        tiles = prompts["pixel_values"]
        found = offloaded.get_image_features(tiles).pooler_output
        assert torch.equal(found, model.get_image_features(tiles).pooler_output)
    with pytest.raises(ValueError, match="offloaded weights"):
        offloaded.generate(**prompts, decode_loop=comemo.DecodeLoop(offloaded))
