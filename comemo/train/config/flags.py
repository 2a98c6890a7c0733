"""Names of other trainers: transformers' `TrainingArguments` and the published script's flags.

Each is translated into settings of ours, has no effect for a stated reason, or is refused with the
reason. None is ignored silently.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from comemo.safety.settings import shorten
from comemo.train.config.flag_meanings import (
    Given,
    Meaning,
    Path,
    Reader,
    flag,
    mapped,
    model,
    read_deepspeed,
    read_fsdp,
    read_mixin,
    read_reports,
    refused,
    renamed,
    stage,
    switch,
    unused,
)
from comemo.train.config.rules import shown


def _read_train(freeze: Mapping[str, bool]) -> tuple[str, ...]:
    """Which parts the published switches leave to train."""
    language = not freeze.get("freeze_llm", False)
    trained = {
        "vision": not freeze.get("freeze_backbone", False),
        "projector": not freeze.get("freeze_mlp", False),
        # There, the mixin layers are part of the language model.
        "mixin": language or freeze.get("unfreeze_mixin", False),
        "language": language,
    }
    return tuple(part for part, wanted in trained.items() if wanted)


FREEZING = ("freeze_llm", "freeze_backbone", "freeze_mlp", "unfreeze_mixin")
BETAS = ("adam_beta1", "adam_beta2")
_PER_RANK = (
    "packs_per_step counts the packs of a step over all ranks: it is"
    " per_device_train_batch_size x gradient_accumulation_steps x ranks"
)
_BY_STEPS = "only steps are counted: use "
_CHOSEN = "it is chosen by the trainer"
_EVAL: dict[Any, dict[Path, Any]] = {
    "no": {("data", "eval"): None},
    False: {("data", "eval"): None},  # YAML's reading of no
    "steps": {},
}

PUBLISHED: dict[str, Reader] = {
    "model_name_or_path": renamed("start", "checkpoint"),
    "vision_path": renamed("start", "vision"),
    "llm_path": renamed("start", "language"),
    "mlp_path": renamed("start", "projector"),
    "mixin_config_path": read_mixin,
    "freeze_gate": renamed(*stage("freeze_gates")),
    "use_backbone_lora": renamed(*stage("lora", "vision")),
    "use_llm_lora": renamed(*stage("lora", "language")),
    "grad_checkpoint": renamed(*stage("gradient_checkpointing")),
    "drop_path_rate": renamed(*stage("drop_path")),
    "ps_version": model("ps_version"),
    "vision_select_layer": model("select_layer"),
    "force_image_size": model("force_image_size"),
    "down_sample_ratio": model("downsample_ratio"),
    "conv_style": model("template"),
    "max_seq_length": renamed("data", "max_sample_tokens"),
    "meta_path": renamed("data", "train"),
    "use_data_resampling": switch(("data", "mixing"), "sqrt", "length"),
    "use_thumbnail": renamed("data", "use_thumbnail"),
    "min_dynamic_patch": renamed("data", "min_dynamic_patch"),
    "max_dynamic_patch": renamed("data", "max_dynamic_patch"),
    "dynamic_image_size": mapped(
        ("data", "max_dynamic_patch"),
        {
            True: {},
            False: {("data", "min_dynamic_patch"): 1, ("data", "max_dynamic_patch"): 1},
        },
        "wanted true or false",
    ),
    "max_num_frame": renamed("data", "max_frames"),
    "min_num_frame": renamed("data", "min_frames"),
    "pad2square": refused("images are not padded to squares, but cut into tiles"),
    "normalize_type": unused(
        "it is the only one", ("imagenet",), "images are normalised as for ImageNet alone"
    ),
    "use_packed_ds": unused("data is always packed", (True,), "data is always packed"),
    "num_images_expected": renamed("data", "max_tiles"),
    "max_packed_tokens": renamed("data", "max_tokens"),
    "max_buffer_size": renamed("data", "buffer"),
    "strict_mode": refused("packs are never padded with empty images"),
    "replacement": renamed("data", "restart"),
    "allow_overflow": refused("a pack never has more tokens than data.max_tokens"),
    "loss_reduction": renamed("data", "loss_weight"),
    "loss_reduction_all_gather": unused(
        "it is always so", (True,), "the sum of the weights is always that of all ranks"
    ),
    "log_freq": unused("bad samples are reported as they come, packing in every log line"),
}
TRANSFORMERS: dict[str, Reader] = {
    "output_dir": renamed("output"),
    "overwrite_output_dir": unused(
        "an output with checkpoints is resumed; name another output to begin again"
    ),
    "resume_from_checkpoint": unused(
        "the same command resumes its output",
        (None, True, False),
        "the same command resumes its output by itself; begin with start.checkpoint",
    ),
    "num_train_epochs": renamed(*stage("epochs")),
    "max_steps": renamed(*stage("steps")),
    "per_device_train_batch_size": unused(_PER_RANK, (1,)),
    "gradient_accumulation_steps": unused(_PER_RANK, (1,)),
    "per_device_eval_batch_size": unused("evaluation reads one pack at a time"),
    "eval_accumulation_steps": unused("evaluation keeps no outputs"),
    "warmup_ratio": renamed(*stage("warmup")),
    "warmup_steps": renamed(*stage("warmup")),
    "lr_scheduler_type": mapped(
        stage("schedule"),
        {
            "constant": {stage("schedule"): "constant", stage("warmup"): 0.0},
            "constant_with_warmup": {stage("schedule"): "constant"},
            "cosine": {stage("schedule"): "cosine"},
        },
        "schedule must be constant or cosine",
    ),
    "adam_epsilon": renamed(*stage("eps")),
    "optim": unused(
        "AdamW is the optimizer",
        ("adamw_torch", "adamw_torch_fused", "adamw_hf"),
        "AdamW is the only optimizer",
    ),
    "neftune_noise_alpha": renamed(*stage("neftune_alpha")),
    "bf16": switch(stage("precision"), "bfloat16", "float32"),
    "fp16": refused("float16 overflows in this model: precision is bfloat16 or float32"),
    "tf32": refused("TF32 is PyTorch's own setting, not one of a run: use precision"),
    "deepspeed": read_deepspeed,
    "fsdp": read_fsdp,
    "fsdp_config": refused("settings of FSDP are parallel.offload and parallel.replicas"),
    "evaluation_strategy": mapped(("data", "eval"), _EVAL, _BY_STEPS + "eval_every"),
    "eval_strategy": mapped(("data", "eval"), _EVAL, _BY_STEPS + "eval_every"),
    "eval_steps": renamed(*stage("eval_every")),
    "save_strategy": unused("save_every says when", ("steps",), _BY_STEPS + "save_every"),
    "save_steps": renamed(*stage("save_every")),
    "save_total_limit": renamed(*stage("keep")),
    "logging_strategy": unused("log_every says when", ("steps",), _BY_STEPS + "log_every"),
    "logging_steps": renamed(*stage("log_every")),
    "logging_first_step": unused("the first step is always logged"),
    "logging_dir": unused("scalars are in the output's folder tensorboard"),
    "report_to": read_reports,
    "run_name": unused("a run has the name of its output"),
    "dataloader_num_workers": renamed("data", "workers"),
    "group_by_length": refused("samples are packed, so that no length is padded"),
    "train_sampling_strategy": unused(
        "each epoch is shuffled", ("random",), "samples are packed in a shuffled order"
    ),
    "remove_unused_columns": unused("data has no columns"),
    "do_train": unused("that is what the command does", (True,), "`comemo train` trains"),
    "do_eval": unused("data.eval says whether"),
    "do_predict": refused("`comemo train` does not predict: use `comemo chat`"),
    "use_cpu": mapped(("device",), {True: {("device",): "cpu"}, False: {}}, "wanted a switch"),
    "no_cuda": mapped(("device",), {True: {("device",): "cpu"}, False: {}}, "wanted a switch"),
    "data_seed": refused("seed is that of the data too", (None,)),
    "label_smoothing_factor": refused("the loss has no label smoothing"),
    "load_best_model_at_end": refused("the last weights are the result; checkpoints are kept"),
    "gradient_checkpointing_kwargs": unused(_CHOSEN),
    "torch_compile": refused("the model is not compiled in training"),
    "use_liger_kernel": refused("the model has kernels of its own"),
    "average_tokens_across_devices": unused(
        "it is always so", (True,), "the sum of the weights is always that of all ranks"
    ),
    "auto_find_batch_size": refused("packs have a fixed size: lower data.max_tokens"),
    "save_safetensors": unused("it is always so", (True,), "weights are saved as safetensors"),
    "save_only_model": refused("checkpoints can be resumed, which needs the optimizer's state"),
    **dict.fromkeys(
        ("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
        unused(_CHOSEN),
    ),
    **dict.fromkeys(
        ("disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "local_rank"),
        unused("the command decides what is shown"),
    ),
}
_OF_RANKS = unused(_CHOSEN)  # ddp_*
READERS = {**TRANSFORMERS, **PUBLISHED}
JOINT = (*FREEZING, *BETAS)


@functools.cache
def _other_flags() -> frozenset[str]:
    """Flags of the installed transformers that no table here has."""
    from transformers import TrainingArguments

    return frozenset(field.name for field in dataclasses.fields(TrainingArguments))


def is_known(name: str) -> bool:
    """Whether a name is a flag of transformers or of the published script."""
    return name in READERS or name in JOINT or name.startswith("ddp_") or name in _other_flags()


def translate(old: Mapping[str, Given]) -> tuple[dict[Path, Given], list[str], list[str]]:
    """What old names mean here.

    Args:
        old: their values.

    Returns:
        settings: value by full name, as parts; ("stages", "*", ...) is of all stages that run.
        notes: one line for each name.
        faults: one line for each value that asks for what is not done, or two that disagree.
    """
    settings: dict[Path, Given] = {}
    notes: list[str] = []
    faults: list[str] = []
    for name, meaning in _readings(old, faults):
        notes.append(f"{name} {meaning.note}")
        for path, given in meaning.settings.items():
            before = settings.get(path)
            if before is not None and path == ("start", "model"):
                given = Given({**before.value, **given.value})
            elif before is not None and before.value != given.value:
                faults.append(
                    f"{name} makes {shown(path)} {shorten(given.value)}, but another old name makes"
                    f" it {shorten(before.value)}"
                )
            settings[path] = given
    return settings, notes, faults


def _readings(old: Mapping[str, Given], faults: list[str]) -> Iterator[tuple[str, Meaning]]:
    steps = old.get("max_steps", Given(-1)).value
    for name, given in old.items():
        try:
            if name in FREEZING:
                flag(given)
            elif name in BETAS:
                float(given.value)
            elif name == "max_steps" and steps in (-1, 0):
                yield name, Meaning({}, "has no effect: -1 is no number of steps")
            elif name == "num_train_epochs" and steps not in (-1, 0):
                yield name, Meaning({}, "has no effect beside max_steps, as in transformers")
            elif name.startswith("ddp_"):
                yield name, _OF_RANKS(given)
            elif name in READERS:
                yield name, READERS[name](given)
            else:
                raise ValueError(
                    f"got {shorten(given.value)}: this flag of transformers has no counterpart here"
                )
        except (TypeError, ValueError) as error:
            faults.append(f"{name} cannot be followed: {error}")
    yield from _joint_readings(old, faults)


def _joint_readings(old: Mapping[str, Given], faults: list[str]) -> Iterator[tuple[str, Meaning]]:
    """Old names that together make one setting."""
    frozen = {name: given.value for name, given in old.items() if name in FREEZING}
    if frozen and all(isinstance(value, bool) for value in frozen.values()):
        parts = _read_train(frozen)
        note = f"is train: {', '.join(parts) or 'nothing'} here"
        yield ", ".join(frozen), Meaning({stage("train"): Given(parts)}, note)
    betas = {name: given.value for name, given in old.items() if name in BETAS}
    if betas:
        pair = [betas.get(name, usual) for name, usual in zip(BETAS, (0.9, 0.999), strict=True)]
        yield ", ".join(betas), Meaning({stage("betas"): Given(pair)}, f"is betas: {pair} here")
