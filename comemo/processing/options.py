"""The options of a call of the processor: names, types, and whether text or images take them."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs

from comemo.image_processor import IMAGE_NAMES, CoMemoImageProcessorKwargs

# Text options that have an effect; all others may only be None or False.
TEXT_OPTIONS = (
    "add_special_tokens",
    "padding",
    "truncation",
    "max_length",
    "pad_to_multiple_of",
    "padding_side",
    "return_attention_mask",
    "return_mm_token_type_ids",
    "return_tensors",
    "verbose",
)
MODALITIES = ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs")


class CoMemoProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Options of a call of `CoMemoProcessor`."""

    images_kwargs: CoMemoImageProcessorKwargs
    _defaults = {
        "text_kwargs": {"padding": True, "padding_side": "left", "return_tensors": "pt"},
        "images_kwargs": {"return_tensors": "pt"},
    }


_TYPES = CoMemoProcessorKwargs.__annotations__
TEXT_NAMES = frozenset(_TYPES["text_kwargs"].__annotations__)
# All options of a call; those of videos and audio have no effect, as in any processor.
CALL_NAMES = TEXT_NAMES.union(
    IMAGE_NAMES, MODALITIES, *(_TYPES[name].__annotations__ for name in MODALITIES[2:4])
)
TEMPLATE_NAMES = frozenset(inspect.signature(ProcessorMixin.apply_chat_template).parameters)
GENERATION_NAMES = frozenset(GenerationConfig().to_dict()) - CALL_NAMES


def without_generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop options of `generate`, which a pipeline passes to the processor and to nobody else.

    Args:
        options: of a call.

    Returns:
        The other options. A warning names the dropped ones.
    """
    dropped = sorted(GENERATION_NAMES.intersection(options))
    if dropped:
        warnings.warn(
            f"CoMemoProcessor: {', '.join(dropped)} have no effect here, they are for generate:"
            " pass them to a pipeline as generate_kwargs={...}",
            stacklevel=3,
        )
    return {name: value for name, value in options.items() if name not in dropped}


def sort_options(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort options into those of text and those of images, in whatever form they were given.

    transformers ignores names that it does not know, and some releases ignore options that are
    given next to a dictionary.

    Args:
        options: of a call, by name, or in dictionaries for text, images or both.

    Returns:
        `text_kwargs` and `images_kwargs`.

    Raises:
        ValueError: an unknown option, or an option given twice.
    """
    groups = {name: options.get(name, {}) for name in MODALITIES}
    flat = {name: value for name, value in options.items() if name not in groups}
    names = {"text_kwargs": TEXT_NAMES, "images_kwargs": IMAGE_NAMES}
    for group, part in groups.items():
        if not isinstance(part, Mapping):
            got = type(part).__name__
            raise ValueError(f"CoMemoProcessor: {group} must be a dictionary, got {got}")
        for name in part:
            if name not in names.get(group, CALL_NAMES):
                raise ValueError(f"CoMemoProcessor: there is no option {name} in {group}")
            if name in flat and group != "common_kwargs":
                raise ValueError(f"CoMemoProcessor: {name} was passed twice, once in {group}")
    if unknown := sorted(set(flat) - CALL_NAMES):
        raise ValueError(f"CoMemoProcessor: there is no option {unknown[0]}")
    shared = {**groups["common_kwargs"], **flat}
    return {
        group: {name: shared[name] for name in own if name in shared} | dict(groups[group])
        for group, own in names.items()
    }
