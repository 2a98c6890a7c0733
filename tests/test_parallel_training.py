"""Divided models of training: weights, losses and gradients of every plan equal those of one."""

import pytest
import torch
from conftest import SLOW
from rank_processes import run_ranks
from small import make_model, make_prompts
from torch import distributed as dist
from transformers import initialization as init

from comemo import CoMemoForConditionalGeneration
from comemo.parallel.tensor import by_kind
from comemo.train import ranks
from comemo.train.parallel.gradients import clip, squares_by_name
from comemo.train.parallel.plan import share
from comemo.train.parallel.shard import shard_model
from comemo.train.parallel.state import fill, whole_weights
from comemo.train.settings import ParallelSettings

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("ranks are forks on the CPU"),
]
CPU = torch.device("cpu")
PLANS = [  # ranks, settings, whether layers are computed again
    (2, {}, False),
    (2, {"tensor": 2}, True),
    (4, {"tensor": 2}, False),
    *(
        pytest.param(count, plan, again, marks=SLOW)
        for count, plan, again in (
            (2, {}, True),
            (2, {"tensor": 2}, False),
            (4, {"tensor": 2}, True),
            (4, {"replicas": 2}, False),
            (4, {"replicas": 2}, True),
            (3, {}, False),
        )
    ),
]


@pytest.fixture
def whole():
    """In float64, so that a difference is a fault: rounding remains in the loss alone."""
    return make_model(torch.float64, heads=4).cpu().requires_grad_(True).train()


def divide(whole, plan, precision="float32", device=CPU, offload=False):
    """The model on this rank, with the same weights frozen, and its place."""
    sharing = share(ParallelSettings(plan="fsdp", **plan), device)
    with torch.device("meta"), init.no_init_weights():
        model = CoMemoForConditionalGeneration(whole.config).to(whole.dtype)
    model.train()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    shard_model(model, sharing, precision, offload)
    first = whole if ranks.is_first() else None
    fill(model, first, CPU if offload else device, sharing.tensor)
    return model, sharing


def inputs_of(whole, reader):
    """Prompts with images for one reader, text alone for the next."""
    torch.manual_seed(reader)
    if reader % 2:
        return {"input_ids": torch.randint(10, 200, (2, 9))}
    return {n: x.cpu() if hasattr(x, "cpu") else x for n, x in make_prompts(whole).items()}


def backward(model, inputs, readers=1):
    labels = inputs["input_ids"].clone()
    loss = model(**inputs, labels=labels, num_items_in_batch=40, skip_logits=True).loss
    (loss * readers).backward()
    return loss.item()


@pytest.mark.parametrize(("count", "plan", "checkpointing"), PLANS)
def test_gradients_of_every_plan_are_those_of_one_process(whole, count, plan, checkpointing):
    """Also where some ranks have no pictures, and where layers are computed again."""
    compare(whole, count, plan, checkpointing)


@pytest.mark.parametrize("frozen", ["embed_tokens", pytest.param("vision_tower", marks=SLOW)])
def test_frozen_weights_change_no_order(whole, frozen):
    """Gradients are exchanged in the same order by ranks with and without pictures."""
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(frozen not in name)
    compare(whole, 2, {}, False)


def compare(whole, count, plan, checkpointing):
    """Losses, norms and gradients of a step on `count` ranks with those of one process."""
    readers = count // plan.get("tensor", 1)
    wanted_losses = [backward(whole, inputs_of(whole, reader)) for reader in range(readers)]
    wanted = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(wanted.values()).item()

    def step():
        model, sharing = divide(whole, plan)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        held = whole_weights(model, sharing.tensor)
        loss = backward(model, inputs_of(whole, sharing.reader), sharing.readers)
        total = torch.stack([*squares_by_name(model).values()]).sum().sqrt()
        clip(model, total, norm / 2)
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.full_tensor()
                if name.endswith("kv_proj.weight"):
                    gradient = by_kind(gradient, sharing.tensor)
                found[name] = 2 * gradient
        return loss, total.item(), found if ranks.is_first() else None, held

    results = run_ranks(count, step)
    _, _, found, held = results[0]
    assert all(torch.equal(held[name], weight) for name, weight in whole.named_parameters())
    for rank, (loss, total, *_) in enumerate(results):
        assert loss == pytest.approx(wanted_losses[rank // plan.get("tensor", 1)], rel=1e-12)
        assert total == pytest.approx(norm, rel=1e-7)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        # The loss is in float32.
        assert (found[name] - gradient).abs().max() <= 1e-6 * scale, name


def test_a_rank_has_its_part_alone(whole):
    def count():
        model, sharing = divide(whole, {"tensor": 2})
        local = sum(p.to_local().numel() for p in model.parameters())
        mixin = model.model.language_model.layers[1].mixin
        return local, mixin.num_heads, mixin.kv_proj.out_features, sharing.readers

    total = sum(p.numel() for p in whole.parameters())
    for local, heads, rows, readers in run_ranks(2, count):
        # Sharded weights of one element, or of odd sizes, are not halves.
        assert 0.49 * total < local < 0.52 * total
        assert (heads, rows, readers) == (2, 64, 1)


def test_divided_layers_are_computed_by_fused_operations(whole, monkeypatch):
    """As on one device: the parts are read where a module would be called otherwise."""
    import comemo_kernels as ops

    calls = []
    own = ops.norm_swiglu
    monkeypatch.setattr(ops, "norm_swiglu", lambda *args: calls.append(1) or own(*args))

    def step():
        model, _ = divide(whole, {"tensor": 2})
        backward(model, inputs_of(whole, 0))
        return len(calls)

    layers = len(whole.model.language_model.layers) + len(whole.config.mixin_layers)
    assert run_ranks(2, step) == [layers, layers]


def test_weights_are_computed_in_bfloat16_and_kept_in_float32():
    whole = make_model(heads=4).cpu().requires_grad_(True).train()
    wanted = backward(whole, inputs_of(whole, 0))

    def step():
        model, sharing = divide(whole, {"tensor": 2}, "bfloat16")
        seen = []
        layer = model.model.language_model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        loss = backward(model, inputs_of(whole, 0), sharing.readers)
        kept = {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()}
        return loss, seen, kept

    for loss, seen, kept in run_ranks(2, step):
        assert loss == pytest.approx(wanted, rel=0.02)
        assert seen == [torch.bfloat16]
        assert kept == {torch.float32}


@pytest.mark.parametrize(
    ("count", "plan", "message"),
    [
        (2, {"tensor": 3}, "parallel.tensor 3 times parallel.replicas 1 must divide .* got 2"),
        (3, {"replicas": 2}, "must divide the number of ranks, got 3"),
    ],
)
def test_plans_that_do_not_fit_are_refused(count, plan, message):
    def refused():
        with pytest.raises(ValueError, match=message):
            share(ParallelSettings(plan="fsdp", **plan), CPU)
        return dist.get_rank()

    assert run_ranks(count, refused) == list(range(count))
