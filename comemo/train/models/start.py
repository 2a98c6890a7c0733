"""The model that training begins with: a checkpoint, or a vision tower and a language model."""

import logging
import re
from typing import Any

import torch
from torch import nn
from transformers import AddedToken, PreTrainedTokenizerBase
from transformers import initialization as init

from comemo import prompts
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.image_processor import CoMemoImageProcessor, settings_of
from comemo.processing.tokenizer_files import missing_tokens, read_tokenizer
from comemo.processor import CoMemoProcessor
from comemo.tokenizer import ADDED_TOKENS
from comemo.train.models.configs import check_start, checkpoint_config, parts_config
from comemo.train.models.embeddings import fit_vocabulary, resize_tiles
from comemo.train.models.loading import copy_weights, find_faults
from comemo.train.models.parts import (
    Part,
    Weight,
    read_language,
    read_projector,
    read_vision,
)
from comemo.train.settings import StartSettings

log = logging.getLogger(__name__)

PROJECTOR, MIXIN = "model.multi_modal_projector.", re.compile(r"\.layers\.\d+\.mixin\.")


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
    check_start(settings)
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
    check_start(settings)
    tokenizer = _read_tokenizer(settings)
    if settings.checkpoint is not None:
        config, side = checkpoint_config(settings)
    else:
        vision, language = read_vision(str(settings.vision)), read_language(str(settings.language))
        config, side = parts_config(vision, language, settings.model)
    with torch.device("meta"), init.no_init_weights():
        model = CoMemoForConditionalGeneration(config)
    if side is not None:
        resize_tiles(model, side)
    _fit_tokenizer(model, tokenizer)
    return model.config, tokenizer


def _read_tokenizer(settings: StartSettings) -> PreTrainedTokenizerBase:
    names = ("tokenizer", "checkpoint", "language")
    origin = next(name for name in names if getattr(settings, name))
    return read_tokenizer(f"start.{origin}", getattr(settings, origin))


def _from_checkpoint(settings: StartSettings, dtype: torch.dtype) -> CoMemoForConditionalGeneration:
    directory = str(settings.checkpoint)
    config, side = checkpoint_config(settings)
    projector = _projector_file(settings, config)
    model = CoMemoForConditionalGeneration.from_pretrained(directory, config=config, dtype=dtype)
    if side is not None:
        resize_tiles(model, side)
    _load_projector(model, projector)
    return model


def _from_parts(
    settings: StartSettings, seed: int, dtype: torch.dtype
) -> CoMemoForConditionalGeneration:
    vision, language = read_vision(str(settings.vision)), read_language(str(settings.language))
    config, side = parts_config(vision, language, settings.model)
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
    wanted = dict.fromkeys((*ADDED_TOKENS, *of_template))
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
