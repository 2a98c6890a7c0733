"""The training loop: what a step computes, resuming at any step, full disks, bad losses."""

import errno
import random

import numpy as np
import pytest
import torch
from conftest import SLOW
from packs import make_pack, make_trainer
from small import make_model
from torch import nn
from transformers import TrainerCallback

from comemo import CoMemoForConditionalGeneration
from comemo.images import normalise_pixels
from comemo.train.steps import sample_sums
from comemo.train.trainer import seed_of

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_heap"),
    pytest.mark.no_virtual_gpu("Trainer places by its own rules"),
]


def numbers(reports):
    return [(report.step, report.loss, report.grad_norm, report.losses) for report in reports]


def noisy_model():
    """With dropout in each layer, which draws random numbers."""
    model = make_model().cpu().requires_grad_(True)
    for layer in model.model.language_model.layers:
        layer.mlp.down_proj.register_forward_hook(
            lambda module, args, out: nn.functional.dropout(out, 0.2, module.training)
        )
    return model


def test_a_step_is_the_weighted_mean_over_all_its_packs(tmp_path):
    trainer, reports = make_trainer(tmp_path, total=3, steps=1, save_strategy="no")
    model, packs = trainer.model, [make_pack(stream, 0) for stream in range(3)]
    total, lost, by_dataset = 0.0, 0.0, {}
    for pack in packs:
        inputs = {k: v for k, v in pack.items() if k not in ("samples", "loss_weights", "labels")}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = normalise_pixels(inputs["pixel_values"])
        logits = model(**inputs).logits[0, :-1].log_softmax(-1)
        labels, weights = pack["labels"][0, 1:], pack["loss_weights"][0, 1:]
        losses = -logits.gather(1, labels.clamp(min=0)[:, None])[:, 0] * weights
        total, lost = total + weights.sum(), lost + losses.sum()
        for name, part in (("a", slice(0, 29)), ("b", slice(29, None))):
            before = by_dataset.get(name, (0.0, 0.0))
            own = losses[part].sum().item(), weights[part].sum().item()
            by_dataset[name] = (before[0] + own[0], before[1] + own[1])
    (lost / total).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    trainer.train()
    (report,) = reports
    assert report.loss == pytest.approx((lost / total).item(), rel=1e-5)
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for name, (loss, weight) in by_dataset.items():
        assert report.losses[name] == pytest.approx((loss, weight), rel=1e-5)
    assert report.tokens == sum(pack["input_ids"].numel() for pack in packs)
    assert report.label_tokens == sum((pack["labels"][:, 1:] != -100).sum() for pack in packs)
    assert (report.tiles, report.padding_tokens, len(report.samples)) == (1, 0, 6)
    assert report.seconds > report.data_seconds > 0


@pytest.mark.parametrize("clip", [1.0, pytest.param(0.0, marks=SLOW)])
def test_an_interrupted_run_goes_on_with_the_same_losses(tmp_path, clip):
    options = {"max_grad_norm": clip, "steps": 4, "save_total_limit": None}
    trainer, whole = make_trainer(tmp_path / "a", model=noisy_model(), **options)
    trainer.train()
    for step in (1, 2, 3):
        torch.manual_seed(step)  # the global state must not matter
        random.seed(step)
        np.random.seed(step)
        checkpoint = tmp_path / "a" / f"checkpoint-{step}"
        model = noisy_model()
        loaded = CoMemoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        again, rest = make_trainer(tmp_path / f"b{step}", model=model, **options)
        again.load_data_state(checkpoint)
        again.train(resume_from_checkpoint=str(checkpoint))
        assert numbers(rest) == numbers(whole)[step:]
        for ours, theirs in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_streams_without_data_change_nothing(tmp_path):
    plain, wanted = make_trainer(tmp_path / "a", total=1, save_strategy="no")
    plain.train()
    filled, found = make_trainer(tmp_path / "b", total=2, ends={1: 0}, save_strategy="no")
    filled.train()
    assert [r.loss for r in found] == pytest.approx([r.loss for r in wanted], rel=1e-6)
    assert [r.padding_tokens for r in found] == [2, 2, 2]
    empty, found = make_trainer(tmp_path / "c", total=1, steps=2, ends={0: 1}, save_strategy="no")
    empty.train()
    assert found[1].loss == found[1].grad_norm == 0
    assert all(p.isfinite().all() for p in empty.model.parameters())


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=SLOW)])
def test_text_alone_where_only_images_are_trained(tmp_path, checkpointing):
    """Every other pack of a stream is text: no trained weight takes part in it."""
    model = make_model().cpu().requires_grad_(False)
    trained = {n: p.requires_grad_() for n, p in model.named_parameters() if ".mixin." in n}
    trainer, reports = make_trainer(
        tmp_path,
        total=1,
        steps=4,
        model=model,
        save_strategy="no",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    trainer.train()
    assert [report.tiles for report in reports] == [0, 1, 0, 1]
    assert [report.grad_norm > 0 for report in reports] == [False, True, False, True]
    assert all(report.loss > 0 for report in reports)
    state = trainer.optimizer.state
    assert all(state[weight]["step"] == 4 for weight in trained.values())


@pytest.mark.parametrize("last", [False, True])
def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, last):
    told = []
    trainer, reports = make_trainer(tmp_path, tell=told.append, save_total_limit=1)
    saved, refused = trainer.save, 3 if last else 2

    def save(folder):
        saved(folder)
        if trainer.state.global_step == refused:
            raise OSError(errno.ENOSPC, "No space left on device")

    trainer.save = save
    trainer.train()
    assert len(reports) == 3
    assert len(told) == 1
    assert "No space left on device; training goes on" in told[0]
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["checkpoint-2" if last else "checkpoint-3"]
    assert (trainer.not_written is not None) == last


class AtStepEnd(TrainerCallback):
    def __init__(self, call):
        self.on_step_end = lambda *args, **kwargs: call()


def test_a_refused_step_changes_no_weight(tmp_path):
    def refuse(trainer, report):
        if report.step == 2:
            raise ValueError("refused")

    trainer, _ = make_trainer(tmp_path, watch=refuse)
    weights = []

    def copy():
        weights.append([p.detach().clone() for p in trainer.model.parameters()])

    trainer.add_callback(AtStepEnd(copy))
    with pytest.raises(ValueError, match="refused"):
        trainer.train()
    assert len(weights) == 1
    assert all(
        torch.equal(p, w) for p, w in zip(trainer.model.parameters(), weights[0], strict=True)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_loss_of_a_pack_again(tmp_path):
    """For a search after a fault: with the random numbers of the step."""
    found = []

    def watch(trainer, report):
        found.append(sum(trainer.again(batch).item() for batch in trainer.batches))
        trainer.model.zero_grad()

    trainer, reports = make_trainer(
        tmp_path, total=1, watch=watch, model=noisy_model(), save_strategy="no"
    )
    trainer.train()
    assert found == pytest.approx([report.loss for report in reports], rel=1e-6)


@pytest.mark.parametrize("every", [2, pytest.param(0, marks=SLOW)])
def test_held_out_loss(tmp_path, every):
    def held_out():
        return iter([make_pack(7, 0), make_pack(8, 1)])

    trainer, _ = make_trainer(
        tmp_path, steps=4, held_out=held_out, eval_every=every, save_strategy="no"
    )
    plain, _ = make_trainer(tmp_path / "b", steps=4, save_strategy="no")
    trainer.train()
    plain.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == ([2, 4] if every else [4])
    for p, q in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)
    total = lost = 0.0
    with torch.no_grad():
        for pack in held_out():
            pack.pop("samples")
            if "pixel_values" in pack:
                pack["pixel_values"] = normalise_pixels(pack["pixel_values"])
            weight = pack["loss_weights"][:, 1:].sum().item()
            lost += trainer.model.eval()(**pack).loss.item() * weight
            total += weight
    assert logged[-1]["eval_loss"] == pytest.approx(lost / total, rel=1e-5)
    assert {"eval_loss/a", "eval_loss/b"} <= logged[-1].keys()


def test_random_numbers_of_micro_batches_differ():
    seeds = {seed_of(seed, step, stream) for seed in (0, 1) for step in (0, 1) for stream in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_sums_over_samples():
    values = torch.rand(1, 9)
    bounds = [0, 4, 4, 9]
    wanted = [values[0, :4].sum().item(), 0.0, values[0, 4:].sum().item()]
    assert sample_sums(values, bounds).tolist() == pytest.approx(wanted)
