"""Mistakes in settings of training: each is named, all of a file are listed together."""

import contextlib
import os
import warnings

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from train_settings import NEEDED, faults_of, write  # noqa: F401

from comemo.train import config
from comemo.train.config import (
    SettingsError,
    flags,
    read_settings,
    rules,
    write_settings,
)
from comemo.train.config.layers import SettingsNote, flatten
from comemo.train.settings import StageSettings, TrainSettings

BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("learning_rat=1", "learning_rat is not a setting: did you mean learning_rate?"),
        ("checkpoint=a", "checkpoint is not a setting: did you mean start.checkpoint?"),
        ("data.max_token=1", "did you mean data.max_tokens"),
        ("stages.finetune.step=1", "did you mean stages.finetune.steps"),
        ("stages.finetun.steps=1", "finetun is neither in run nor one of pretrain"),
        ("steps=true", "steps must be null or a whole number, at least 1, got 'true'"),
        ("steps=1.5", "steps must be null or a whole number, at least 1, got '1.5'"),
        ("steps=0", "at least 1, got '0'"),
        ("learning_rate=nan", "learning_rate must be a number of at least 0, got 'nan'"),
        ("learning_rate=.inf", "got '.inf'"),
        ("warmup=1.5", "warmup must be a share of the steps below 1, or a whole number"),
        ("warmup=9", "stages.finetune.warmup must be at most its 5 steps, got 9"),
        ("drop_path=1", "drop_path must be a number of at least 0 and below 1, got '1'"),
        ("betas=[0.9]", "betas must be two numbers from 0 to below 1, got"),
        ("train=visoin", "train must be some of vision, projector, mixin, language, each once"),
        ("train=[]", "nothing is trained"),
        ("spike=0.5", "0 for never, or a number above 1"),
        ("schedule=linear", "schedule must be one of constant, cosine, got 'linear'"),
        ("precision=fp16", "precision must be one of auto, float32, bfloat16"),
        ("freeze_gates=1", "freeze_gates must be true or false, got '1'"),
        ("data.mixing={a: -1}", "data.mixing must be length, sqrt, or a weight"),
        ("data.mixing={a: 0}", "not all of them 0"),
        ("data.mixing=linear", "data.mixing must be length, sqrt"),
        ("data.workers=-1", "data.workers must be a whole number, at least 0 and at most 1,024"),
        ("data.min_dynamic_patch=13", None),
        ("data=5", "data must be names and values, got '5'"),
        ("epochs=1", "stages.finetune.steps excludes stages.finetune.epochs, got 5 and 1"),
        ("start.vision=v", "start.checkpoint excludes start.vision"),
        ("start.checkpoint=null", "start needs a checkpoint, or vision and language"),
        ("output=", "output must be a directory"),
        ("data.train=", "data.train must be a meta file or a JSONL file"),
        ("run=[finetune, finetune]", "run must be names of stages, each once"),
        ("run=[a/b]", "run must name stages by letters"),
        ("run=[Model]", "the run has a folder of that name"),
        ("answers.ask.question=a", "answers.ask.question is not a setting"),
        ("seed=-1", "seed must be a whole number, at least 0"),
        ("device=cuda:1", "device must be one of auto, cpu, cuda"),
        ("preset=scripts", "preset must be null or one of script, paper"),
        ("answers.ask=[What?]", "answers.ask must be a list of questions"),
        ("answers.ask=[{question: a, picture: b}]", "answers.ask must be a list of questions"),
        ("start.model.tile_ordr=row", "did you mean tile_order?"),
        ("start.model.tile_order=diagonal", "start.model.tile_order must be one of row, column"),
        ("start.model.max_dynamic_patch=0", "start.model.max_dynamic_patch must be a whole number"),
        ("start.model.text_config={}", "start.model.text_config is not a setting"),
        ("start.model.mixin_config.num_head=4", "did you mean num_heads"),
        ("start.model.mixin_config.num_heads=0", "mixin_config.num_heads must be a whole number"),
        ("start.model=row", "start.model must be a mapping of names to values"),
        ("data.seed=1", "data.seed is not a setting: did you mean seed?"),
        ("data.learning_rate=1", "did you mean learning_rate"),
        ("foo", "wanted name=value or --name value, got 'foo'"),
    ],
)
def test_a_mistake_is_named(word, said):
    words = ["steps=5", *NEEDED, word]
    if said is None:  # alone it is right: the model may allow more
        assert read_settings(None, words).data.min_dynamic_patch == 13
        said = "data.min_dynamic_patch must be at most data.max_dynamic_patch 12, got 13"
        words.append("data.max_dynamic_patch=12")
    (fault,) = faults_of(*words)
    assert said in fault


def test_restart_has_no_epochs():
    assert (
        "data.restart excludes stages.finetune.epochs"
        in faults_of(*NEEDED, "epochs=1", "data.restart=true")[0]
    )


def test_all_mistakes_are_listed_together(write):
    file = write("seed: x\ndata: {tarin: a}\nstages: {finetune: {steps: 0}, pretran: {steps: 1}}\n")
    faults = faults_of("--keep", "0", "fp16=true", file=file)
    wanted = ["data.tarin", "stages.pretran", "stages.finetune.steps", "keep", "fp16", "seed"]
    assert [next(name for name in wanted if name in fault) for fault in faults]
    assert len(faults) == len(wanted)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "'a' is there twice"),
        ("data: {train: a, train: b}", "'train' is there twice"),
        ("a: [1", "is not YAML"),
        ("- a", "must hold names and values"),
        ("", "must hold names and values"),
        ("a: !!python/object/apply:os.system [true]", "is not YAML"),
        ("? [a]\n: 1", "not"),
        ("1: 2\n", "names must be texts, got 1"),
        ("stages: {1: {steps: 2}}", "names must be texts, got 1 in stages"),
        ("stages: [finetune]", "stages must be names and values"),
        ("a: " + "[" * 500, "is not YAML"),
        ("a: 2001-99-99", "is not YAML"),
        ("a: &a [*a]", "more than 100,000 values"),
        (BOMB, "more than 100,000 values"),
        ("#" * 2**20 + "#", "must have at most 1,048,576 bytes"),
    ],
)
def test_files_that_are_not_settings(write, text, said):
    with pytest.raises(ValueError, match="read_settings") as raised:
        read_settings(write(text))
    assert said in str(raised.value)


def test_stages_may_share_values_by_anchors(write):
    file = write(
        "output: a\nstart: {checkpoint: m}\ndata: {train: a.jsonl}\nstages:\n"
        "  pretrain: &all {steps: 3, keep: 4}\n  finetune: {<<: *all, keep: 5}\n"
    )
    stages = read_settings(file).stages
    assert [(stage.steps, stage.keep) for stage in stages.values()] == [(3, 4), (3, 5)]


def test_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a pipe"):
        read_settings(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not YAML"):
        read_settings(tmp_path / "binary.yaml")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
NAMES = [".".join(name) for name in flatten(TrainSettings(stages={"finetune": StageSettings()}))]
NAMES += [name.removeprefix("stages.finetune.") for name in NAMES if "finetune" in name]


def test_any_value_is_read_or_refused(tmp_path):
    """Whatever a file has under any name: settings that are valid, or a `SettingsError`."""
    names = st.sampled_from([*NAMES, *flags.READERS, *flags.JOINT, "data", "stages", "x"])

    @given(st.dictionaries(names, VALUES, max_size=3))
    def holds(content):
        file = tmp_path / "a.yaml"
        file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        with warnings.catch_warnings(), contextlib.suppress(SettingsError):
            warnings.simplefilter("ignore", SettingsNote)
            config.check_settings(read_settings(file, ["steps=3", *NEEDED]))

    holds()


def test_settings_made_in_a_program_are_checked():
    settings = read_settings(None, ["steps=5", *NEEDED])
    settings.data.max_tokens, settings.stages["finetune"].train = -1, ("visoin",)
    with pytest.raises(SettingsError) as raised:
        config.check_settings(settings)
    assert [fault.split()[0] for fault in raised.value.faults] == [
        "data.max_tokens",
        "stages.finetune.train",
    ]


def test_every_setting_has_a_rule_or_needs_none():
    """A number or a text without a rule would be taken as it is."""
    free = {"data.train", "start.model", "stage.unfreeze_vit_layers"}
    free |= {f"data.{name}" for name in ("restart", "use_thumbnail")}
    for name in flatten(TrainSettings(stages={"a": StageSettings()})):
        kind = str(rules.kind_of(name))
        if "bool" not in kind and rules.rule_name(name) not in free:
            assert rules.rule_name(name) in rules.RULES, name


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    settings = read_settings(None, ["steps=5", *NEEDED])
    file = tmp_path / "a.yaml"
    file.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_settings(settings, file)
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
    assert file.read_text() == "old"
