"""The Auto classes of transformers: they read checkpoints of this model with CoMemo's own classes.

This module registers them when it is imported; `comemo.auto_hook` says when that is.
Registration is not enough: if a file of a checkpoint names a class, the Auto classes may prefer its
code, or ask on standard input whether to run it.
"""

import functools
from collections.abc import Callable
from typing import Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.image_processor import CoMemoImageProcessor
from comemo.processing.tokenizer_files import CheckpointTokenizer
from comemo.processor import CoMemoProcessor
from comemo.safety.files import hub_options, is_published
from comemo.tokenizer import InternLM2Tokenizer

# The class that reads a checkpoint of this model instead; None if the model has no such part.
OWN: dict[Any, Any] = {
    AutoConfig: CoMemoConfig,
    AutoTokenizer: CheckpointTokenizer,
    AutoImageProcessor: CoMemoImageProcessor,
    AutoProcessor: CoMemoProcessor,
    AutoVideoProcessor: None,
    AutoFeatureExtractor: None,
}


def register() -> None:
    """Register the model with the Auto classes and with pipelines."""
    AutoConfig.register(CoMemoConfig.model_type, CoMemoConfig)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto.register(CoMemoConfig, CoMemoForConditionalGeneration)
    # A directory without a config is recognised by the class that its files name.
    REGISTERED_TOKENIZER_CLASSES[InternLM2Tokenizer.__name__] = InternLM2Tokenizer
    AutoImageProcessor.register(CoMemoConfig, image_processor_classes={"pil": CoMemoImageProcessor})
    AutoProcessor.register(CoMemoConfig, CoMemoProcessor)
    for auto, own in OWN.items():
        auto.from_pretrained = staticmethod(_own_first(auto.__name__, auto.from_pretrained, own))


def _own_first(name: str, load: Callable[..., Any], own: Any) -> Callable[..., Any]:
    """`load`, except that `own` reads checkpoints of this model."""

    @functools.wraps(load)
    def from_pretrained(pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        path = pretrained_model_name_or_path
        if not is_published(path, **hub_options(kwargs)):
            return load(path, *args, **kwargs)
        if own is None:
            raise ValueError(
                f"{name}.from_pretrained: CoMemo takes only images and text, got {str(path)!r}"
            )
        return own.from_pretrained(path, *args, **kwargs)

    return from_pretrained


register()
REGISTERED = True  # read by `comemo.auto_hook`
