"""Whole runs with divided models: equal to one process, resumed under other plans."""

import json
import shutil

import pytest
import torch
from rank_processes import RankFailed
from rank_runs import train_on
from safetensors.torch import load_file
from train_runs import make_start, settings_of

from comemo import CoMemoForConditionalGeneration
from comemo.train import ranks
from comemo.train.config import read_settings
from comemo.train.monitor import LossFault
from comemo.train.parallel import state as states
from comemo.train.parallel.state import is_in_parts
from comemo.train.recipe import train

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_heap"),
    pytest.mark.no_virtual_gpu("ranks are forks on the CPU"),
]
OTHERS = [  # more than two ranks, or a combination of what the chain below has
    (4, {"tensor": 2, "checkpoints": "sharded", "offload": True}),
    (4, {"replicas": 2}),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make_start(folder, heads=4)
    return folder


def settings_for(start, output, plan=None, stage="finetune", lora=None, **own):
    """Of a run with held-out data; its packs have one or two samples."""
    own = {"steps": 3, "packs_per_step": 4, "save_every": 1, "keep": 3, **own}
    settings = settings_of(start, output, (stage,), lora, **own)
    settings.data.eval = str(start / "data.jsonl")
    settings.data.max_tokens = 320
    settings.shard_optimizer = False
    for name, value in ({"plan": "fsdp", **plan} if plan is not None else {}).items():
        setattr(settings.parallel, name, value)
    return settings


def log_of(output, stage="finetune"):
    lines = (output / stage / "log.jsonl").read_text().splitlines()
    names = ("loss", "grad_norm", "grad_norm/mixin", "gate/attn.1", "eval_loss")
    entries = [json.loads(line) for line in lines]
    return [{name: entry[name] for name in names if name in entry} for entry in entries]


def assert_same_run(found, wanted, stage="finetune", tolerance=1e-5):
    """Losses, norms, gates, held-out losses and all weights of the trained model."""
    ours, theirs = log_of(found, stage), log_of(wanted, stage)
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, rel=1e-4)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (found, wanted))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert (ours[name] - weight).abs().max() < tolerance, name


@pytest.fixture(scope="module")
def one_process(start, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "run"
    train(settings_for(start, output), [].append)
    return output


def go_back(output, step, stage="finetune"):
    """As if the run had been stopped after a step."""
    shutil.rmtree(output / "model", ignore_errors=True)
    for folder in (output / stage).glob("checkpoint-*"):
        if int(folder.name.rpartition("-")[2]) > step:
            shutil.rmtree(folder)


@pytest.mark.slow
def test_a_run_goes_on_under_any_plan(start, tmp_path, one_process):
    """Parts of two ranks, then divided layers, then one process; each takes a step or more."""
    output = tmp_path / "run"
    train_on(2, settings_for(start, output, {"checkpoints": "sharded"}))
    assert_same_run(output, one_process)
    assert is_in_parts(output / "finetune" / "checkpoint-1")
    assert not (output / "finetune" / "checkpoint-1" / "model.safetensors").exists()
    go_back(output, 1)
    told = train_on(2, settings_for(start, output, {"tensor": 2}))
    assert "goes on after step 1" in told[0][0]
    assert_same_run(output, one_process)
    go_back(output, 2)
    train(settings_for(start, output), [].append)
    assert_same_run(output, one_process)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "plan"), OTHERS)
def test_other_plans_equal_one_process(start, tmp_path, one_process, count, plan):
    """Begun in one process, gone on by all ranks, then by parts of another number of ranks."""
    output = tmp_path / "run"
    shutil.copytree(one_process, output)
    go_back(output, 1)
    train_on(count, settings_for(start, output, plan))
    assert_same_run(output, one_process)
    go_back(output, 2)
    train_on(2, settings_for(start, output, {"checkpoints": "sharded"}))
    assert_same_run(output, one_process)


@pytest.mark.slow
def test_replicas_exchange_gradients_once_a_step(start, tmp_path):
    """Also with several packs of a step on each rank."""
    runs = []
    for count, own in ((1, None), (2, {"replicas": 2}), (2, {})):
        settings = settings_for(start, tmp_path / str(len(runs)), own, packs_per_step=6, steps=2)
        train(settings, [].append) if own is None else train_on(count, settings)
        runs.append(tmp_path / str(len(runs)))
    assert_same_run(runs[1], runs[0])
    assert_same_run(runs[2], runs[0])


@pytest.mark.slow
def test_parts_go_on_with_whole_models(start, tmp_path, one_process):
    """DDP and one process read what ranks wrote in parts, from other numbers of divided layers."""
    output = tmp_path / "run"
    train_on(2, settings_for(start, output, {"tensor": 2, "checkpoints": "sharded"}))
    go_back(output, 1)
    train_on(2, settings_for(start, output))
    assert_same_run(output, one_process)
    shutil.rmtree(output)
    train_on(2, settings_for(start, output, {"tensor": 2, "checkpoints": "sharded"}))
    go_back(output, 1)
    train_on(2, settings_for(start, output, {"checkpoints": "sharded"}))
    assert_same_run(output, one_process)
    go_back(output, 2)
    train(settings_for(start, output), [].append)
    assert_same_run(output, one_process)
    sharded = settings_for(start, output)
    sharded.shard_optimizer = True
    train_on(2, settings_for(start, output := tmp_path / "b", {"checkpoints": "sharded"}))
    go_back(output, 1)
    sharded.output = str(output)
    with pytest.raises(RankFailed, match=r"choose parallel\.plan fsdp, or shard_optimizer false"):
        train_on(2, sharded)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [{"tensor": 2}, {}])
def test_a_frozen_tower_drops_the_same_tiles(start, tmp_path, plan):
    """Random numbers of a pack do not depend on how ranks share its tiles."""
    runs = []
    for count, own in ((1, None), (2, plan)):
        output = tmp_path / str(count)
        settings = settings_for(start, output, own, "pretrain", steps=2)
        settings.answers.every, settings.answers.max_new_tokens = 2, 3
        runs.append(output)
        if own is None:
            train(settings, [].append)
        else:
            train_on(count, settings)
    assert_same_run(runs[1], runs[0], "pretrain")
    answers = [(run / "pretrain" / "answers.jsonl").read_text() for run in runs]
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 3


@pytest.mark.slow
def test_adapters(start, tmp_path):
    runs = []
    for count, own in ((1, None), (2, {"checkpoints": "sharded"})):
        output = tmp_path / str(count)
        lora = {"language": 2, "mixin": 2, "vision": 2}
        settings = settings_for(start, output, own, lora=lora)
        settings.stages["finetune"].train = ("projector",)
        train(settings, [].append) if own is None else train_on(count, settings)
        runs.append(output)
    assert_same_run(runs[1], runs[0])
    assert (runs[1] / "finetune" / "checkpoint-3" / "adapter").is_dir()
    go_back(runs[1], 1)
    train_on(2, settings)
    assert_same_run(runs[1], runs[0])


def test_a_loss_that_is_not_finite_is_told_with_its_place(start, tmp_path):
    """On one rank of two: both end, before a weight changes."""
    broken = tmp_path / "broken"
    shutil.copytree(start / "tiny", broken)
    model = CoMemoForConditionalGeneration.from_pretrained(broken, dtype=torch.float32)
    with torch.no_grad():
        model.model.language_model.layers[2].mlp.up_proj.weight[0, 0] = torch.inf
    model.save_pretrained(broken)
    settings = settings_for(start, tmp_path / "run", {"tensor": 2})
    settings.start.checkpoint = str(broken)
    with pytest.raises(RankFailed) as caught:
        train_on(2, settings)
    text = str(caught.value)
    assert text.count(LossFault.__name__) >= 2
    assert "the weight model.language_model.layers.2.mlp.up_proj.weight" in text
    assert not list((tmp_path / "run" / "finetune").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_full_disk_of_one_rank_does_not_end_a_run(start, tmp_path, monkeypatch):
    """The checkpoint of the first step is skipped on all ranks, and told."""
    own, calls = states.write_parts, []

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def write(*args):
        calls.append(1)
        with monkeypatch.context() as patched:
            if len(calls) == 1 and ranks.rank() == 1:
                patched.setattr(torch, "save", full)
            own(*args)

    monkeypatch.setattr(states, "write_parts", write)
    output = tmp_path / "run"
    told = train_on(2, settings_for(start, output, {"checkpoints": "sharded"}))
    said = [line for line in told[0] if "training goes on" in line]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    kept = sorted(path.name for path in (output / "finetune").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"]
    assert (output / "model" / "model.safetensors").is_file()


def test_one_process_says_that_it_divides_nothing(start, tmp_path):
    told = []
    settings = settings_for(start, tmp_path / "run", {}, steps=1)
    train(settings, told.append)
    assert "one process: parallel.plan fsdp divides nothing" in told
    settings.parallel.offload = True
    with pytest.raises(ValueError, match=r"parallel\.offload must be false for one process"):
        train(settings, told.append)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tensor=2"], "parallel.tensor need parallel.plan fsdp, got ddp"),
        (["parallel.plan=fsdp", "parallel.context=2"], "parallel.context must be 1, got 2"),
        (
            ["parallel.plan=fsdp", "parallel.tensor=2", "lora.mixin=4"],
            "parallel.tensor excludes stages.finetune.lora",
        ),
        (["parallel.plan=zero"], "parallel.plan must be one of ddp, fsdp"),
    ],
)
def test_settings_that_exclude_each_other(words, message):
    given = ["output=o", "start.checkpoint=c", "data.train=d.jsonl", "steps=1", *words]
    with pytest.raises(ValueError, match=message):
        read_settings(None, given)


def test_settings_of_a_program_are_checked(start, tmp_path):
    settings = settings_for(start, tmp_path / "run", {"plan": "ddp", "tensor": 2})
    with pytest.raises(ValueError, match=r"train: parallel\.tensor need parallel\.plan fsdp"):
        train(settings)


def test_numbers_that_do_not_divide_heads_are_refused(start, tmp_path):
    settings = settings_for(start, tmp_path / "run", {"tensor": 4})
    with pytest.raises(RankFailed, match=r"must be one of \[1, 2\], got 4 for 2 key heads"):
        train_on(4, settings)
