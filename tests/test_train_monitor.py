"""What people see of a run: numbers, and files that go on after a stop."""

import json
import struct
import types
from pathlib import Path

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
from packs import make_trainer
from transformers import TrainerControl, TrainerState

from comemo.train.config import rules
from comemo.train.monitor import LossFault, make_callbacks, make_watch
from comemo.train.monitor import log as logging
from comemo.train.monitor.norms import gates, gradient_norms, largest_gradient, layer_of, part_of
from comemo.train.monitor.progress import Progress, beside_bar
from comemo.train.monitor.scalars import JsonLines
from comemo.train.monitor.window import Window

pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_heap"),
    pytest.mark.no_virtual_gpu("numbers of a trainer are on the CPU"),
]

# --- numbers ---


def test_a_window_has_means_and_rates():
    window = Window()
    window.add(report_of(1, 2.0))
    window.add(report_of(2, 4.0, losses={"cars": (8.0, 2.0), "none": (0.0, 0.0)}, seconds=1.5))
    scalars = window.scalars()
    assert scalars["loss"] == pytest.approx((6 + 2 + 8) / (3 + 1 + 2))
    assert scalars["loss/cars"] == pytest.approx(14 / 5)
    assert scalars["loss/dogs"] == 2.0
    assert "loss/none" not in scalars
    assert (scalars["tokens_per_second"], scalars["tiles_per_second"]) == (100.0, 3.0)
    assert (scalars["seconds_per_step"], scalars["data_wait_share"]) == (1.0, pytest.approx(0.1))
    filler = report_of(1, losses={}, tokens=2, padding_tokens=2)
    window = Window()
    window.add(filler)
    assert (window.scalars()["loss"], window.scalars()["padding_share"]) == (0.0, 1.0)


def test_gradient_norms_by_part_and_mixin_layer(model):
    """They are those before clipping, and their squares add up."""
    loss_of(model).backward()
    total = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    wanted = {}
    for name, weight in model.named_parameters():
        wanted.setdefault(part_of(name), []).append(weight.grad.clone())
    mixin = model.model.language_model.layers[3].mixin
    one = float(torch.nn.utils.get_total_norm([p.grad for p in mixin.parameters()]))
    torch.nn.utils.clip_grad_norm_(model.parameters(), total / 7)
    norms = gradient_norms(model, total)
    assert norms["grad_norm"] == total
    assert set(norms) == {
        "grad_norm",
        *(f"grad_norm/{part}" for part in ("vision", "projector", "mixin", "language")),
        "grad_norm/mixin.1",
        "grad_norm/mixin.3",
    }
    for part, gradients in wanted.items():
        expected = float(torch.nn.utils.get_total_norm(gradients))
        assert norms[f"grad_norm/{part}"] == pytest.approx(expected, rel=1e-4)
    assert norms["grad_norm/mixin.3"] == pytest.approx(one, rel=1e-4)


def test_frozen_parts_have_no_norms(model):
    model.model.language_model.embed_tokens.weight.grad = torch.ones(300, 64)
    assert set(gradient_norms(model, 1.0)) == {"grad_norm", "grad_norm/language"}
    model.zero_grad(set_to_none=True)
    assert gradient_norms(model, 0.0) == {"grad_norm": 0.0}
    assert largest_gradient(model) == ("none", 0.0)


def test_layers_have_names():
    names = {
        "model.language_model.layers.3.mixin.q_proj.weight": "model.language_model.layers.3.mixin",
        "model.language_model.layers.3.mlp.up_proj.weight": "model.language_model.layers.3",
        "model.vision_tower.encoder.layer.0.lambda_1": "model.vision_tower.encoder.layer.0",
        "model.multi_modal_projector.1.weight": "model.multi_modal_projector.1",
        "lm_head.weight": "lm_head",
    }
    assert {name: layer_of(name) for name in names} == names


def test_gates_are_shown_raw_and_by_their_tanh(model):
    found = gates(model)
    for layer in (1, 3):
        mixin = model.model.language_model.layers[layer].mixin
        for kind, gate in (("attn", mixin.attn_gate), ("mlp", mixin.mlp_gate)):
            assert found[f"gate/{kind}.{layer}"] == pytest.approx(gate.item())
            assert found[f"gate_tanh/{kind}.{layer}"] == pytest.approx(gate.tanh().item())
    assert len(found) == 8


# --- logs ---


def events_of(folder):
    """(step, tag) -> value of all scalars, without what a later file declares void."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for file in sorted(Path(folder).glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                found = {key: value for key, value in found.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = value.simple_value
    return found


def test_a_resumed_run_goes_on_in_its_logs(model, tmp_path):
    """A run is stopped after step 5, its last checkpoint is that of step 3: no step is there twice,
    none is missing, and half a line that a killed process left is gone."""
    settings = settings_of(tmp_path, "log_every=2")

    def train(start, stop, loss):
        trainer = FakeTrainer(model)
        callbacks = make_callbacks(settings, "finetune", None, trainer)
        trainer.run(callbacks, start, stop, 6, loss=lambda step: loss)
        for callback in callbacks:
            callback.close()
        return trainer

    train(0, 5, 1.0)
    file = tmp_path / "finetune" / "log.jsonl"
    file.write_text(file.read_text() + '{"step": 5, "lo')
    trainer = train(3, 6, 3.0)
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 4, 6]
    assert [entry["loss"] for entry in entries] == [1.0, 1.0, 3.0, 3.0]
    events = events_of(tmp_path / "tensorboard" / "finetune")
    assert sorted({step for step, _ in events}) == [1, 2, 4, 6]
    last = entries[-1]
    assert last.keys() >= {
        *("loss", "loss/cars", "learning_rate", "tokens_per_second", "grad_norm", "bad_samples"),
        *("grad_norm/mixin.1", "gate/attn.1", "gate_tanh/mlp.3", "padding_share"),
    }
    assert (last["learning_rate"], last["bad_samples"]) == (0.25, 2)
    for name, value in last.items():
        if name != "step":
            assert events[6, name] == pytest.approx(value, rel=1e-6)
    lines = [line for line in trainer.told if line.startswith("finetune")]
    assert lines[-1].startswith("finetune 6/6  loss 3.0000  lr 0.25  200 tokens/s  6.0 tiles/s")
    assert lines[-1].endswith("0:00:00 left")
    assert len(lines) == 2


def test_a_real_trainer_is_logged_and_stopped(tmp_path):
    """With transformers' loop: order of the callbacks, numbers, and a loss that is not finite."""
    pytest.importorskip("accelerate")
    settings, told = settings_of(tmp_path, "log_every=1"), []
    watch = make_watch(settings.stages["finetune"])
    trainer, reports = make_trainer(
        tmp_path / "finetune", steps=3, watch=watch, tell=told.append, save_strategy="no"
    )
    trainer.loader.faults = types.SimpleNamespace(total=4)
    callbacks = make_callbacks(settings, "finetune", None, trainer)
    for callback in callbacks:
        trainer.add_callback(callback)
    layer = trainer.model.model.language_model.layers[2].mlp
    layer.register_forward_hook(
        lambda module, inputs, output: output / (trainer.state.global_step < 2)
    )
    with pytest.raises(
        LossFault, match=r"step 3: .* the output of model.language_model.layers.2.mlp;"
    ):
        trainer.train()
    for callback in callbacks:
        callback.close()
    lines = (tmp_path / "finetune" / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry, report, rate in zip(entries, reports[:2], (1e-2, 7.5e-3), strict=True):
        assert (entry["step"], entry["bad_samples"]) == (report.step, 4)
        assert entry["loss"] == pytest.approx(report.loss)
        assert entry["grad_norm"] == report.grad_norm
        assert entry["learning_rate"] == pytest.approx(rate)
        parts = [entry[f"grad_norm/{part}"] for part in rules.PARTS]
        assert sum(part**2 for part in parts) == pytest.approx(report.grad_norm**2, rel=1e-3)
    assert [line.split("  ")[0] for line in told] == ["finetune 1/3", "finetune 2/3"]


def test_evaluations_are_logged(model, tmp_path):
    trainer = FakeTrainer(model)
    callbacks = make_callbacks(settings_of(tmp_path), "finetune", None, trainer)
    trainer.run(callbacks, 0, 2, 6)
    state = TrainerState(global_step=2, max_steps=6)
    metrics = {"eval_loss": 1.5, "eval_loss/cars": float("nan"), "epoch": 1.0}
    for callback in callbacks:
        callback.on_evaluate(None, state, TrainerControl(), metrics=metrics)
        callback.close()
    lines = (tmp_path / "finetune" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"step": 2, "eval_loss": 1.5, "eval_loss/cars": None}
    assert events_of(tmp_path / "tensorboard" / "finetune")[2, "eval_loss"] == 1.5
    assert trainer.told[-1] == "finetune 2: evaluation loss 1.5000"


def test_a_log_that_cannot_be_written_does_not_end_training(model, tmp_path, monkeypatch):
    def fail(self, entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JsonLines, "add", fail)
    trainer = FakeTrainer(model)
    callbacks = make_callbacks(settings_of(tmp_path), "finetune", None, trainer)
    trainer.run(callbacks, 0, 3, 3)
    said = [line for line in trainer.told if "No space left" in line]
    assert len(said) == 1
    assert len(events_of(tmp_path / "tensorboard" / "finetune")) > 3


def test_tensorboard_is_needed_only_if_it_is_wanted(model, tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"tensorboard: true needs tensorboardX: pip install"):
        make_callbacks(settings_of(tmp_path), "finetune", None, FakeTrainer(model))
    off = settings_of(tmp_path, "tensorboard=false")
    trainer = FakeTrainer(model)
    trainer.run(make_callbacks(off, "finetune", None, trainer), 0, 1, 1)
    assert not (tmp_path / "tensorboard").exists()


def test_other_ranks_write_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.ranks, "is_first", lambda: False)
    settings = settings_of(tmp_path, "answers.every=1", "answers.ask=[{question: a}]")
    trainer = FakeTrainer(model)
    trainer.run(make_callbacks(settings, "finetune", None, trainer), 0, 2, 2)
    assert list(tmp_path.iterdir()) == []
    assert trainer.told == []


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    told = []
    progress = Progress("pretrain", 10, 4, told.append)
    progress.advance(5)
    scalars = Window(steps=1).scalars() | {"learning_rate": 1e-4}
    progress.show(5, scalars)
    beside_bar(told.append)("a note")
    progress.close()
    progress.close()
    err = capsys.readouterr().err
    assert "pretrain" in err
    assert "5/10" in err
    assert "lr 0.0001" in err
    assert told == ["a note"]
