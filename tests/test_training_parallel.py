"""Gradient checkpointing, DDP and FSDP2: the same gradients, also of batches without images."""

import copy

import pytest
import torch
from small import make_model, make_prompts, place

pytest.importorskip("accelerate")


def trainable(**llm):
    return make_model(**llm).requires_grad_(True)


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same_gradients(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        scale = grad.abs().max().clamp(min=1e-3)
        assert (found[name] - grad).abs().max() <= tolerance * scale, name


# --- gradient checkpointing ---


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, images):
    model = trainable().train()
    batch = make_prompts(model)
    if not images:
        batch = {"input_ids": place(torch.randint(10, 200, (2, 9)))}
    labels = batch["input_ids"].clone()
    model(**batch, labels=labels).loss.backward()
    wanted = {n: g for n, g in gradients(model).items() if g is not None}
    assert images == ("model.vision_tower.embeddings.cls_token" in wanted)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    out = model(**batch, labels=labels)
    out.loss.backward()
    found = {n: g for n, g in gradients(model).items() if g is not None}
    assert_same_gradients(found, wanted)
    assert out.past_key_values is None


@pytest.mark.parametrize("frozen", ["vision", "all but mixin"])
def test_checkpointing_computes_no_frozen_tower_again(frozen):
    """Nor its gradient: it has none to give."""
    model = trainable().train()
    for name, weight in model.named_parameters():
        vision = "vision_tower" in name
        weight.requires_grad_(".mixin." in name if frozen != "vision" else not vision)
    batch = make_prompts(model)
    labels = batch["input_ids"].clone()
    found, calls = [], []
    layer = model.model.vision_layers()[0]
    layer.attention.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        calls.clear()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch, labels=labels).loss.backward()
        assert calls == [1]
        found.append({n: g for n, g in gradients(model).items() if g is not None})
    assert_same_gradients(found[1], found[0])
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable({"use_reentrant": True})  # which needs them
    embedded = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, out: embedded.append(out.requires_grad))
    embeddings(batch["input_ids"])
    assert embedded == [True]


@pytest.mark.no_virtual_gpu("tensors that hooks unpack lose their device there")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_computed_again_changes_no_gradient(checkpointing):
    """It is fewer bytes that are kept; with checkpointing a layer keeps its inputs in any case."""
    model, batches = trainable().train(), []
    batch = make_prompts(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for recompute in ("cheap", "projections"):
        model.config.recompute = recompute
        model.zero_grad()
        kept = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(x, kept=kept, weights=weights):
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(**batch, labels=batch["input_ids"].clone()).loss
        loss.backward()
        batches.append((gradients(model), sum(kept.values())))
    (wanted, most), (found, least) = batches
    assert_same_gradients(found, wanted)
    assert least == most if checkpointing else least < most


def test_an_unknown_recompute_is_refused():
    model = trainable()
    model.config.recompute = "everything"
    with pytest.raises(ValueError, match="recompute must be 'cheap' or 'projections'"):
        model(input_ids=place(torch.randint(10, 200, (2, 9))))


# --- several processes ---


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def cpu_model(real_device):
    return trainable().cpu().train()


def test_ddp_accepts_batches_without_images(group, cpu_model):
    """Each step must produce a gradient for every weight: zero without images."""
    text = {"input_ids": torch.randint(10, 200, (2, 9))}
    images = {n: x.cpu() if hasattr(x, "cpu") else x for n, x in make_prompts(cpu_model).items()}
    with torch.no_grad():
        plain = copy.deepcopy(cpu_model).eval()(**text).logits
    wrapped = torch.nn.parallel.DistributedDataParallel(cpu_model)
    for batch in (text, images, text):
        cpu_model.zero_grad()
        out = wrapped(**batch, labels=batch["input_ids"])
        out.loss.backward()
        assert all(p.grad is not None for p in cpu_model.parameters())
        assert (out.image_memory is None) == (batch is text)
    assert torch.allclose(out.logits, plain, atol=1e-6)
    unused = [n for n, g in gradients(cpu_model).items() if "vision_tower" in n or "mixin" in n]
    assert unused
    assert all(cpu_model.get_parameter(n).grad.abs().max() == 0 for n in unused)


def test_fsdp2_shards_the_layers_that_accelerate_selects(group, cpu_model):
    """Without accelerate's own wrapping, which needs an accelerator."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    images = {n: x.cpu() if hasattr(x, "cpu") else x for n, x in make_prompts(cpu_model).items()}
    batches = [images, {"input_ids": torch.randint(10, 200, (2, 9))}]
    wanted = []
    for batch in batches:
        cpu_model.zero_grad()
        cpu_model(**batch, labels=batch["input_ids"]).loss.backward()
        wanted.append(gradients(cpu_model))
    mesh = init_device_mesh("cpu", (1,))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, cpu_model)
    layers = [module for module in cpu_model.modules() if wraps(module)]
    assert {type(layer).__name__ for layer in layers} == {
        "CoMemoDecoderLayer",
        "InternVLVisionLayer",
    }
    for module in (*layers, cpu_model):
        fully_shard(module, mesh=mesh)
    for batch, grads in zip(batches, wanted, strict=True):
        cpu_model.zero_grad()
        cpu_model(**batch, labels=batch["input_ids"]).loss.backward()
        found = gradients(cpu_model)
        assert all(isinstance(grad, DTensor) for grad in found.values())
        assert_same_gradients({n: grad.full_tensor() for n, grad in found.items()}, grads)
