"""The model that training begins with: a checkpoint, or a vision tower and a language model."""

import copy
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AddedToken, PreTrainedTokenizerBase
from transformers import initialization as init

from comemo import prompts
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import UNREADABLE, CoMemoConfig, MixinConfig
from comemo.image_processor import CoMemoImageProcessor, settings_of
from comemo.processing.tokenizer_files import missing_tokens, read_tokenizer
from comemo.processor import CoMemoProcessor
from comemo.safety.files import read_json
from comemo.safety.regular import check_checkpoint
from comemo.train.embeddings import fit_vocabulary, resize_tiles
from comemo.train.loading import copy_weights, find_faults
from comemo.train.parts import (
    Part,
    Weight,
    read_language,
    read_projector,
    read_vision,
    weight_files,
)
from comemo.train.settings import StartSettings

log = logging.getLogger(__name__)

IMAGE_TOKENS = (prompts.IMAGE_START, prompts.IMAGE_END, prompts.IMAGE_CONTEXT)
REGION_TOKENS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
PROJECTOR, MIXIN = "model.multi_modal_projector.", re.compile(r"\.layers\.\d+\.mixin\.")
# Values of a config that follow from the weights and the tokenizer.
DERIVED = ("text_config", "llm_architecture", "image_token_id", "tie_word_embeddings")


def start_model(
    settings: StartSettings, *, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[CoMemoForConditionalGeneration, CoMemoProcessor]:
    """Make the model that training begins with, on the CPU.

    New mixin layers have gates of 0: the model answers as the language model would that sees the
    image tokens alone. Where the tokenizer lacks control tokens, they are added, and the
    vocabulary grows, see `fit_vocabulary`. No code of any directory is run.

    Args:
        settings: what to begin with. A `vision` that is a whole InternVL or CoMemo also gives the
            projector, if it fits the language model, and how tiles are read and cut.
        seed: of new weights: mixin layers, projector.
        dtype: of all weights.

    Returns:
        model: in evaluation mode.
        processor: with the tokenizer and the settings of images.

    Raises:
        ValueError: settings that exclude each other or are unknown; directories that are not what
            they should be; weights that are missing, unexpected or wrongly shaped, all listed.
    """
    _check(settings)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"start_model: dtype must be a floating-point dtype, got {dtype!r}")
    tokenizer = _read_tokenizer(settings)
    if settings.checkpoint is not None:
        model = _from_checkpoint(settings, dtype)
    else:
        model = _from_parts(settings, seed, dtype)
    _fit_tokenizer(model, tokenizer)
    config = model.config
    processor = CoMemoProcessor(
        image_processor=CoMemoImageProcessor.from_dict(settings_of(config)),
        tokenizer=tokenizer,
        chat_template=prompts.chat_template(config.template),
        tokens_per_tile=config.tokens_per_tile,
    )
    return model.eval(), processor


def start_config(settings: StartSettings) -> tuple[CoMemoConfig, PreTrainedTokenizerBase]:
    """The config and the tokenizer of what `start_model` makes, without reading weights.

    Args:
        settings: as for `start_model`.

    Raises:
        ValueError: as `start_model`, except for faults of weights.
    """
    _check(settings)
    tokenizer = _read_tokenizer(settings)
    if settings.checkpoint is not None:
        config, side = _checkpoint_config(settings)
    else:
        vision, language = read_vision(str(settings.vision)), read_language(str(settings.language))
        config, side = _make_config(vision, language, settings.model)
    with torch.device("meta"), init.no_init_weights():
        model = CoMemoForConditionalGeneration(config)
    if side is not None:
        resize_tiles(model, side)
    _fit_tokenizer(model, tokenizer)
    return model.config, tokenizer


def _check(settings: StartSettings) -> None:
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


def _read_tokenizer(settings: StartSettings) -> PreTrainedTokenizerBase:
    names = ("tokenizer", "checkpoint", "language")
    origin = next(name for name in names if getattr(settings, name))
    return read_tokenizer(f"start.{origin}", getattr(settings, origin))


def _from_checkpoint(settings: StartSettings, dtype: torch.dtype) -> CoMemoForConditionalGeneration:
    directory = str(settings.checkpoint)
    config, side = _checkpoint_config(settings)
    projector = _projector_file(settings, config)
    model = CoMemoForConditionalGeneration.from_pretrained(directory, config=config, dtype=dtype)
    if side is not None:
        resize_tiles(model, side)
    _load_projector(model, projector)
    return model


def _checkpoint_config(settings: StartSettings) -> tuple[CoMemoConfig, int | None]:
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


def _from_parts(
    settings: StartSettings, seed: int, dtype: torch.dtype
) -> CoMemoForConditionalGeneration:
    vision, language = read_vision(str(settings.vision)), read_language(str(settings.language))
    config, side = _make_config(vision, language, settings.model)
    projector = _projector_file(settings, config)
    with torch.device("meta"), init.no_init_weights():
        model = CoMemoForConditionalGeneration(config)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    if not projector and vision.projector:
        projector = _fitting_projector(vision, config, shapes)
    new = {name for name in shapes if MIXIN.search(name)}
    if not projector:
        new |= {name for name in shapes if name.startswith(PROJECTOR)}
    weights = [*vision.weights, *language.weights, *projector]
    wanted = {name: shape for name, shape in shapes.items() if name not in new}
    if faults := find_faults(config, wanted, weights):
        raise ValueError(
            f"start: the weights of {settings.vision!r} and {settings.language!r} must be those of"
            f" the model, some are {'; '.join(faults)}"
        )
    model.to(dtype).to_empty(device="cpu")
    copy_weights(config, dict(model.named_parameters()), weights)
    _initialise(model, not projector, seed)
    if side is not None:
        resize_tiles(model, side)
    return model


def _make_config(
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


def _projector_shapes(config: CoMemoConfig) -> dict[str, torch.Size]:
    channels = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
    width = config.text_config.hidden_size
    sizes = {"0": (channels,), "1": (width, channels), "3": (width, width)}
    shapes = {f"{PROJECTOR}{name}.weight": torch.Size(size) for name, size in sizes.items()}
    return shapes | {
        f"{PROJECTOR}{name}.bias": torch.Size(size[:1]) for name, size in sizes.items()
    }


def _projector_file(settings: StartSettings, config: CoMemoConfig) -> list[Weight]:
    """The weights of `start.projector`, checked; none if it is not given."""
    if settings.projector is None:
        return []
    weights = read_projector(settings.projector)
    if faults := find_faults(config, _projector_shapes(config), weights):
        raise ValueError(
            f"start.projector: the weights of {settings.projector!r} must be those of the model,"
            f" some are {'; '.join(faults)}"
        )
    return weights


def _fitting_projector(
    vision: Part, config: CoMemoConfig, shapes: dict[str, torch.Size]
) -> list[Weight]:
    """The projector beside a vision tower, if it fits."""
    wanted = {name: shape for name, shape in shapes.items() if name.startswith(PROJECTOR)}
    faults = find_faults(config, wanted, vision.projector)
    directory = str(vision.projector[0].file.parent)
    if faults:
        log.warning(
            "the projector in %r does not fit the language model and begins anew: %s",
            directory,
            "; ".join(faults),
        )
        return []
    log.info("the projector begins with the one in %r", directory)
    return vision.projector


def _load_projector(model: CoMemoForConditionalGeneration, weights: list[Weight]) -> None:
    if weights:
        copy_weights(model.config, dict(model.named_parameters()), weights)


def _initialise(model: CoMemoForConditionalGeneration, projector: bool, seed: int) -> None:
    """Give new modules weights by the initialiser of the model."""
    new: list[tuple[Any, nn.Module]] = [(model.model, model.model.multi_modal_projector)]
    text = model.model.language_model
    new = (new if projector else []) + [
        (text, layer.mixin) for layer in text.layers if layer.mixin is not None
    ]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for owner, module in new:
            for part in module.modules():
                owner._init_weights(part)


def _fit_tokenizer(
    model: CoMemoForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Add the control tokens that a tokenizer lacks, and make the model know all tokens."""
    words = prompts.TEMPLATES[model.config.template]
    stop = prompts.stop_text(model.config.template)
    of_template = [*re.findall(r"<\|\w+\|>", words.system + words.user + words.assistant), stop]
    wanted = dict.fromkeys((*IMAGE_TOKENS, *REGION_TOKENS, *of_template))
    known = _size(tokenizer)
    missing = missing_tokens(tokenizer, list(wanted))
    if missing:
        tokenizer.add_tokens(
            [AddedToken(name, normalized=False, special=True) for name in missing],
            special_tokens=True,
        )
    tokenizer.chat_template = None  # of the language model; the processor has that of the config
    if tokenizer.pad_token is None:  # masked wherever it is used
        tokenizer.pad_token = stop if tokenizer.eos_token is None else tokenizer.eos_token
    added = tokenizer.convert_tokens_to_ids(missing)
    fit_vocabulary(model, _size(tokenizer), known, added)
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(prompts.IMAGE_CONTEXT)
    generation, end = model.generation_config, tokenizer.convert_tokens_to_ids(stop)
    stops = generation.eos_token_id
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    generation.eos_token_id = stops if end in stops else [*stops, end]


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id."""
    return max(tokenizer.get_vocab().values()) + 1
