"""Submodules of `comemo_kernels.nn` that have to be called are called: hooks, adapters, int8."""

import copy

import pytest
import torch
from conftest import DEVICE
from harness import assert_relative
from nn_layers import B, Int8Linear, N, gradients, make_layer, make_memory, prompts, randoms
from torch import nn

import comemo_kernels as ops
from comemo_kernels.nn import TileProjector, fill_memory

NAMES = [name for name, _ in make_layer("cpu").named_modules() if name]
LINEAR = [name for name in NAMES if name.endswith("_proj")]


@pytest.fixture
def layer():
    return make_layer(DEVICE)


def evaluate(layer, filled):
    """Output and gradients, with a memory that is filled first or not."""
    x, media = (randoms(*shape, device=DEVICE).requires_grad_() for shape in ((B, N, 64), (16, 48)))
    memory = make_memory(media)
    if filled:
        fill_memory([layer], memory)
    y = layer(x, memory, prompts(DEVICE)[0])
    leaves = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    found = gradients(y, x, media, *leaves.values())
    return dict(zip(("output", "x", "media", *leaves), (y, *found), strict=True))


def put(layer, name, module):
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, module)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_hook_runs_and_its_result_is_used(layer, name, filled):
    plain, called = evaluate(layer, filled), []
    handle = layer.get_submodule(name).register_forward_hook(lambda *_: called.append(1))
    for key, found in evaluate(layer, filled).items():
        assert_relative(found, plain[key], key)
    assert called
    handle.remove()
    layer.get_submodule(name).register_forward_hook(lambda m, args, y: 1.5 * y)
    assert not torch.allclose(evaluate(layer, filled)["output"], plain["output"], atol=1e-3)


def test_all_submodules_are_read_without_a_hook(layer, monkeypatch):
    for name in NAMES:
        kind = type(layer.get_submodule(name))
        monkeypatch.setattr(kind, "forward", lambda *_, name=name: pytest.fail(name))
    evaluate(layer, False)
    evaluate(layer, True)


def test_what_is_not_touched_stays_fused(layer, monkeypatch):
    layer.q_proj.register_forward_hook(lambda *_: None)
    seen = []
    for verb in ("norm_linear", "attend_gated", "gated_swiglu", "project_memory"):
        made = getattr(ops, verb)
        spy = lambda *args, verb=verb, made=made: (seen.append(verb), made(*args))[1]  # noqa: E731
        monkeypatch.setattr(ops, verb, spy)
    evaluate(layer, False)
    assert seen == ["project_memory", "attend_gated", "gated_swiglu"]


@pytest.mark.parametrize("name", LINEAR)
def test_int8_layers_equal_their_dequantised_weights(layer, name):
    quantised, wanted = copy.deepcopy(layer), copy.deepcopy(layer)
    int8 = Int8Linear(layer.get_submodule(name))
    put(quantised, name, int8)
    with torch.no_grad():
        wanted.get_submodule(name).weight.copy_(int8.weights())
    for filled in (False, True):
        found, told = evaluate(quantised, filled), evaluate(wanted, filled)
        assert all(assert_relative(found[key], told[key], key) is None for key in found)


@pytest.mark.parametrize("name", LINEAR)
def test_lora_equals_its_merged_weights(layer, name):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=[name], init_lora_weights=False)
    adapted = peft.get_peft_model(nn.ModuleList([layer]), config).eval()
    (inner,) = adapted.base_model.model
    found = [evaluate(inner, filled) for filled in (False, True)]
    (merged,) = adapted.merge_and_unload()
    merged.requires_grad_(False)
    for each in found:
        trained = [key for key in each if "lora" in key]
        assert len(trained) == 2
        assert all(each[key].abs().max() > 0 for key in trained)
        for key in ("output", "x", "media"):
            assert_relative(each[key], evaluate(merged, True)[key], key)


@pytest.mark.parametrize("whole", [False, True], ids=["leaves", "whole"])
def test_offloaded_weights_are_loaded_by_calls(layer, whole):
    hooks = pytest.importorskip("accelerate.hooks")
    layer.requires_grad_(False)
    positions, _ = prompts(DEVICE)
    x, media = randoms(B, N, 64, device=DEVICE), randoms(16, 48, device=DEVICE)
    wanted = layer(x, make_memory(media), positions)
    weights = {name: t.clone() for name, t in layer.state_dict().items()}
    options = {"execution_device": x.device, "offload": True, "weights_map": weights}
    if whole:
        hook = hooks.AlignDevicesHook(**options, place_submodules=True)
        hooks.add_hook_to_module(layer, hook)
    else:
        hooks.attach_align_device_hook(layer, **options)
    assert layer.q_proj.weight.is_meta
    for filled in (False, True):
        memory = make_memory(media)
        if filled:
            fill_memory([layer], memory)
            # The layer's own hook loads its weights, so that only its forward can build.
            assert list(memory.keys) == []
        assert_relative(layer(x, memory, positions), wanted)


def test_a_layer_whose_leaves_are_offloaded_is_filled(layer):
    hooks = pytest.importorskip("accelerate.hooks")
    layer.requires_grad_(False)
    media = randoms(16, 48, device=DEVICE)
    wanted, memory = make_memory(media), make_memory(media)
    fill_memory([layer], wanted)
    for name in ("media_norm", "kv_proj"):
        part = layer.get_submodule(name)
        weights = {n: t.clone() for n, t in part.state_dict().items()}
        options = {"execution_device": media.device, "offload": True, "weights_map": weights}
        hooks.attach_align_device_hook(part, **options)
    assert layer.kv_proj.weight.is_meta
    fill_memory([layer], memory)
    assert_relative(memory.keys[0], wanted.keys[0])
    assert_relative(memory.values[0], wanted.values[0])


def replace_norm(layer):
    layer.attn_norm = nn.RMSNorm(64, None, device=DEVICE)  # its eps depends on the dtype


def add_bias(layer):
    layer.q_proj = nn.Linear(64, 64, device=DEVICE)


def derive(layer):
    layer.q_proj.__class__ = type("Doubled", (nn.Linear,), {"forward": double})


def double(self, x):
    return 2 * nn.functional.linear(x, self.weight)


CHANGES = {
    "another norm": replace_norm,
    "a bias": add_bias,
    "another class": derive,
    "another forward": lambda layer: setattr(layer.q_proj, "forward", double.__get__(layer.q_proj)),
    "an input hook": lambda layer: layer.q_proj.register_forward_pre_hook(lambda m, x: 2 * x[0]),
    "a hook of the gradient": lambda layer: layer.q_proj.register_full_backward_hook(
        lambda m, dx, dy: (2 * dx[0],)
    ),
    "a parametrisation": lambda layer: nn.utils.parametrizations.weight_norm(layer.q_proj),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_submodule_is_called(layer, change):
    CHANGES[change](layer)
    called = copy.deepcopy(layer)
    for name in NAMES:
        called.get_submodule(name).register_forward_hook(lambda *_: None)
    wanted = evaluate(called, False)
    for key, found in evaluate(layer, False).items():
        assert_relative(found, wanted[key], key)


def test_a_hook_on_every_module_runs(layer):
    called = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.add(m))
    try:
        evaluate(layer, False)
    finally:
        handle.remove()
    assert {layer.get_submodule(name) for name in NAMES} <= called


# --- the projector ---


def place(projector, tokens, embeds):
    """Image tokens, embeddings that hold them, and gradients of both."""
    tokens = tokens.detach().clone().requires_grad_()
    embeds = embeds.detach().clone().requires_grad_()
    rows = torch.arange(12, device=tokens.device) + 3
    written = embeds * 1
    y = projector(tokens, written, rows)
    leaves = [p for p in projector.parameters() if p.requires_grad]
    return [y, written, *gradients(y.sum() + (written**2).sum(), tokens, embeds, *leaves)]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("name", ["0", "1", "2", "3"])
def test_a_projector_calls_what_it_must(name, version):
    projector = TileProjector(8, 24, version=version).to(DEVICE)
    tokens, embeds = randoms(3, 17, 8, device=DEVICE), randoms(2, 10, 24, device=DEVICE)
    wanted, called = place(projector, tokens, embeds), []
    projector.get_submodule(name).register_forward_hook(lambda *_: called.append(1))
    for found, told in zip(place(projector, tokens, embeds), wanted, strict=True):
        assert_relative(found, told)
    assert called
    with pytest.raises(ValueError, match=r"forward: tokens must be \[T, 1 \+ h\*h, C\]"):
        projector(tokens[:, 1:])
    with pytest.raises(ValueError, match="embeds and rows must be given together"):
        projector(tokens, embeds)
    with pytest.raises(ValueError, match=r"rows must be int64 \[12\] .* 20 rows of embeds, got"):
        projector(tokens, embeds, torch.tensor([0, 1], device=DEVICE))


def test_another_activation_is_called():
    projector = TileProjector(8, 24).to(DEVICE)
    tokens = 3 * randoms(3, 17, 8, device=DEVICE)
    before = projector(tokens)
    projector[2] = nn.GELU("tanh")
    found = projector(tokens)
    projector[3].register_forward_hook(lambda *_: None)
    assert torch.equal(found, projector(tokens))
    assert not torch.equal(found, before)


def test_a_projector_with_int8_layers_and_adapters():
    peft = pytest.importorskip("peft")
    projector = TileProjector(8, 24).to(DEVICE)
    tokens = randoms(3, 17, 8, device=DEVICE)
    wanted = copy.deepcopy(projector)
    int8 = Int8Linear(projector[1])
    projector[1] = int8
    with torch.no_grad():
        wanted[1].weight.copy_(int8.weights())
    assert_relative(projector(tokens), wanted(tokens))
    config = peft.LoraConfig(r=2, target_modules=["3"], init_lora_weights=False)
    adapted = peft.get_peft_model(wanted, config)
    found = adapted(tokens)
    assert not torch.allclose(found, projector(tokens), atol=1e-3)
    assert_relative(found, adapted.merge_and_unload()(tokens))
