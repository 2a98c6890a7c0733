"""What people see of a run: numbers, files that go on after a stop, answers, places of faults."""

import copy
import json
import random
import struct
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from packs import make_trainer
from small import make_model, make_prompts
from torch import nn
from transformers import TrainerControl, TrainerState

from comemo.train.config import read_settings, rules
from comemo.train.models.adapters import add_adapters
from comemo.train.models.drop_path import set_drop_path
from comemo.train.monitor import LossFault, first_nonfinite, make_callbacks, make_watch
from comemo.train.monitor import answers as asking
from comemo.train.monitor import log as logging
from comemo.train.monitor.answers import Answers, answer_once, first_questions, undisturbed
from comemo.train.monitor.faults import REMEMBERED, SpikeWatch, describe_samples
from comemo.train.monitor.norms import gates, gradient_norms, largest_gradient, layer_of, part_of
from comemo.train.monitor.progress import Progress, beside_bar
from comemo.train.monitor.scalars import JsonLines
from comemo.train.monitor.window import Window
from comemo.train.settings import AnswerSettings, DataSettings, LoraSettings

pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_heap"),
    pytest.mark.no_virtual_gpu("numbers of a trainer are on the CPU"),
]

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
        self.model, self.told = model, []
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


# --- answers ---


@pytest.fixture(scope="module")
def tiny(demo_checkpoint):
    import comemo

    model = comemo.CoMemoForConditionalGeneration.from_pretrained(
        demo_checkpoint, dtype=torch.float32
    )
    return model, comemo.CoMemoProcessor.from_pretrained(demo_checkpoint)


def state_of(model):
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    return weights, modes, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()


def same(before, after):
    return (
        all(torch.equal(before[0][name], weight) for name, weight in after[0].items())
        and before[1] == after[1]
        and torch.equal(before[2], after[2])
        and before[3] == after[3]
        and (before[4] == after[4]).all()
    )


@pytest.mark.parametrize(
    ("autocast", "adapted"),
    [
        (True, False),
        (False, True),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_answers_leave_training_as_it_was(tiny, picture_file, tmp_path, autocast, adapted):
    """Also the modes of modules one by one, gradients, and a model whose config has no cache."""
    model, processor = tiny
    if adapted:
        pytest.importorskip("peft")
        lora = LoraSettings(vision=2, language=2, mixin=2, dropout=0.5)
        model = add_adapters(copy.deepcopy(model), lora, seed=0)
        set_drop_path(model, 0.3)
    model.train()
    model.model.vision_tower.eval()  # frozen: modes differ
    model.gradient_checkpointing_enable()
    model.config.use_cache = model.config.text_config.use_cache = False
    forward = model.forward
    if autocast:  # as accelerate does it
        model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    gate = model.model.language_model.layers[1].mixin.attn_gate
    gate.grad = torch.tensor([3.0])
    settings = AnswerSettings(
        every=2,
        ask=[
            {"question": "Who is there?", "image": str(picture_file)},
            {"question": "What?", "image": [str(picture_file)] * 2},
            {"question": "Nothing?", "image": "/no/such.png"},
            {"question": "Hello?"},
        ],
        max_new_tokens=3,
    )
    trainer = FakeTrainer(nn.Linear(1, 1))
    trainer.model = model
    answers = Answers(
        "finetune", settings, DataSettings(), processor, trainer, tmp_path, tmp_path / "board"
    )
    state = TrainerState(global_step=0, max_steps=9)
    before = state_of(model)
    try:
        answers.on_train_begin(types.SimpleNamespace(bf16=autocast), state, TrainerControl())
        for state.global_step in (1, 2):
            answers.on_step_end(None, state, TrainerControl())
        assert same(before, state_of(model))
        assert gate.grad.item() == 3.0
    finally:
        vars(model).pop("forward", None) if autocast else None
        model.gradient_checkpointing_disable()
        model.config.use_cache = model.config.text_config.use_cache = True
        model.zero_grad(set_to_none=True)
        answers.close()
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == ["Who is there?", "What?", "Hello?"]
    assert {line["step"] for line in lines} == {2}
    assert len(trainer.told) == 4
    assert "no answer to 'Nothing?': FileNotFoundError" in trainer.told[2]
    if not autocast:
        model.eval()
        chat = comemo_answer(model, processor, "Who is there?", picture_file)
        assert lines[0]["answer"] == chat


def comemo_answer(model, processor, question, picture):
    import comemo

    session = comemo.ChatSession(model, processor, max_new_tokens=3, do_sample=False)
    return session.ask(question, str(picture))


def test_without_questions_the_data_is_asked(tmp_path):
    """The first lines of the evaluation data that can be asked; bad lines and videos cannot."""

    def line(question, **item):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]
        return json.dumps({**item, "conversations": turns}) + "\n"

    lines = [
        "{broken\n",
        line("<video>\nWhat?", video="a.mp4"),
        line("<image>\nOne?", image="1.png"),
    ]
    lines += [line("Two?"), line("<image><image>Three?", image=["a", "b"]), line("Four?")]
    (tmp_path / "eval.jsonl").write_text("".join(lines))
    (tmp_path / "train.jsonl").write_text(line("Five?"))
    data = DataSettings(train=str(tmp_path / "train.jsonl"), eval=str(tmp_path / "eval.jsonl"))
    found = first_questions(data)
    assert [item["question"] for item in found] == ["<image>\nOne?", "Two?", "<image><image>Three?"]
    assert [item["image"] for item in found] == [
        [str(tmp_path / "1.png")],
        [],
        [str(tmp_path / "a"), str(tmp_path / "b")],
    ]
    assert {item["expected"] for item in found} == {"Yes."}
    data.eval = None
    assert [item["question"] for item in first_questions(data)] == ["Five?"]
    data.root = str(tmp_path.parent)
    assert first_questions(data)


def test_an_interrupt_in_an_answer_is_passed_on(tiny, monkeypatch):
    model, processor = tiny
    model.train()
    before = state_of(model)

    def stop(*_, **__):
        torch.rand(1), random.random(), np.random.rand()
        raise KeyboardInterrupt

    monkeypatch.setattr(asking.ChatSession, "ask", stop)
    with pytest.raises(KeyboardInterrupt):
        answer_once(model, processor, {"question": "a"}, 3, False)
    assert same(before, state_of(model))


def test_evaluation_mode_is_without_gradients(tiny):
    model, _ = tiny
    model.train()
    with undisturbed(model):
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert all(module.training for module in model.modules())


# --- faults ---


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
