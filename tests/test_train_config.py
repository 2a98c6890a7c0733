"""Settings of training: files, command lines, presets, old names, and every kind of mistake."""

import contextlib
import dataclasses
import os
import re
import runpy
import shlex
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from comemo.config import PUBLISHED_BEHAVIOUR
from comemo.train import config
from comemo.train.config import (
    SettingsError,
    difference,
    flags,
    presets,
    read_settings,
    rules,
    write_settings,
)
from comemo.train.config.layers import SettingsNote, flatten
from comemo.train.settings import LoraSettings, StageSettings, TrainSettings

ROOT = Path(__file__).parents[1]
BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
NEEDED = ["output=runs/a", "data.train=a.jsonl", "start.checkpoint=model"]
PARTS = ["output=runs/a", "data.train=a.jsonl", "start.vision=v", "start.language=l"]
# The published finetuning script, all its flags.
FINETUNE = shlex.split("""--model_name_or_path model --conv_style internlm2-chat --output_dir runs/a
--meta_path a.jsonl --overwrite_output_dir True --force_image_size 448 --down_sample_ratio 0.5
--drop_path_rate 0.1 --pad2square False --freeze_llm False --freeze_mlp False
--freeze_backbone False --vision_select_layer -1 --use_data_resampling False
--dataloader_num_workers 4 --bf16 True --num_train_epochs 1 --max_steps 9000
--per_device_train_batch_size 1 --gradient_accumulation_steps 1 --evaluation_strategy no
--save_strategy steps --save_steps 500 --save_total_limit 5 --learning_rate 4e-5
--weight_decay 0.01 --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1
--max_seq_length 8192 --do_train True --grad_checkpoint True --group_by_length False
--dynamic_image_size True --use_thumbnail True --ps_version v2
--deepspeed zero_stage1_config.json --report_to tensorboard --use_packed_ds True
--num_images_expected 48 --max_packed_tokens 16384 --max_buffer_size 20 --log_freq 1000
--strict_mode False --replacement False --allow_overflow False --remove_unused_columns False
--loss_reduction square --loss_reduction_all_gather True""")
# What the second pretraining script has in place of some of these.
FIXED_GATES = shlex.split("""--freeze_llm True --freeze_backbone True --unfreeze_mixin True
--freeze_gate True --max_steps 10000 --learning_rate 1e-4
--lr_scheduler_type constant_with_warmup""")


@pytest.fixture
def write(tmp_path):
    def written(text):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return file

    return written


def faults_of(*words, file=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SettingsNote)
        with pytest.raises(SettingsError) as raised:
            read_settings(file, words)
    assert all(fault in str(raised.value) for fault in raised.value.faults)
    return raised.value.faults


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


# --- mistakes ---


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


# --- old names ---


def read_noted(words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = read_settings(None, words)
    return settings, [str(warning.message).removeprefix("read_settings: ") for warning in caught]


def test_the_published_scripts_give_the_preset():
    read, notes = read_noted(FINETUNE)
    wanted = read_settings(None, ["preset=script", "run=finetune", *NEEDED])
    assert difference(wanted, read) == [
        "start.model: {} -> {'template': 'internlm2-chat', 'force_image_size': 448,"
        " 'downsample_ratio': 0.5, 'select_layer': -1, 'ps_version': 'v2'}",
        "data.use_thumbnail: None -> True",
        "data.published_pixels: True -> False",  # what no flag says
        "data.published_text: True -> False",
    ]
    assert read.stages["finetune"].keep == 5
    names = [word[2:] for word in FINETUNE if word.startswith("--")]
    same = {"learning_rate", "weight_decay"}
    noted = [name for note in notes for name in note.partition(" ")[0].split(",") if name]
    assert all(any(name in note for note in notes) for name in set(names) - same)
    assert len(noted) == len(set(noted))
    read, _ = read_noted([*FINETUNE, *FIXED_GATES, "run=pretrain_fixed_gates"])
    wanted = read_settings(None, ["preset=script", "run=pretrain_fixed_gates", *NEEDED])
    assert [line.split(":")[0] for line in difference(wanted, read)] == [
        "start.model",
        "data.use_thumbnail",
        "data.published_pixels",
        "data.published_text",
    ]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("warmup_steps=10", "stages.finetune.warmup", 10.0),
        ("lr_scheduler_type=constant", "stages.finetune.warmup", 0.0),
        ("max_steps=-1 num_train_epochs=2", "stages.finetune.epochs", 2.0),
        ("max_steps=20 num_train_epochs=2", "stages.finetune.steps", 20),
        ("adam_beta2=0.95", "stages.finetune.betas", (0.9, 0.95)),
        ("bf16=False", "stages.finetune.precision", "float32"),
        ("deepspeed=zero0", "shard_optimizer", False),
        ("deepspeed={zero_optimization: {stage: 1}}", "shard_optimizer", True),
        ("report_to=none", "tensorboard", False),
        ("no_cuda=True", "device", "cpu"),
        ("use_data_resampling=True", "data.mixing", "sqrt"),
        ("dynamic_image_size=False", "data.max_dynamic_patch", 1),
        ("freeze_backbone=True", "stages.finetune.train", ("projector", "mixin", "language")),
        ("freeze_llm=True", "stages.finetune.train", ("vision", "projector")),
        ("use_llm_lora=16", "stages.finetune.lora.language", 16),
        ("neftune_noise_alpha=5", "stages.finetune.neftune_alpha", 5.0),
        ("stages.finetune.warmup_ratio=0.1", "stages.finetune.warmup", 0.1),
        ("data.max_packed_tokens=99", "data.max_tokens", 99),
        ("evaluation_strategy=steps data.eval=b.jsonl", "data.eval", "b.jsonl"),
    ],
)
def test_an_old_name_is_translated(words, name, value):
    words = words.split(" ") if "{" not in words else [words]
    needed = [] if {"max_steps", "num_train"} & {word[:9] for word in words} else ["steps=15"]
    settings, notes = read_noted([*NEEDED, *needed, *words])
    found = flatten(settings)[tuple(name.split("."))]
    assert (type(found), found) == (type(value), value)
    assert notes


def test_files_that_old_names_point_to(tmp_path, golden):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert "ZeRO-1" in faults_of(*NEEDED, "steps=1", f"deepspeed={tmp_path / 'zero.json'}")[0]
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    words = [*NEEDED, "steps=1", f"deepspeed={tmp_path / 'zero.json'}"]
    assert read_noted(words)[0].shard_optimizer
    (tmp_path / "config.json").write_text('{"num_heads": 4, "head_dim": 8, "type": "x"}')
    settings, _ = read_noted([*PARTS, "steps=1", f"mixin_config_path={tmp_path}"])
    assert settings.start.model == {"mixin_config": {"num_heads": 4, "head_dim": 8}}
    assert "No such file" in faults_of(*PARTS, "steps=1", "mixin_config_path=/no/such")[0]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("fp16=True", "precision"),
        ("deepspeed=zero_stage3_config.json", "shard_optimizer"),
        ("strict_mode=True", "never padded"),
        ("allow_overflow=True", "data.max_tokens"),
        ("pad2square=True", "tiles"),
        ("use_packed_ds=False", "always packed"),
        ("per_device_train_batch_size=4", "packs_per_step"),
        ("gradient_accumulation_steps=2", "packs_per_step"),
        ("group_by_length=True", "packed"),
        ("optim=adafactor", "AdamW"),
        ("lr_scheduler_type=linear", "constant or cosine"),
        ("report_to=wandb", "TensorBoard"),
        ("save_strategy=epoch", "save_every"),
        ("eval_strategy=epoch", "eval_every"),
        ("fsdp=full_shard", "shard_optimizer"),
        ("label_smoothing_factor=0.1", "label smoothing"),
        ("freeze_llm=3", "must be true or false, got 3"),
        ("evaluation_strategy=no data.eval=b.jsonl", "data.eval is there twice"),
        ("warmup_ratio=0.1 warmup=0.2", "warmup is there twice"),
        ("warmup_ratio=0.1 lr_scheduler_type=constant", "another old name makes it"),
        ("data.warmup_ratio=0.1", "is not a setting of data"),
    ],
)
def test_what_is_not_done_is_refused(word, said):
    (fault,) = faults_of(*NEEDED, "steps=15", *word.split())
    assert said in fault


def test_every_flag_of_transformers_is_translated_or_refused_by_name():
    """Also those that are not in the tables, of any release."""
    for field in dataclasses.fields(TrainingArguments):
        name = field.name
        if ("stages", "x", name) in flatten(TrainSettings(stages={"x": StageSettings()})):
            continue
        if name in {field.name for field in dataclasses.fields(TrainSettings)}:
            continue
        for value in ("true", "1", "steps"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    read_settings(None, [*NEEDED, "stages.finetune.steps=9", f"{name}={value}"])
                    said = [str(warning.message) for warning in caught]
                except SettingsError as error:
                    said = error.faults
            assert all("is not a setting" not in text for text in said), name
            assert said, name


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
