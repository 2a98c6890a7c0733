"""Models whose image memories can be stored, and those that are refused."""

import copy

import pytest
import torch
from conftest import DEVICE
from known import batch_of, counts, memory_of, work_on

import comemo
from comemo.cli.progress import reading_bar

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::comemo.MemoryStoreWarning"),
]


# --- models that are refused ---


class Adapter(torch.nn.Linear):
    pass


class Quantised(torch.nn.Parameter):
    pass


def adapt(core):
    core.language_model.layers[1].mixin.kv_proj.__class__ = Adapter


def quantise(core):
    attention = core.vision_tower.encoder.layer[0].attention
    attention.q_proj.weight = Quantised(attention.q_proj.weight.data)


def offload(core):
    core.vision_tower.embeddings._hf_hook = object()


def offload_forward(core):
    layer = core.vision_tower.encoder.layer[0]
    layer.forward = layer.forward


def steer(core):
    core.vision_tower.encoder.layer[1].register_forward_hook(lambda module, args, out: out * 2)


def steer_before(core):
    core.vision_tower.encoder.layer[1].register_forward_pre_hook(lambda module, args: None)


def empty(core):
    core.multi_modal_projector.to("meta")


def mix(core):
    core.multi_modal_projector.bfloat16()


def drop(core):
    core.train()
    core.vision_tower.embeddings.dropout.p = 0.1


def drop_attention(core):
    core.train()
    core.vision_tower.encoder.layer[0].attention.attention_dropout = 0.1


REFUSED = [
    (adapt, r"layers.1.mixin.kv_proj is a Adapter \(an adapter, or quantised\)"),
    (quantise, r"a weight of vision_tower.encoder.layer.0.attention.q_proj is a Quantised"),
    (offload, "vision_tower.embeddings has a replaced forward"),
    (offload_forward, r"vision_tower.encoder.layer.0 has a replaced forward"),
    (steer, "vision_tower.encoder.layer.1 has hooks"),
    (steer_before, "vision_tower.encoder.layer.1 has hooks"),
    (empty, "device meta"),
    (mix, r"in \['torch.bfloat16', 'torch.float32'\]"),
    (drop, r"vision_tower.embeddings.dropout has dropout in training: call model.eval\(\)"),
    (drop_attention, "layer.0.attention has dropout in training"),
]


@pytest.mark.parametrize(
    ("change", "said"), REFUSED, ids=lambda value: getattr(value, "__name__", "")
)
def test_models_whose_weights_do_not_determine_the_memory(fresh, change, said):
    store, batch = comemo.MemoryStore(), batch_of(fresh, [2, "square", 3])
    change(fresh)
    with work_on(fresh) as work, pytest.raises(ValueError, match=f"^MemoryStore: .*{said}"):
        memory_of(fresh, batch, store)
    assert work() == ([], 0)
    assert len(store) == 0


def test_autocast_and_absolute_positions_are_refused(fresh):
    store, batch = comemo.MemoryStore(), batch_of(fresh, [2, "square", 3])
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(ValueError, match="autocast is on"),
    ):
        memory_of(fresh, batch, store)
    fresh.config.memory_positions = "absolute"
    with pytest.raises(ValueError, match="must be 'relative', got 'absolute'"):
        memory_of(fresh, batch, store)


def test_hooks_that_only_observe_are_allowed(loaded, core):
    """The hooks of a progress bar, and those that transformers adds."""
    store, batch = comemo.MemoryStore(), batch_of(core, [2, "square", 3])
    with reading_bar(loaded[0], True) as bar:
        memory_of(core, batch, store)
        assert bar.calls["vision"] == 2
        memory_of(core, batch, store)
        assert bar.calls["vision"] == 2
        bar.calls["vision"] = 0  # as if the image were known
        bar.count("text")
        assert bar.state()[0] == "reading the prompt"
    watched = copy.deepcopy(core)
    with torch.no_grad():
        watched.vision_tower(batch["pixel_values"], output_hidden_states=True)
    assert watched.vision_tower.encoder.layer[0]._forward_hooks
    memory_of(watched, batch, store)
    assert counts(store, "misses", "hits") == (1, 2)
