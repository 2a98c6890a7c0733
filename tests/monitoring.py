"""A trainer as callbacks see it, and reports of its steps."""

import types

import pytest
import torch
from small import make_model, make_prompts
from transformers import TrainerControl, TrainerState

from comemo.train.config import read_settings
from comemo.train.parallel.plan import Sharing

NEEDED = ["data.train=a.jsonl", "start.checkpoint=model", "steps=6"]
ARGS = types.SimpleNamespace(bf16=False)
PACK = {"samples": [("cars", "cars.jsonl", 7), ("dogs", "dogs.jsonl", 3)]}


def report_of(step, loss=2.0, **fields):
    values = {
        "step": step,
        "loss": loss,
        "losses": {"cars": (loss * 3, 3.0), "dogs": (loss * 1, 1.0)},
        "tokens": 100,
        "label_tokens": 40,
        "tiles": 3,
        "padding_tokens": 0,
        "samples": PACK["samples"],
        "grad_norm": 2.0,
        "seconds": 0.5,
        "data_seconds": 0.1,
    }
    return types.SimpleNamespace(**values | fields)


class FakeTrainer:
    """Steps a model as the trainer does, as far as callbacks see it."""

    def __init__(self, model, tell=None):
        self.model, self.told, self.sharing = model, [], Sharing()
        self.tell = tell or self.told.append
        self.step_report, self.batches = None, [PACK]
        self.loader = types.SimpleNamespace(faults=types.SimpleNamespace(total=2))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.25)

    def again(self, batch):
        return loss_of(self.model)

    def run(self, callbacks, start, stop, last, watch=None, loss=lambda step: 2.0):
        state = TrainerState(global_step=start, max_steps=last)
        control = TrainerControl()

        def call(moment):
            for callback in callbacks:
                getattr(callback, moment)(ARGS, state, control, optimizer=self.optimizer)

        call("on_train_begin")
        for step in range(start + 1, stop + 1):
            self.model.zero_grad()
            loss_of(self.model).backward()
            self.step_report = report_of(step, loss(step))
            if watch is not None:
                watch(self, self.step_report)
            call("on_pre_optimizer_step")
            state.global_step = step
            call("on_step_end")
        if stop == last:
            call("on_train_end")


@pytest.fixture(scope="module")
def whole():
    model = make_model().requires_grad_(True)
    return model, make_prompts(model)


@pytest.fixture
def model(whole):
    """Leaves weights and hooks as they were."""
    model, inputs = whole
    model.inputs = {**inputs, "labels": inputs["input_ids"]}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    yield model
    assert not any(module._forward_hooks for module in model.modules())
    for name, weight in model.named_parameters():
        weight.data.copy_(before[name])
        assert not weight._backward_hooks
    model.zero_grad(set_to_none=True)


def loss_of(model):
    return model(**model.inputs).loss


def settings_of(tmp_path, *words):
    return read_settings(None, [f"output={tmp_path}", *NEEDED, *words])
