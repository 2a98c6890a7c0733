"""Whatever replaces a module in the projector of a patched InternVL is called, before and after."""

import contextlib
import copy
import io

import pytest
import torch
from internvl_models import close, logits_of, model, prompts, shared  # noqa: F401, fixtures
from patching import unchanged
from torch import nn

import comemo_kernels

accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")
PROJECTOR = "model.multi_modal_projector"
PARTS = ["layer_norm", "linear_1", "act", "linear_2"]


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
