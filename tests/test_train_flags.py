"""Names of other trainers: translated into settings, or refused with the reason."""

import dataclasses
import shlex
import warnings

import pytest
from train_settings import NEEDED, PARTS, faults_of
from transformers import TrainingArguments

from comemo.train.config import (
    SettingsError,
    difference,
    read_settings,
)
from comemo.train.config.layers import flatten
from comemo.train.settings import StageSettings, TrainSettings

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
    words = [*NEEDED, "steps=1", f"deepspeed={tmp_path / 'zero.json'}"]
    assert read_noted(words)[0].parallel.plan == "fsdp"
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert "ZeRO-1" in faults_of(*NEEDED, "steps=1", f"deepspeed={tmp_path / 'zero.json'}")[0]
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    words = [*NEEDED, "steps=1", f"deepspeed={tmp_path / 'zero.json'}"]
    assert read_noted(words)[0].shard_optimizer
    (tmp_path / "config.json").write_text('{"num_heads": 4, "head_dim": 8, "type": "x"}')
    settings, _ = read_noted([*PARTS, "steps=1", f"mixin_config_path={tmp_path}"])
    assert settings.start.model == {"mixin_config": {"num_heads": 4, "head_dim": 8}}
    assert "No such file" in faults_of(*PARTS, "steps=1", "mixin_config_path=/no/such")[0]


@pytest.mark.parametrize(
    ("word", "offload"), [("full_shard auto_wrap", False), ("full_shard offload", True)]
)
def test_fsdp_of_transformers_is_a_plan(word, offload):
    settings, _ = read_noted([*NEEDED, "steps=1", f"fsdp={word}"])
    assert (settings.parallel.plan, settings.parallel.offload) == ("fsdp", offload)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("fp16=True", "precision"),
        ("deepspeed=zero_stage2_config.json", "shard_optimizer"),
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
        ("fsdp=hybrid_shard", "parallel.replicas"),
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
