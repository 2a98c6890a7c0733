"""Whole runs: all stages, adapters, kills, several processes, what is refused and what is told."""

import json
import os
import shutil
import signal
import threading

import pytest
import torch
from filelock import FileLock
from packs import make_trainer
from rank_runs import train_on
from small import make_model
from train_runs import STAGES, changed, entries_of, make_start, settings_of, weights_of

from comemo import CoMemoForConditionalGeneration, CoMemoProcessor, load_image
from comemo.chat.session import ChatSession
from comemo.train import checkpoints, recipe
from comemo.train.checkpoints import NotWritten
from comemo.train.models.of_stages import narrow_frozen
from comemo.train.recipe import check, train
from comemo.train.trainer import RecipeTrainer

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_heap"),
    pytest.mark.no_virtual_gpu("Trainer places by its own rules"),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make_start(folder)
    return folder


def test_three_stages(start, tmp_path):
    told = []
    settings = settings_of(start, tmp_path / "run", STAGES, steps=2)
    model = train(settings, told.append)
    assert model == tmp_path / "run" / "model"
    first, second, third = (weights_of(tmp_path / "run" / name / "checkpoint-2") for name in STAGES)
    moved = changed(first, second)
    assert moved
    assert all("gated_cross_attn_layer" in name or name.startswith("mlp1") for name in moved)
    assert not any("gate" in name.rsplit(".", 1)[1] for name in moved)
    assert any(name.startswith("vision_model") for name in changed(second, third))
    assert not changed(third, weights_of(model))
    trained = CoMemoForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    session = ChatSession(trained, CoMemoProcessor.from_pretrained(model), max_new_tokens=2)
    assert isinstance(session.ask("Which colour is it?", str(start / "3.png")), str)
    again = []
    assert train(settings, again.append) == model  # finished: nothing is done
    assert [line for line in again if "finished" in line] == again
    assert len(again) == 3


@pytest.mark.parametrize("lora", [{"language": 2, "mixin": 2, "vision": 2}])
def test_adapters(start, tmp_path, lora):
    """Interrupted and resumed, and merged at the end."""
    whole = settings_of(start, tmp_path / "a", ("finetune",), lora, steps=3, save_every=1)
    train(whole, [].append)
    kept = sorted(path.name for path in (tmp_path / "a" / "finetune").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"]
    folder = tmp_path / "a" / "finetune" / "checkpoint-3"
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert not (folder / "model.safetensors").exists()
    merged, before = weights_of(tmp_path / "a" / "model"), weights_of(start / "tiny")
    assert merged.keys() == before.keys()
    names = {
        name
        for name in merged
        if merged[name].shape == before[name].shape
        and not torch.equal(merged[name], before[name].to(merged[name].dtype))
    }
    assert any("attention.wqkv" in name for name in names)
    assert not any("tok_embeddings" in name for name in names)
    folder.rename(tmp_path / "gone")
    (tmp_path / "a" / "model").rename(tmp_path / "before")
    train(whole, [].append)
    assert not changed(weights_of(tmp_path / "before"), weights_of(tmp_path / "a" / "model"))


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    train(settings_of(start, output, steps=10), [].append)
    return output


def killed_after(steps):
    """`compute_loss` of a rank that is killed in its next step."""
    compute = RecipeTrainer.compute_loss

    def killed(self, *args, **kwargs):
        if self.state.global_step == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(self, *args, **kwargs)

    return killed


def test_killed_ranks_are_replaced_by_one_and_it_by_two(
    start, tmp_path, uninterrupted, monkeypatch
):
    """kill -9 of all, twice; each time another number of ranks goes on."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # accelerate would give one rank all cores
    settings = settings_of(start, output := tmp_path / "run", steps=10)
    for count, steps in ((2, 3), (1, 7)):
        with monkeypatch.context() as patch:
            patch.setattr(RecipeTrainer, "compute_loss", killed_after(steps))
            train_on(count, settings, killed=range(count), group=count > 1)
        assert max(entries_of(output)) == steps
    told, _ = train_on(2, settings)
    assert "goes on after step 6 of 10" in told[0]
    # Text alone has another rounding where ranks must wait for each other's gradients.
    assert entries_of(output) == pytest.approx(entries_of(uninterrupted), rel=1e-6)
    assert not changed(weights_of(uninterrupted / "model"), weights_of(output / "model"))


def test_all_options_together(start, tmp_path, caplog):
    """One epoch with bad lines, held-out loss, answers, TensorBoard, noise, bfloat16."""
    good = (start / "data.jsonl").read_text()
    data, held_out = start / "bad.jsonl", start / "held.jsonl"
    data.write_text("{broken\n" + good + json.dumps({"image": "none.png"}) + "\n")
    held_out.write_text("".join(line + "\n" for line in good.splitlines()[:3]))
    settings = settings_of(
        start,
        tmp_path / "run",
        steps=None,
        epochs=1,
        precision="bfloat16",
        neftune_alpha=5.0,
        gradient_checkpointing=True,
        eval_every=2,
        weight_decay=0.1,
    )
    settings.tensorboard = True
    settings.data.train, settings.data.eval = str(data), str(held_out)
    settings.answers.every, settings.answers.max_new_tokens = 2, 3
    counted = check(settings)
    assert counted.samples == 12
    told = []
    model = train(settings, told.append)
    lines = (tmp_path / "run" / "pretrain" / "log.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    steps = [entry for entry in found if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, counted.steps + 1))
    assert steps[-1]["bad_samples"] == 2
    assert f"{data}:1" in caplog.text
    assert f"{data}:14" in caplog.text
    assert any("eval_loss" in entry for entry in found)
    answers = (tmp_path / "run" / "pretrain" / "answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in answers} >= {2, counted.steps}
    assert list((tmp_path / "run" / "tensorboard" / "pretrain").glob("events*"))
    assert {weight.dtype for weight in weights_of(model).values()} == {torch.bfloat16}


def test_frozen_weights_in_bfloat16_change_nothing(tmp_path):
    found = []
    for narrow in (False, True):
        model = make_model().cpu().requires_grad_(False)
        for name, weight in model.named_parameters():
            if name != "lm_head.weight":  # which rounding would change
                weight.data = weight.data.bfloat16().float()
            weight.requires_grad_(".mixin." in name or "projector" in name)
        if narrow:
            narrow_frozen(model)
        trainer, reports = make_trainer(tmp_path, model=model, save_strategy="no", bf16=True)
        trainer.train()
        found.append([(report.loss, report.grad_norm) for report in reports])
    assert found[0] == found[1]
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    layer = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert dtypes.pop(layer) == torch.bfloat16
    assert dtypes["lm_head.weight"] == torch.float32
    assert dtypes["model.language_model.embed_tokens.weight"] == torch.float32
    assert all(
        d == torch.float32 for n, d in dtypes.items() if model.get_parameter(n).requires_grad
    )


def test_a_spoiled_checkpoint_is_told_and_the_one_before_is_taken(start, tmp_path, uninterrupted):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    shutil.rmtree(output / "model")
    broken = output / "pretrain" / "checkpoint-10" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:-100])
    told = []
    train(settings_of(start, output, steps=10), told.append)
    assert "checkpoint-10 is not whole: optimizer.pt has" in told[0]
    assert "goes on after step 8 of 10" in told[1]
    assert not changed(weights_of(uninterrupted / "model"), weights_of(output / "model"))
    assert entries_of(output) == entries_of(uninterrupted)


def test_a_full_disk_at_the_end_is_an_error(start, tmp_path, monkeypatch):
    settings = settings_of(start, tmp_path / "run", steps=2, save_every=1)
    written = checkpoints.write_folder

    def full(target, fill):
        if target.name == "checkpoint-2":
            raise NotWritten(f"{target} cannot be written: No space left on device")
        written(target, fill)

    monkeypatch.setattr(checkpoints, "write_folder", full)
    with pytest.raises(OSError, match="No space left on device: make room and run the same"):
        train(settings, [].append)
    monkeypatch.undo()
    told = []
    train(settings, told.append)
    assert "goes on after step 1 of 2" in told[0]


def test_a_loss_that_is_not_finite_stops_with_its_place(start, tmp_path):
    settings = settings_of(start, tmp_path / "run", steps=4, save_every=1, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"step \d.*(data: data .*data.jsonl:\d+|norm)"):
        train(settings, [].append)
    assert not (tmp_path / "run" / "model").exists()


def test_the_model_cuts_images_as_its_data_was_cut(start, tmp_path):
    settings = settings_of(start, tmp_path / "run", steps=1)
    settings.data.max_dynamic_patch, settings.data.use_thumbnail = 3, False
    model = train(settings, [].append)
    config = CoMemoForConditionalGeneration.from_pretrained(model).config
    assert (config.max_dynamic_patch, config.use_thumbnail) == (3, False)
    processor = CoMemoProcessor.from_pretrained(model)
    tiles = processor(images=str(start / "2.png"), text="<image>")["pixel_values"]
    assert len(tiles) == load_image(start / "2.png", 112, 3, use_thumbnail=False)[0].shape[0] > 1


def test_further_stages_are_added_to_a_finished_run(start, tmp_path):
    first = train(settings_of(start, tmp_path / "run", STAGES[:1], steps=2), [].append)
    before = weights_of(first)
    model = train(settings_of(start, tmp_path / "run", STAGES[:2], steps=2), [].append)
    assert changed(before, weights_of(model))
    last = tmp_path / "run" / STAGES[1] / "checkpoint-2"
    assert not changed(weights_of(last), weights_of(model))
    assert json.loads((model / "training.json").read_text()) == {"stage": STAGES[1], "steps": 2}


def test_a_run_waits_until_a_killed_one_is_gone(start, tmp_path):
    (tmp_path / "run").mkdir()
    lock = FileLock(tmp_path / "run" / ".lock", thread_local=False)
    lock.acquire()
    killed = threading.Timer(0.5, lock.release)
    killed.start()
    model = train(settings_of(start, tmp_path / "run", steps=1), [].append)
    killed.join()
    assert model.is_dir()


def test_what_is_refused(start, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "LOCK_SECONDS", 0.1)
    settings, told = settings_of(start, tmp_path / "run", steps=1), []
    (tmp_path / "run").mkdir()
    lock = FileLock(tmp_path / "run" / ".lock")
    with lock, pytest.raises(OSError, match=r"another process trains in .*, and did not end"):
        train(settings, told.append)
    assert told == [f"{tmp_path / 'run'}: waiting for another process that trains in it to end"]
    train(settings, [].append)
    other = settings_of(start, tmp_path / "run", steps=1, learning_rate=2e-3)
    with pytest.raises(ValueError, match=r"other settings: .*learning_rate.*0.001.*0.002"):
        train(other)
    for name in ("model", "pretrain"):
        somebodys = tmp_path / f"with {name}"
        (somebodys / name / "checkpoint-9").mkdir(parents=True)
        with pytest.raises(ValueError, match=f"has '{name}' but no settings.yaml"):
            train(settings_of(start, somebodys, steps=1))
        assert {path.name for path in somebodys.rglob("*")} == {".lock", name, "checkpoint-9"}
    settings.run = ("nothing",)
    with pytest.raises(ValueError, match=r"run must name stages of pretrain, got \['nothing'\]"):
        train(settings)
    nowhere = settings_of(start, "", steps=1)
    with pytest.raises(ValueError, match="output must be the folder of the run"):
        train(nowhere)
