"""Answers while training goes on: training is the same afterwards."""

import copy
import json
import random
import types

import numpy as np
import pytest
import torch
from monitoring import (  # noqa: F401
    FakeTrainer,
    model,
)
from torch import nn
from transformers import TrainerControl, TrainerState

from comemo.train.models.adapters import add_adapters
from comemo.train.models.drop_path import set_drop_path
from comemo.train.monitor import answers as asking
from comemo.train.monitor.answers import Answers, answer_once, first_questions, undisturbed
from comemo.train.settings import AnswerSettings, DataSettings, LoraSettings

pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_heap"),
    pytest.mark.no_virtual_gpu("numbers of a trainer are on the CPU"),
]


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
