"""Whatever replaces a module in a patched block of open_flamingo is called, before and after."""

import contextlib
import copy
import io

import pytest
import torch
from flamingo_models import VISUAL, WIDTH, make_block, make_prompt
from test_patch_flamingo_models import make_llama
from torch import nn

import comemo_kernels

accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")

LOCATIONS = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]).bool()
NAMES = ["", "attn", "attn.norm", "attn.to_q", "attn.to_kv", "attn.to_out", "ff"]
NAMES += [f"ff.{i}" for i in range(4)]
LINEAR = ["attn.to_q", "attn.to_kv", "attn.to_out", "ff.1", "ff.3"]


class Model(nn.Module):
    """A block twice, as in a prefill and a decode step that read the same media."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.register_buffer("x", torch.randn(2, 6, WIDTH))
        self.register_buffer("media", torch.randn(2, 2, 5, VISUAL))

    def forward(self):
        x = self.block(self.x, self.media, media_locations=LOCATIONS)
        return self.block(x[:, -1:], self.media, media_locations=LOCATIONS, use_cached_media=True)

    def prepare_inputs_for_generation(self):
        """Asked for by peft."""


@pytest.fixture
def model():
    return Model(make_block()).requires_grad_(False)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@contextlib.contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_hooks_run_and_their_results_are_used(model, name):
    plain, fired = model(), []

    def hook(module, args, output):
        fired.append(module)
        return 1.2 * output

    module = model.block.get_submodule(name)
    with hooked(module, hook):
        wanted = model()
        with comemo_kernels.patched(model):
            close(model(), wanted)
        assert len(fired) == 4
    with comemo_kernels.patched(model):
        model()  # keys are kept
        with hooked(module, hook):
            close(model(), wanted)
        close(model(), plain)
    assert len(fired) == 6


def test_a_global_hook_runs_for_every_module(model):
    called = set()
    with comemo_kernels.patched(model):
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.add(m))
        try:
            model()
        finally:
            handle.remove()
    assert set(model.modules()) == called


@pytest.mark.parametrize("name", LINEAR)
def test_adapters(model, name):
    config = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=[name], init_lora_weights=False, lora_dropout=0
    )
    first = model()
    handle = comemo_kernels.patch(model)
    assert len(handle.report().replaced) == 2
    close(model(), first)
    adapted = peft.get_peft_model(model, config).eval()
    after = adapted()
    comemo_kernels.unpatch(adapted)
    wanted = adapted()
    close(after, wanted)
    assert (wanted - first).abs().max() > 1e-2
    with comemo_kernels.patched(adapted):
        close(adapted(), wanted)
        with adapted.disable_adapter():
            close(adapted(), first)
        adapted.merge_adapter()
        close(adapted(), wanted)
        adapted.unmerge_adapter()
        merged = adapted.merge_and_unload()
        close(merged(), wanted)


@pytest.mark.parametrize("name", ["block", "attn", "to_kv", "ff"])
def test_modules_that_are_trained_as_a_whole(model, name):
    """peft copies them, and wraps both."""
    model.other = nn.Linear(2, 2)
    first = model()
    config = peft.LoraConfig(r=2, target_modules=["other"], modules_to_save=[name])
    with comemo_kernels.patched(model):
        model()
        adapted = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for part, parameter in adapted.named_parameters():
                if "modules_to_save" in part:
                    parameter.mul_(1.5)
        after = adapted()
    assert not any(
        type(value).__name__ == "Replacement"
        for m in adapted.modules()
        for value in vars(m).values()
    )
    wanted = adapted()
    close(after, wanted)
    assert (wanted - first).abs().max() > 1e-2
    with comemo_kernels.patched(adapted):
        close(adapted(), wanted)
        with adapted.disable_adapter():
            close(adapted(), first)


class Rounded(nn.Linear):
    """A linear layer that keeps its weight as integers, as int8 layers do."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter((linear.weight * 100).round().to(torch.int8), False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) / 100).t()


@pytest.mark.parametrize("name", LINEAR)
def test_integer_weights(model, name):
    parent, _, last = name.rpartition(".")
    part = model.block.get_submodule(parent)
    plain, rounded = part.get_submodule(last), Rounded(part.get_submodule(last))
    first = model()
    with comemo_kernels.patched(model):
        close(model(), first)
        setattr(part, last, rounded)
        after = model()
    wanted = model()
    close(after, wanted)
    assert not torch.equal(wanted, first)
    with comemo_kernels.patched(model):
        close(model(), wanted)
        setattr(part, last, plain)
        close(model(), first)


@pytest.mark.parametrize("placed", ["offloaded", "dispatched"])
def test_hooks_of_accelerate(model, placed):
    first = model()

    def place(module):
        if placed == "offloaded":
            return accelerate.cpu_offload(module, execution_device="cpu")
        accelerate_hooks.add_hook_to_module(module, accelerate_hooks.AlignDevicesHook("cpu"))
        hook = accelerate_hooks.AlignDevicesHook("cpu")
        for part in module.modules():
            accelerate_hooks.add_hook_to_module(part, hook)
        return module

    before, after = copy.deepcopy(model), copy.deepcopy(model)
    place(before.block)
    if placed == "offloaded":
        assert before.block.attn.to_kv.weight.is_meta
    with comemo_kernels.patched(before):
        close(before(), first)
    close(before(), first)
    with comemo_kernels.patched(after):
        place(after.block)
        close(after(), first)
    close(after(), first)


def test_copies_and_pickles(model):
    wanted = model()
    with comemo_kernels.patched(model):
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        del model.block.forward  # the copies do not use the original
        model.block.forward = lambda *_, **__: pytest.fail("another model was called")
        for other in (copied, torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
            close(other(), wanted)
            assert type(vars(other.block)["forward"]).__name__ == "Replacement"
            comemo_kernels.unpatch(other)
            assert not any("forward" in vars(module) for module in other.modules())
            close(other(), wanted)


def test_modes_and_dtypes(model):
    for change in (
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.train(),
        lambda m: m.eval(),
        lambda m: m.requires_grad_(True),
        lambda m: m.bfloat16().float(),
    ):
        with comemo_kernels.patched(model):
            model()
            change(model)
            found = model()
        close(found, model())


def test_a_copy_of_a_whole_model():
    model = make_llama()
    vision, ids = make_prompt()
    mask = torch.ones_like(ids)
    wanted = model(vision, ids, mask).logits
    with comemo_kernels.patched(model):
        copied = copy.deepcopy(model)
    close(copied(vision, ids, mask).logits, wanted)
    comemo_kernels.unpatch(copied)
    close(copied(vision, ids, mask).logits, wanted)
