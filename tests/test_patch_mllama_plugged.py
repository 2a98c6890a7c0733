"""A patched Mllama calls whatever replaces a module: hooks, adapters, int8, offloaded weights."""

import copy
import io

import pytest
import torch
from conftest import SLOW
from harness import assert_relative
from mllama_models import prompt_of, tiny_mllama
from patching import unchanged
from torch import nn
from torch.nn.utils import parametrize

import comemo_kernels as ops

accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*hidden_state.*:FutureWarning"),
    pytest.mark.no_virtual_gpu("hooks of accelerate move modules"),
]
LAYERS = "model.language_model.layers"


@pytest.fixture(scope="module")
def built():
    return tiny_mllama()


@pytest.fixture
def model(built):
    return copy.deepcopy(built)


@pytest.fixture(scope="module")
def names(built):
    """Modules of a layer of each kind, the model and the text model."""
    text = [name for name, _ in built.named_modules() if name.startswith(LAYERS)]
    kept = [name for name in text if name.startswith((f"{LAYERS}.1", f"{LAYERS}.2"))]
    return ["model", "model.language_model", *kept]


@torch.no_grad()
def logits(model):
    return model(**prompt_of()).logits


def put(model, name, module):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def test_hooks_run_and_their_results_are_used(model, names):
    changed = torch.Size([2, 7, 64])
    for name in names:
        module, seen = model.get_submodule(name), []

        def hook(module, args, output, seen=seen):
            seen.append(output)
            is_states = isinstance(output, torch.Tensor) and output.shape == changed
            return output * 1.5 if is_states else None

        handle = module.register_forward_hook(hook)
        plain, calls = logits(model), len(seen)
        with ops.patched(model):
            ours = logits(model)
        handle.remove()
        assert len(seen) == 2 * calls > 0, name
        assert_relative(ours, plain, name)


def test_hooks_on_all_modules_at_once(model, names):
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda module, args: None)
    plain = logits(model)
    with ops.patched(model):
        assert_relative(logits(model), plain)


class Int8(nn.Module):
    """A linear layer with weights of 8 bits, as libraries for quantisation replace them."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.detach())

    def forward(self, x):
        return x @ (self.weight * self.scale).to(x.dtype).t()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def quantise(model, name):
    put(model, name, Int8(model.get_submodule(name)))


def parametrise(model, name):
    parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())


def replace_forward(model, name):
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args: 3 * forward(*args)


@pytest.mark.parametrize(
    ("change", "before"),
    [
        (quantise, False),
        (replace_forward, True),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (
                (quantise, True),
                (parametrise, True),
                (parametrise, False),
                (replace_forward, False),
            )
        ),
    ],
)
def test_changed_modules_are_called(model, names, change, before):
    kinds = (nn.Linear, nn.SiLU) if change is replace_forward else nn.Linear
    for name in names:
        if not isinstance(model.get_submodule(name), kinds):
            continue
        plain, ours = copy.deepcopy(model), copy.deepcopy(model)
        change(plain, name)
        if before:
            change(ours, name)
        with ops.patched(ours):
            if not before:
                change(ours, name)
            assert_relative(logits(ours), logits(plain), name)


@pytest.mark.filterwarnings("ignore::comemo_kernels.PatchWarning")
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_replaced_functions_of_whole_parts(model, before):
    """Somebody else's function gets the mask that transformers makes."""
    for part in ("", ".cross_attn", ".mlp"):
        plain, ours = copy.deepcopy(model), copy.deepcopy(model)

        def change(model, part=part):
            module = model.get_submodule(f"{LAYERS}.1{part}")
            forward = module.forward

            def changed(*args, **kwargs):
                found = forward(*args, **kwargs)
                return (2 * found[0], None) if isinstance(found, tuple) else 2 * found

            module.forward = changed

        change(plain)
        if before:
            change(ours)
        with ops.patched(ours):
            if not before:
                change(ours)
            assert_relative(logits(ours), logits(plain), part)
        assert_relative(logits(ours), logits(plain), part)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_lora(model, before):
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
        init_lora_weights=False,
    )
    plain = peft.get_peft_model(copy.deepcopy(model), config)
    if not before:
        ops.patch(model)
    ours = peft.get_peft_model(model, config)
    ours.load_state_dict(plain.state_dict())
    if before:
        ops.patch(ours)
    losses = [one(**prompt_of()).logits.square().mean() for one in (plain, ours)]
    assert_relative(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    adapters = [(n, p.grad, ours.get_parameter(n).grad) for n, p in plain.named_parameters()]
    learning = [name for name, grad, _ in adapters if grad is not None]
    assert sum("cross_attn" in name for name in learning) == 2 * 2 * 3  # layers, matrices, q v o
    for name, grad, found in adapters:
        assert (grad is None) == (found is None), name
        if grad is not None:
            assert_relative(found, grad, name)
    merged = ours.merge_and_unload()
    assert_relative(logits(merged), logits(plain))
    ops.unpatch(merged)
    assert_relative(logits(merged), logits(plain))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["offload", "dispatch"])
def test_hooks_of_accelerate(model, kind, before):
    plain = logits(model)

    def move():
        if kind == "offload":  # not the vision model, which asks its weights for their device
            accelerate.cpu_offload(model.model.language_model, torch.device("cpu"))
        else:
            accelerate_hooks.attach_align_device_hook(model, torch.device("cpu"))

    if before:
        move()
    with ops.patched(model) as patch:
        if not before:
            move()
        assert_relative(logits(model), plain)
        assert not patch.report().refused
    assert_relative(logits(model), plain)


def test_copies_and_files(model):
    plain, state = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    with unchanged(model), ops.patched(model) as patch:
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        copied, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert len(patch.report().replaced) == 9
    for one in (copied, loaded):
        with torch.no_grad():
            one.lm_head.weight.mul_(2)
        assert_relative(logits(one), 2 * plain)
        ops.unpatch(one)
        assert_relative(logits(one), 2 * plain)
        one.to(torch.bfloat16).train().eval()
        with ops.patched(one):
            assert logits(one).dtype == torch.bfloat16
    assert torch.equal(logits(model), plain)


def test_parts_of_the_model(model):
    """The model without a head, and the text model alone, are known, too."""
    prompt = prompt_of()
    for part in (model.model, model.model.language_model):
        names = ("input_ids", "attention_mask")
        given = prompt if part is model.model else {name: prompt[name] for name in names}
        with torch.no_grad():
            plain = part(**given).last_hidden_state
            with ops.patched(part) as patch:
                assert_relative(part(**given).last_hidden_state, plain)
        assert len(patch.report().replaced) == 8 + (part is model.model)


def test_errors_leave_the_model(model):
    def fail(module, args):
        raise KeyboardInterrupt

    for name in (f"{LAYERS}.1.mlp", f"{LAYERS}.3.cross_attn", f"{LAYERS}.2.self_attn"):
        handle = model.get_submodule(name).register_forward_pre_hook(fail)
        with unchanged(model), pytest.raises(KeyboardInterrupt), ops.patched(model):
            logits(model)
        handle.remove()
