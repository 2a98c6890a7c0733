"""Layers on several devices of one process: a virtual GPU and the CPU."""

import pytest
import torch
import virtual_gpu
from conftest import VIRTUAL
from harbour import draw_harbour
from small import make_model, make_prompts

from comemo import CoMemoForConditionalGeneration, DecodeLoop, MemoryStore
from comemo.chat.session import ChatSession
from comemo.weights.placed import free_layers

accelerate_hooks = pytest.importorskip("accelerate.hooks")
pytestmark = pytest.mark.no_virtual_gpu("it has one itself")


@pytest.fixture
def gpu():
    with virtual_gpu.present():
        virtual_gpu.faults.clear()
        yield
        assert not virtual_gpu.faults


def spread(model):
    """Vision tower, embeddings and the first layers on the GPU, others on the CPU."""
    text = model.model.language_model
    half = len(text.layers) // 2
    places = {"model.vision_tower": "cuda:0", "model.multi_modal_projector": "cuda:0"}
    places |= {"model.language_model.embed_tokens": "cuda:0"}
    for i in range(len(text.layers)):
        places[f"model.language_model.layers.{i}"] = "cuda:0" if i < half else "cpu"
    places |= {"model.language_model.norm": "cpu", "lm_head": "cpu"}
    for name, place in places.items():
        model.get_submodule(name).to(place)
    accelerate_hooks.attach_align_device_hook_on_blocks(
        model,
        execution_device={"": "cuda:0", **places},
        offload=False,
        skip_keys=model._skip_keys_device_placement,
    )
    model.hf_device_map = places
    free_layers(model.model)
    return model


@pytest.mark.skipif(VIRTUAL, reason="it has a virtual GPU of its own")
def test_conversations_are_those_of_one_device(gpu, checkpoint, processor):
    wanted, found, stores = [], [], []
    picture = draw_harbour().resize((300, 300))
    for answers, place in ((wanted, None), (found, spread)):
        with virtual_gpu.absent():
            model = CoMemoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        model = model if place is None else place(model)
        store = MemoryStore()
        options = {"max_new_tokens": 3, "do_sample": False, "memory_store": store}
        for _ in range(2):
            session = ChatSession(model, processor, **options)
            answers += [session.ask("What?", [picture]), session.ask("And then?")]
        stores.append((store.stats.hits, store.stats.misses))
    assert found == wanted
    assert stores[0] == stores[1] == (1, 1)
    with pytest.raises(ValueError, match="layers on several devices"):
        ChatSession(model, processor, decode_loop=DecodeLoop(model)).ask("What?")


@pytest.mark.skipif(VIRTUAL, reason="it has a virtual GPU of its own")
def test_keys_lie_where_their_layer_is(gpu):
    """And layers are computed by fused operations there."""
    model = make_model()
    prompts = make_prompts(model)
    with torch.no_grad():
        before = model(**prompts).logits.cpu()
    model, prompts = (
        spread(model),
        {
            name: value.to("cuda") if hasattr(value, "to") else value
            for name, value in prompts.items()
        },
    )
    text = model.model.language_model
    assert not [
        m for m in text.layers[3].modules() if m is not text.layers[3] and hasattr(m, "_hf_hook")
    ]
    with torch.no_grad():
        output = model(**prompts, use_cache=True)
    assert (output.logits.cpu() - before).abs().max() < 1e-4
    places = {i: key.device.type for i, key in output.image_memory.keys.items()}
    assert places == {1: "cuda", 3: "cpu"}
    model.hf_device_map = {}


def test_offloaded_layers_keep_their_hooks():
    model = make_model()
    layer = model.model.language_model.layers[1]
    weights = {name: weight.clone() for name, weight in layer.state_dict().items()}
    accelerate_hooks.attach_align_device_hook(
        layer, execution_device="cpu", offload=True, weights_map=weights
    )
    free_layers(model.model)
    assert layer.self_attn.q_proj.weight.is_meta
    assert hasattr(layer.self_attn.q_proj, "_hf_hook")
