"""The config of the model that training begins with: from a checkpoint or from two parts."""

import copy
from pathlib import Path
from typing import Any

from comemo import prompts
from comemo.config import UNREADABLE, CoMemoConfig, MixinConfig
from comemo.safety.files import read_json
from comemo.safety.regular import check_checkpoint
from comemo.train.models.parts import Part, weight_files
from comemo.train.settings import StartSettings

# Values of a config that follow from the weights and the tokenizer.
DERIVED = ("text_config", "llm_architecture", "image_token_id", "tie_word_embeddings")


def check_start(settings: StartSettings) -> None:
    """Refuse settings that exclude each other, of a wrong type or unknown."""
    for name in ("checkpoint", "vision", "language", "tokenizer", "projector"):
        value = getattr(settings, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"start.{name}: must be a path, got {value!r}")
    parts = [name for name in ("vision", "language") if getattr(settings, name) is not None]
    if (len(parts) != 2) if settings.checkpoint is None else parts:
        raise ValueError(
            "start: must have either checkpoint, or both vision and language, got"
            f" {['checkpoint'] * (settings.checkpoint is not None) + parts or 'none of them'}"
        )
    for name in ("checkpoint", "vision", "language", "tokenizer"):
        value = getattr(settings, name)
        if value is not None and not Path(value).is_dir():
            raise ValueError(f"start.{name}: there is no directory {value!r}")
    if not isinstance(settings.model, dict):
        raise ValueError(f"start.model: must be values by name, got {settings.model!r}")
    allowed = sorted({*CoMemoConfig.__annotations__, "llm_config"} - {*DERIVED, "sub_configs"})
    for name, value in settings.model.items():
        if name not in allowed:
            raise ValueError(f"start.model: names must be among {allowed}, got {name!r}")
        if name.endswith("_config") and not isinstance(value, dict):
            raise ValueError(f"start.model: {name} must be values by name, got {value!r}")
    known = sorted(MixinConfig.__annotations__)
    for name in settings.model.get("mixin_config", {}):
        if name not in known:
            raise ValueError(f"start.model: names in mixin_config must be of {known}, got {name!r}")


def checkpoint_config(settings: StartSettings) -> tuple[CoMemoConfig, int | None]:
    """The config of a checkpoint at its own image size, and the size that is wanted."""
    directory = str(settings.checkpoint)
    check_checkpoint(directory)
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"start.checkpoint: {directory!r} must hold a config.json")
    weight_files("start.checkpoint", directory)
    content = read_json(directory, "config.json")
    given = dict(settings.model)
    side = given.pop("force_image_size", None)
    if "rope_scaling" in given:
        scaling = {"rope_scaling": given.pop("rope_scaling")}
        given["llm_config"] = given.get("llm_config", {}) | scaling
    if "llm_config" in given:
        content.pop("text_config", None)  # the same in other words
    for name, value in given.items():
        nested = isinstance(value, dict) and isinstance(content.get(name), dict)
        content[name] = content[name] | value if nested else value
    config = CoMemoConfig.from_dict(content)
    prompts.stop_text(config.template)  # an unknown one is an error
    _check_side(side)
    return config, side


def parts_config(
    vision: Part, language: Part, given: dict[str, Any]
) -> tuple[CoMemoConfig, int | None]:
    """The config of parts at the vision tower's own image size, and the size that is wanted."""
    given = copy.deepcopy(given)
    side = given.pop("force_image_size", None)
    side = vision.settings.get("force_image_size") if side is None else side
    _check_side(side)
    llm = language.config | given.pop("llm_config", {})
    if "rope_scaling" in given:
        llm["rope_scaling"] = given.pop("rope_scaling")
    mixin = given.pop("mixin_config", {})
    mixin = _mixin_sizes(llm, mixin.get("head_dim")) | mixin
    tower = vision.config | given.pop("vision_config", {})
    settings = {"template": language.settings.get("template"), **vision.settings}
    settings.pop("force_image_size", None)
    if settings["template"] not in prompts.TEMPLATES:
        del settings["template"]
    try:
        config = CoMemoConfig(
            llm_config=llm, vision_config=tower, mixin_config=mixin, **(settings | given)
        )
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"start.model: the config cannot be made: {reason}") from error
    prompts.stop_text(config.template)  # an unknown one is an error
    if not config.mixin_layers:
        raise ValueError(
            "start.model: mixin_every_n_layers of mixin_config must be at most the language model's"
            f" {config.text_config.num_hidden_layers} layers, got"
            f" {config.mixin_config.mixin_every_n_layers}"
        )
    return config, side


def _check_side(side: Any) -> None:
    if side is not None and (not isinstance(side, int) or isinstance(side, bool) or side < 1):
        raise ValueError(f"start.model: force_image_size must be a number of pixels, got {side!r}")


def _mixin_sizes(llm: dict[str, Any], head_dim: Any) -> dict[str, Any]:
    """Sizes of mixin layers for a language model, as published: heads of 128, its own FFN width."""
    width, heads = llm.get("hidden_size"), llm.get("num_attention_heads")
    if not all(isinstance(size, int) and size > 0 for size in (width, heads)):
        raise ValueError(
            "start.language: config.json must have hidden_size and num_attention_heads, got"
            f" {width!r} and {heads!r}"
        )
    assert isinstance(width, int)
    assert isinstance(heads, int)
    theirs = llm.get("head_dim")
    own = theirs if isinstance(theirs, int) and theirs > 0 else width // heads
    own = 128 if width % 128 == 0 else own
    head_dim = head_dim if isinstance(head_dim, int) and head_dim > 0 else own
    return {
        "language_dim": width,
        "vision_dim": width,
        "head_dim": head_dim,
        "num_heads": max(width // head_dim, 1),
        "intermediate_size": llm.get("intermediate_size", 4 * width),
    }
