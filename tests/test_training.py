"""Training with transformers' Trainer, and weights loaded by `load_state_dict`."""

import copy
import json

import pytest
import torch
from conftest import here
from small import make_model, make_prompts
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments

import comemo
from comemo.checkpoint import from_published

pytest.importorskip("accelerate")  # which Trainer needs
pytestmark = pytest.mark.usefixtures("small_heap")


def trainable(**llm):
    return make_model(**llm).requires_grad_(True)


# --- Trainer ---

# Its clipping adds a CPU scalar to sums on the GPU, which a real GPU allows.
ON_CPU = pytest.mark.no_virtual_gpu("Trainer places and clips by its own rules")

IDS = torch.arange(3, 3 + 4 * 24).view(4, 24)
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def collate(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class Noted(TrainerCallback):
    """The weights when training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}


def train(model, folder, rows=ROWS, resume=None, **options):
    options = {"learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1} | options
    options |= {"lr_scheduler_type": "constant", "report_to": [], "disable_tqdm": True}
    noted = Noted()
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), use_cpu=here() == "cpu", **options),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        callbacks=[noted],
    )
    trainer._get_train_sampler = lambda *_, **__: torch.utils.data.SequentialSampler(rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, noted.weights


@ON_CPU
@pytest.mark.parametrize("weighted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_gradient_accumulation(golden, tmp_path, weighted):
    torch.manual_seed(0)
    rows = [dict(row, labels=row["labels"].clone()) for row in ROWS]
    if weighted:
        for i, row in enumerate(rows):
            row["loss_weights"] = torch.rand(24)
            row["labels"][: 3 * i] = -100  # samples of different lengths
    logged = set()
    for batch, steps in ((4, 1), (2, 2), (1, 4)):
        model = AutoModel.from_pretrained(golden / "ckpt_a", dtype=torch.float32).to(here())
        trainer, _ = train(
            model,
            tmp_path,
            rows,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=1e9,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        logged.add((round(log["loss"], 3), round(log["grad_norm"], 2)))
    assert len(logged) == 1, logged
    if not weighted:
        # 92 labels are predicted; until 5.11 Trainer also counted the first of each row.
        counted = int(trainer._get_num_items_in_batch([collate(rows)], "cpu"))
        assert counted in (92, 96)
        ((loss, norm),) = logged
        assert loss == pytest.approx(9.696 * 92 / counted, abs=6e-4)
        assert norm == pytest.approx(20.06 * 92 / counted, abs=6e-3)


@ON_CPU
def test_a_run_resumes_from_its_checkpoint(tmp_path):
    options = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2}
    model = trainable()
    train(model, tmp_path, max_steps=2, **options)
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    _, started = train(trainable(), tmp_path, resume=str(checkpoint), max_steps=3)
    assert all(torch.equal(started[name], weight) for name, weight in saved.items())
    fresh = dict(trainable().named_parameters())
    assert not torch.equal(started["lm_head.weight"], fresh["lm_head.weight"])


@ON_CPU
def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = trainable()
    trainer, _ = train(
        model,
        tmp_path,
        learning_rate=1.0,  # far too large, so the first step is the best
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    best = trainer.state.best_model_checkpoint
    assert best.endswith("-1")
    wanted = AutoModel.from_pretrained(best, dtype=torch.float32).to(here())
    for (name, weight), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(weight, other), name


@ON_CPU
def test_a_checkpoint_of_a_trainer_has_the_config(tmp_path):
    trainer, _ = train(trainable(), tmp_path, max_steps=1)
    trainer.save_model(str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == comemo.CoMemoConfig.model_type
    assert {"llm_config", "text_config", "vision_config", "mixin_config"} <= config.keys()


@ON_CPU
def test_predictions_are_logits_with_and_without_images(tmp_path):
    """Trainer concatenates the outputs of evaluation steps, some with images, some without."""
    model = make_model()
    batch = make_prompts(model)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == 299, 5)
    steps = [batch, {"input_ids": ids, "attention_mask": batch["attention_mask"]}]
    options = {"use_cpu": here() == "cpu", "report_to": [], "disable_tqdm": True}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=1, **options),
        data_collator=lambda rows: {**rows[0], "labels": rows[0]["input_ids"]},
    )
    found = trainer.predict(steps).predictions
    wanted = torch.cat([model(**step).logits for step in steps])
    torch.testing.assert_close(torch.from_numpy(found), wanted)


# --- load_state_dict, as trainers use it ---


def published_weights(model, folder, **options):
    from safetensors.torch import load_file

    model.save_pretrained(folder, **options)
    return [load_file(file) for file in sorted(folder.glob("*.safetensors"))]


@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("part", ["whole", "base", "shards"])
def test_published_names_are_loaded(tmp_path, architecture, part):
    model = trainable(architectures=[architecture])
    shards = published_weights(
        model, tmp_path, **({"max_shard_size": "60KB"} if part == "shards" else {})
    )
    assert (len(shards) > 1) == (part == "shards")
    other = trainable(architectures=[architecture])
    torch.nn.init.zeros_(other.lm_head.weight)
    for weight in other.model.parameters():
        torch.nn.init.zeros_(weight)
    found = other.model if part == "base" else other
    for weights in shards:
        result = found.load_state_dict(weights, strict=part != "shards")
        assert not result.unexpected_keys
    for name, weight in (model.model if part == "base" else model).state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


def test_wrong_weights_leave_the_model_unchanged(tmp_path):
    model = trainable()
    (weights,) = published_weights(model, tmp_path)
    before = copy.deepcopy(model.state_dict())
    name = "language_model.output.weight"
    for broken, message in (
        (weights | {"language_model.model.more.weight": torch.zeros(1)}, "unexpected.*more"),
        (weights | {name: torch.zeros(3, 64)}, r"of another shape.*\(3, 64\) for \(300, 64\)"),
        ({n: w for n, w in weights.items() if n != name}, "missing.*lm_head"),
    ):
        changed = {
            n: torch.zeros_like(w) if w.is_floating_point() else w for n, w in broken.items()
        }
        with pytest.raises(ValueError, match=f"load_state_dict: weights {message}"):
            model.load_state_dict(changed)
        if not message.startswith("missing"):  # which strict=False allows
            with pytest.raises(ValueError, match=f"load_state_dict: weights {message}"):
                model.load_state_dict(changed, strict=False)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    ours = from_published(weights, model.config)
    assert ours.keys() == before.keys()
