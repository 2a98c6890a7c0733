"""Losses that are not finite or jump: step, data and layer are named."""

import pytest
import torch
from monitoring import (  # noqa: F401
    FakeTrainer,
    loss_of,
    model,
    report_of,
    settings_of,
    whole,
)

from comemo.train.monitor import LossFault, first_nonfinite, make_watch
from comemo.train.monitor.faults import REMEMBERED, SpikeWatch, describe_samples

pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_heap"),
    pytest.mark.no_virtual_gpu("numbers of a trainer are on the CPU"),
]


def test_the_first_output_that_is_not_finite_is_named(model):
    layer = model.model.language_model.layers[2]
    assert first_nonfinite(model, lambda: loss_of(model)).startswith("nothing")
    handle = layer.mlp.up_proj.register_forward_pre_hook(lambda _, x: (x[0] * float("nan"),))
    name = "the output of model.language_model.layers.2.mlp.up_proj"
    assert first_nonfinite(model, lambda: loss_of(model)) == name
    handle.remove()


def test_a_weight_that_is_not_finite_is_named(model):
    model.model.language_model.layers[1].mixin.attn_gate.data.fill_(float("inf"))
    name = "the weight model.language_model.layers.1.mixin.attn_gate"
    assert first_nonfinite(model, lambda: loss_of(model)) == name


def test_a_gradient_that_is_not_finite_is_named(model):
    """Outputs are finite: sqrt at 0."""

    def run():
        x = model.lm_head.weight.detach() * 0
        return loss_of(model) + (x + model.lm_head.weight * 0).abs().sum().sqrt()

    assert first_nonfinite(model, run) == "the gradient of lm_head.weight"
    assert all(weight.grad is None for weight in model.parameters())


def test_a_loss_of_finite_outputs_is_named(model):
    name = first_nonfinite(model, lambda: loss_of(model) * float("nan"))
    assert name == "the loss, from finite outputs of all modules"


def test_a_loss_that_is_not_finite_stops_the_run(model):
    trainer, watch = FakeTrainer(model), make_watch(settings_of("a").stages["finetune"])
    loss_of(model).backward()
    broken = model.model.multi_modal_projector[1].register_forward_pre_hook(
        lambda _, x: (x[0] * float("inf"),)
    )
    with pytest.raises(LossFault) as raised:
        watch(trainer, report_of(1200, float("nan")))
    broken.remove()
    text = str(raised.value)
    assert text.startswith("train: step 1,200: the loss is nan; first not finite: the output of")
    assert "model.multi_modal_projector.1; data: cars cars.jsonl:7, dogs dogs.jsonl:3." in text
    with pytest.raises(LossFault, match="but the norm of its gradient inf; computed again, each"):
        watch(trainer, report_of(7, 1.0, grad_norm=float("inf")))


def test_a_jump_of_the_loss_is_told_with_its_place(model):
    model.model.language_model.layers[3].mixin.o_proj.weight.grad = torch.full((64, 48), 2.0)
    model.lm_head.weight.grad = torch.full((300, 64), 0.01)
    trainer, watch = FakeTrainer(model), make_watch(settings_of("a", "spike=3").stages["finetune"])
    for step in range(1, 10):
        watch(trainer, report_of(step, 2.0))
    assert trainer.told == []
    watch(trainer, report_of(10, 6.5))
    (said,) = trainer.told
    assert said.startswith("step 10: the loss 6.5 is 3.2 x the median 2 of the last 9 steps; data:")
    assert "cars cars.jsonl:7, dogs dogs.jsonl:3; largest gradient: " in said
    assert "model.language_model.layers.3.mixin (100%" in said


def test_what_counts_as_a_jump():
    watch = SpikeWatch(2.0)
    assert [watch(loss) for loss in (1.0, 9.0, *[1.0] * 6)] == [None] * 8  # too few before
    assert watch(2.0) is None
    assert watch(2.1) == 1.0
    for _ in range(REMEMBERED):
        watch(5.0)
    assert watch(9.0) is None  # forgotten
    never = SpikeWatch(0.0)
    assert not any(never(loss) for loss in [1.0] * 9 + [1e9])


def test_long_lists_of_samples_are_cut():
    samples = [("a", "a.jsonl", n) for n in range(1, 8)]
    assert (
        describe_samples(samples) == "a a.jsonl:1, a a.jsonl:2, a a.jsonl:3, a a.jsonl:4 and 3 more"
    )
    assert describe_samples([]) == "none"
