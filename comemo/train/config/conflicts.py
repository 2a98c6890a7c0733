"""Settings that are valid one by one: what is missing among them, and what excludes what."""

import re
from collections.abc import Mapping
from typing import Any

from comemo.config import CoMemoConfig
from comemo.safety import settings as checks
from comemo.safety.settings import CHOICES, as_text, shorten
from comemo.train.config.rules import suggest
from comemo.train.settings import DataSettings, StageSettings, TrainSettings

STAGE_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
FOLDERS = ("model", "index", "tensorboard")  # of a run, beside those of its stages


def model_faults(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with `start.model`, by names, choices and ranges.

    Args:
        given: values of `CoMemoConfig` by name.
    """
    faults = []
    names = settable_names()
    for name, value in given.items():
        place = f"start.model.{name}"
        if name not in names:
            near = suggest(str(name), names)
            faults.append(f"{place} is not a setting of CoMemoConfig{near}")
        elif name in CHOICES and value not in CHOICES[name]:
            wanted = ", ".join(CHOICES[name])
            faults.append(f"{place} must be one of {wanted}, got {shorten(value)}")
        elif name == "mixin_config":
            faults += _mixin_faults(value)
        else:
            rule = checks.WHOLE.get(name)
            if rule is not None and not rule[1](value):
                faults.append(f"{place} must be {as_text(rule[0])}, got {shorten(value)}")
    return faults


def settable_names() -> set[str]:
    """Names of `CoMemoConfig` that `start.model` may set: not its parts, which have checkpoints."""
    return set(CoMemoConfig.__annotations__) - {"text_config", "vision_config", "llm_architecture"}


def _mixin_faults(given: Any) -> list[str]:
    place = "start.model.mixin_config"
    if not isinstance(given, dict):
        return [f"{place} must be a mapping of names to values, got {shorten(given)}"]
    faults = []
    for name, value in given.items():
        rule = checks.MIXIN.get(name)
        if rule is None:
            faults.append(f"{place}.{name} is not a setting{suggest(str(name), checks.MIXIN)}")
        elif not rule[1](value):
            faults.append(f"{place}.{name} must be {as_text(rule[0])}, got {shorten(value)}")
    return faults


def conflicts(settings: TrainSettings) -> list[str]:
    """What is missing in settings, or excludes each other.

    Args:
        settings: whose values are valid one by one.

    Returns:
        One line for each fault.
    """
    faults = _missing(settings) + model_faults(settings.start.model)
    faults += parallel_faults(settings)
    data = settings.data
    for low, high in (("min_dynamic_patch", "max_dynamic_patch"), ("min_frames", "max_frames")):
        least, most = getattr(data, low), getattr(data, high)
        if least is not None and most is not None and least > most:
            faults.append(f"data.{low} must be at most data.{high} {most}, got {least}")
    for name in settings.run:
        if not STAGE_NAME.fullmatch(name):
            faults.append(f"run must name stages by letters, digits, _ and -, got {name!r}")
        elif name.lower() in FOLDERS:
            faults.append(f"run must not name a stage {name!r}: the run has a folder of that name")
        elif name not in settings.stages:
            faults.append(f"run names the stage {name!r}, which stages does not have")
        else:
            faults += _stage_faults(name, settings.stages[name], data)
    return faults


def parallel_faults(settings: TrainSettings) -> list[str]:
    """What excludes what among the settings of several ranks."""
    own, faults = settings.parallel, []
    if own.context > 1:
        faults.append(
            f"parallel.context must be 1, got {own.context}: tokens of a pack read spans of the"
            " image memory and samples of any length, which no library divides among ranks yet;"
            " parallel.tensor, a smaller data.max_tokens and gradient_checkpointing need less"
            " memory for each pack"
        )
    needing = {
        "tensor": own.tensor > 1,
        "replicas": own.replicas > 1,
        "offload": own.offload,
        "checkpoints": own.checkpoints == "sharded",
    }
    if own.plan != "fsdp":
        names = [f"parallel.{name}" for name, needs in needing.items() if needs]
        if names:
            faults.append(f"{', '.join(names)} need parallel.plan fsdp, got {own.plan}")
    for name in settings.run:
        lora = settings.stages[name].lora if name in settings.stages else None
        if own.tensor > 1 and lora and (lora.vision or lora.language or lora.mixin):
            faults.append(
                f"parallel.tensor excludes stages.{name}.lora: adapters train with parallel.plan"
                " fsdp alone, which divides their layers, too"
            )
    return faults


def _missing(settings: TrainSettings) -> list[str]:
    faults, start = [], settings.start
    parts = [name for name in ("vision", "language") if getattr(start, name) is not None]
    if start.checkpoint is not None and parts:
        faults.append(
            f"start.checkpoint excludes start.{' and start.'.join(parts)}: a checkpoint has all"
            " parts"
        )
    elif start.checkpoint is None and len(parts) < 2:
        faults.append("start needs a checkpoint, or vision and language to begin with parts")
    if not settings.output:
        faults.append("output must be a directory for the results, got nothing")
    if not settings.data.train:
        faults.append("data.train must be a meta file or a JSONL file, got nothing")
    if not settings.run:
        faults.append("run must name at least one stage, got nothing")
    return faults


def _stage_faults(name: str, stage: StageSettings, data: DataSettings) -> list[str]:
    faults, place = [], f"stages.{name}"
    if stage.steps is not None and stage.epochs is not None:
        faults.append(
            f"{place}.steps excludes {place}.epochs, got {stage.steps} and {stage.epochs:g}"
        )
    if stage.steps is None and stage.epochs is None:
        faults.append(f"{place} needs steps or epochs")
    if data.restart and stage.epochs is not None:
        faults.append(
            f"data.restart excludes {place}.epochs, because datasets that begin again have no"
            " common end: give steps"
        )
    lora = (stage.lora.vision, stage.lora.language, stage.lora.mixin)
    if not (stage.train or any(lora) or stage.unfreeze_lm_head or stage.unfreeze_vit_layers):
        faults.append(f"{place}.train must name a part, or lora give a rank: nothing is trained")
    if stage.steps is not None and stage.warmup >= 1 and stage.warmup > stage.steps:
        faults.append(
            f"{place}.warmup must be at most its {stage.steps:,} steps, got {stage.warmup:g}"
        )
    return faults
