"""Models of a run: what a stage begins with, what it writes, what comes out."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers import initialization as init

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.processor import CoMemoProcessor
from comemo.train import ranks
from comemo.train.models.adapters import add_adapters, load_adapters, merge_adapters, save_adapters
from comemo.train.models.drop_path import set_drop_path
from comemo.train.models.freezing import choose_trainable
from comemo.train.models.start import start_model
from comemo.train.parallel.plan import Sharing, check_model
from comemo.train.parallel.shard import shard_model
from comemo.train.parallel.state import fill, is_in_parts, read_whole
from comemo.train.settings import StageSettings
from comemo.train.stage import Stage, start_of

ADAPTER = "adapter"  # folder in a checkpoint of a stage with adapters


def trainable_model(
    stage: Stage, precision: str
) -> tuple[CoMemoForConditionalGeneration, CoMemoProcessor]:
    """The model that a stage trains, at its checkpoint or at its beginning.

    Args:
        stage: whose earlier stages are finished.
        precision: "float32" or "bfloat16", what it will be computed in; see `narrow_frozen`.

    Raises:
        ValueError, OSError: see `start_model`, `load_adapters`, `choose_trainable`.
    """
    own, checkpoint = stage.settings, stage.checkpoint
    if checkpoint is not None and not has_lora(own):
        model, processor = _read(checkpoint)
    else:
        model, processor = _base(stage)
        if has_lora(own):
            add_adapters(model, own.lora, stage.seed)
        if checkpoint is not None:
            load_adapters(model, checkpoint / ADAPTER)
    choose_trainable(model, own)
    set_drop_path(model, own.drop_path)
    if precision == "bfloat16":
        narrow_frozen(model)
    return model, processor


@torch.no_grad()
def divided_model(
    stage: Stage, sharing: Sharing, precision: str, device: torch.device
) -> tuple[Any, CoMemoProcessor]:
    """`trainable_model` divided among the ranks. All ranks must call.

    The first rank has the whole model on the CPU for a moment, others only their part. A checkpoint
    in parts is not read yet: `DividedStates.read` does that, together with the optimizer's state.

    Args:
        stage: whose earlier stages are finished.
        sharing: a plan that is sharded.
        precision: "float32" or "bfloat16".
        device: of this rank.

    Raises:
        ValueError, OSError: as `trainable_model`; layers that the ranks cannot divide.
    """
    own, checkpoint, offload = stage.settings, stage.checkpoint, stage.run.parallel.offload
    in_parts = checkpoint is not None and is_in_parts(checkpoint)
    whole: Any = None

    def read() -> tuple[Any, ...]:
        nonlocal whole
        if in_parts:
            assert checkpoint is not None
            model, processor = _skeleton_of(checkpoint), CoMemoProcessor.from_pretrained(checkpoint)
        else:
            model, processor = trainable_model(stage, "float32")
            whole = model
        check_model(sharing, model.config)
        return model.config, model.generation_config, processor

    config, generation, processor = ranks.on_first(read)
    with torch.device("meta"), init.no_init_weights():
        model = CoMemoForConditionalGeneration(config)
        if has_lora(own):
            add_adapters(model, own.lora, stage.seed)
    model.generation_config = generation
    choose_trainable(model, own)
    set_drop_path(model, own.drop_path)
    shard_model(model, sharing, precision, offload)
    place = torch.device("cpu") if offload else device
    if in_parts:
        model.to_empty(device=place)
    else:
        fill(model, whole, place, sharing.tensor)
    return model, processor


def _skeleton_of(folder: Path) -> CoMemoForConditionalGeneration:
    """The model of a checkpoint without weights."""
    with torch.device("meta"), init.no_init_weights():
        model = CoMemoForConditionalGeneration(CoMemoConfig.from_pretrained(folder))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def narrow_frozen(model: nn.Module) -> None:
    """Keep frozen weights of linear layers in bfloat16, where that loses nothing.

    Autocast rounds them to it in any case, for each use: the same numbers come out, from half the
    memory. Trained weights stay in float32, and so do embeddings and norms, which autocast leaves.
    """
    for module in model.modules():
        if type(module) is not nn.Linear:
            continue
        for parameter in module.parameters(recurse=False):
            narrow = parameter.data.to(torch.bfloat16)
            if not parameter.requires_grad and torch.equal(narrow.to(parameter.dtype), parameter):
                parameter.data = narrow


def save_stage(
    stage: Stage,
    model: CoMemoForConditionalGeneration,
    processor: CoMemoProcessor,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint's weights: all, or those of adapters and what is trained beside them.

    Args:
        stage, model, processor: what is trained.
        folder: exists.
        weights: gathered ones; None for those of the model, empty if all ranks write their parts.
    """
    if has_lora(stage.settings):
        save_adapters(model, folder / ADAPTER, weights)
    else:
        save_model(model, processor, folder, weights)


def save_model(
    model: CoMemoForConditionalGeneration,
    processor: CoMemoProcessor,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint in the published layout, with all that a chat needs; see `save_stage`."""
    if weights is None:
        model.save_pretrained(folder)
    elif weights:
        model.save_pretrained(folder, state_dict=weights)
    else:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def trained_by(stage: Stage) -> tuple[CoMemoForConditionalGeneration, CoMemoProcessor]:
    """The model after a finished stage, in float32, its adapters added to the weights."""
    assert stage.checkpoint is not None
    if not has_lora(stage.settings):
        return _read(stage.checkpoint)
    model, processor = _base(stage)
    add_adapters(model, stage.settings.lora, stage.seed)
    load_adapters(model, stage.checkpoint / ADAPTER)
    return merge_adapters(model), processor


def has_lora(settings: StageSettings) -> bool:
    """Whether a stage trains adapters."""
    lora = settings.lora
    return bool(lora.vision or lora.language or lora.mixin)


def _base(stage: Stage) -> tuple[CoMemoForConditionalGeneration, CoMemoProcessor]:
    """The model before a stage."""
    if stage.before:
        return trained_by(stage.before[-1])
    return start_model(start_of(stage.run), seed=stage.run.seed)


def _read(folder: Path) -> tuple[CoMemoForConditionalGeneration, CoMemoProcessor]:
    if is_in_parts(folder):
        divided = _skeleton_of(folder).to_empty(device="cpu")
        read_whole(folder, divided)
        return divided.eval(), CoMemoProcessor.from_pretrained(folder)
    model = CoMemoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model, CoMemoProcessor.from_pretrained(folder)
