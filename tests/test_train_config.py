"""Settings of training: files, command lines, presets, runs that go on."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_settings import NEEDED, PARTS, faults_of, write  # noqa: F401

from comemo.config import PUBLISHED_BEHAVIOUR
from comemo.train import config
from comemo.train.config import (
    difference,
    flags,
    presets,
    read_settings,
    rules,
    write_settings,
)
from comemo.train.config.layers import flatten
from comemo.train.settings import LoraSettings, StageSettings, TrainSettings

ROOT = Path(__file__).parents[1]
THETA = {"rope_theta": 10_000.0}


# --- presets ---


def test_the_script_is_the_published_recipe():
    settings = read_settings(None, ["preset=script", *PARTS])
    assert settings.run == ("pretrain", "pretrain_fixed_gates", "finetune")
    first, second, last = (settings.stages[name] for name in settings.run)
    assert dataclasses.replace(first, freeze_gates=True) == second
    assert (first.train, first.learning_rate, first.steps) == (("projector", "mixin"), 1e-4, 10_000)
    assert (first.schedule, first.warmup, first.freeze_gates) == ("constant", 0.03, False)
    assert last.train == ("vision", "projector", "mixin", "language")
    assert (last.learning_rate, last.schedule, last.steps) == (4e-5, "cosine", 9_000)
    for stage in (first, second, last):
        assert (stage.packs_per_step, stage.betas, stage.weight_decay) == (8, (0.9, 0.999), 0.01)
        assert (stage.drop_path, stage.precision, stage.save_every) == (0.1, "bfloat16", 500)
        assert stage.gradient_checkpointing
        assert not any(dataclasses.asdict(stage.lora)[part] for part in ("vision", "language"))
    data = settings.data
    assert (data.max_tokens, data.max_tiles, data.buffer) == (16384, 48, 20)
    assert (data.max_sample_tokens, data.loss_weight) == (8192, "square")
    assert settings.shard_optimizer
    assert settings.start.model == {**PUBLISHED_BEHAVIOUR, "ps_version": "v2"}


def test_the_paper_has_other_steps_and_the_geometric_order():
    settings = read_settings(None, ["preset=paper", *PARTS])
    assert [settings.stages[name].steps for name in settings.run] == [2_000, 2_000, 9_000]
    assert {stage.packs_per_step for stage in settings.stages.values()} == {1024}
    assert settings.start.model == {"tile_order": "row"}


def test_a_checkpoint_says_itself_how_it_behaves():
    assert read_settings(None, ["preset=script", *NEEDED]).start.model == {}


@pytest.mark.parametrize(
    ("words", "run"),
    [
        (["steps=3"], ("finetune",)),
        (["stages.finetune.steps=3", "stages.pretrain.steps=4"], ("pretrain", "finetune")),
        (["preset=script"], ("pretrain", "pretrain_fixed_gates", "finetune")),
        (["preset=script", "run=finetune"], ("finetune",)),
        (["run=[own, finetune]", "steps=3"], ("own", "finetune")),
    ],
)
def test_which_stages_run(words, run):
    settings = read_settings(None, [*words, *NEEDED])
    assert settings.run == run
    assert set(settings.stages) == set(run)


def test_without_a_preset_stages_differ_in_what_they_train():
    settings = read_settings(None, ["steps=3", *PARTS])
    for name, stage in settings.stages.items():
        assert stage == StageSettings(**presets.STAGES[name], steps=3)


# --- what overrides what ---


def test_the_command_line_overrides_the_file_and_the_file_the_preset(write):
    file = write(
        "output: runs/a\npreset: script\nstart: {checkpoint: model}\ndata:\n  train: a.jsonl\n"
        "learning_rate: 1e-3\nstages:\n  finetune: {learning_rate: 5e-4, epochs: 2}\n"
    )
    settings = read_settings(file)
    rates = {name: stage.learning_rate for name, stage in settings.stages.items()}
    assert rates == {"pretrain": 1e-3, "pretrain_fixed_gates": 1e-3, "finetune": 5e-4}
    assert (settings.stages["finetune"].steps, settings.stages["finetune"].epochs) == (None, 2.0)
    settings = read_settings(file, ["--learning-rate=1e-5", "stages.pretrain.learning_rate=2e-5"])
    rates = {name: stage.learning_rate for name, stage in settings.stages.items()}
    assert rates == {"pretrain": 2e-5, "pretrain_fixed_gates": 1e-5, "finetune": 1e-5}
    assert read_settings(file, ["--steps", "7"]).stages["finetune"].epochs is None
    last = read_settings(file, ["--steps", "7", "stages.finetune.epochs=3"]).stages["finetune"]
    assert (last.steps, last.epochs) == (None, 3.0)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--learning_rate", "1e-4"], "stages.finetune.learning_rate", 1e-4),
        (["--learning-rate=1e-4"], "stages.finetune.learning_rate", 1e-4),
        (["stages.finetune.steps=1e3"], "stages.finetune.steps", 1000),
        (["--no-such.yes", "--steps=1"], None, None),
        (["--gradient_checkpointing", "False"], "stages.finetune.gradient_checkpointing", False),
        (["--freeze_gates"], "stages.finetune.freeze_gates", True),
        (["train=mixin"], "stages.finetune.train", ("mixin",)),
        (["train=vision,mixin"], "stages.finetune.train", ("vision", "mixin")),
        (["train=[]", "lora.language=8"], "stages.finetune.train", ()),
        (["lora={language: 8}"], "stages.finetune.lora.language", 8),
        (["betas=[0.9, 0.95]"], "stages.finetune.betas", (0.9, 0.95)),
        (["output=2024"], "output", "2024"),
        (["output=a: b", "output=c: d"], "output", "c: d"),
        (["keep=7", "run=finetune", "stages.pretrain.spike=0"], "stages.pretrain.keep", 2),
        (["data.root=null"], "data.root", None),
        (["neftune_alpha=None"], "stages.finetune.neftune_alpha", None),
        (["unfreeze_vit_layers=-2"], "stages.finetune.unfreeze_vit_layers", -2),
        (["--unfreeze-vit-layers", "-2"], "stages.finetune.unfreeze_vit_layers", -2),
        (["start.model.tile_order=row"], "start.model", {"tile_order": "row"}),
        (["start.model.mixin_config.rope_theta=1e4"], "start.model", {"mixin_config": THETA}),
        (["start.model={mixin_config: {rope_theta: 1e4}}"], "start.model", {"mixin_config": THETA}),
        (["data.mixing.a=1e1", "data.mixing.b=0.5"], "data.mixing", {"a": 10.0, "b": 0.5}),
        (["data.mixing.a=2", "data.mixing.b=0.5"], "data.mixing", {"a": 2, "b": 0.5}),
        (["data={max_tokens: 99}"], "data.max_tokens", 99),
    ],
)
def test_words_of_a_command_line(words, name, value):
    words = [*NEEDED, "steps=5", *words]
    if name is None:
        assert faults_of(*words)
    else:
        found = flatten(read_settings(None, words))[tuple(name.split("."))]
        assert (type(found), found) == (type(value), value)


def test_settings_are_read_back_as_they_were_written(tmp_path):
    """Any combination of presets, stages and values, also those that YAML writes oddly."""
    odd = ["yes", "1e-4", "null", "a: b", "é\u2028", " x ", "2024-01-01", "#", "[", "'"]
    odd_settings = [
        *([f"preset={name}"] for name in ("script", "paper")),
        *([f"output={text}"] for text in odd if text != " x "),
        *([word] for word in ("learning_rate=1e-5", "data.mixing={b: 2, a: 0.1}")),
        ["epochs=0.5", "steps=null"],
        ["stages.pretrain.lora.language=8", "run=[pretrain, own-stage]"],
        ['answers.ask=[{question: "What?", image: [a.png, b.png]}]', "answers.every=5"],
        ["start.model={mixin_config: {num_heads: 4}, tile_order: row}"],
        ["data.root=~", "betas=[0.5, 0.6]", "eps=1e-12", "seed=9223372036854775807"],
    ]

    @given(st.lists(st.sampled_from(odd_settings), max_size=4))
    @settings(max_examples=settings.default.max_examples // 2)  # YAML is slow
    def holds(chosen):
        words = ["steps=3", *NEEDED, *(word for words in chosen for word in words)]
        read = read_settings(None, words)
        write_settings(read, tmp_path / "a.yaml")
        assert read_settings(tmp_path / "a.yaml") == read
        assert difference(read, read_settings(tmp_path / "a.yaml")) == []
        config.check_settings(read)

    holds()


# --- resumed runs ---


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("learning_rate=2e-4", "stages.finetune.learning_rate: 4e-05 -> 0.0002"),
        ("lora.language=4", "stages.finetune.lora.language: 0 -> 4"),
        ("data.max_tokens=99", "data.max_tokens: 16384 -> 99"),
        ("seed=1", "seed: 42 -> 1"),
        ("run=[pretrain]", "run: ['finetune'] -> ['pretrain']"),
        *((f"{name}=9", None) for name in ("save_every", "keep", "log_every", "eval_every")),
        *((word, None) for word in ("data.workers=0", "tensorboard=false", "device=cpu")),
        *((word, None) for word in ("answers.every=3", "output=b", "spike=0", "data.eval=c")),
        ("gradient_checkpointing=false", None),
        ("run=[finetune, extra]", None),
    ],
)
def test_what_differs_in_a_resumed_run(word, line):
    before = read_settings(None, [*NEEDED, "steps=9"])
    found = difference(before, read_settings(None, [*NEEDED, "steps=9", word]))
    assert (line in found) if line else (found == [])


def test_the_docstrings_name_every_setting():
    for kind in (TrainSettings, StageSettings, LoraSettings, *rules.SECTIONS.values()):
        for field in dataclasses.fields(kind):
            if field.name in rules.SECTIONS:  # has a docstring of its own
                continue
            assert field.name in kind.__doc__.partition("Attributes:")[2], field.name


def test_the_page_has_the_settings_as_they_are():
    page = ROOT / "docs" / "training.md"
    written = runpy.run_path(str(ROOT / "docs" / "write_settings.py"))["write_page"]
    text = page.read_text(encoding="utf-8")
    assert text == written(text), "run python docs/write_settings.py"
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    sample = flatten(TrainSettings(stages={"a": StageSettings()}))
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row[1])}
    assert {name[-1] for name in sample} <= named
    (table,) = re.findall(r"^\| old names .*?\Z", text, re.DOTALL | re.MULTILINE)
    old = [
        name
        for line in table.splitlines()[2:]
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    assert all(flags.is_known(name) for name in old)
    assert set(old) >= {*flags.JOINT, *(name for name in flags.PUBLISHED if "log" not in name)} - {
        *("normalize_type", "use_packed_ds", "loss_reduction_all_gather"),
    }


@pytest.mark.parametrize("name", ["finetune", "lora", "script"])
def test_the_examples_are_valid(name):
    settings = read_settings(ROOT / "examples" / "train" / f"{name}.yaml")
    assert settings.run == (("finetune",) if name != "script" else tuple(presets.STAGES))
