"""The Auto classes of transformers, for checkpoints of this model: classes of ours, and no other.

By registration alone they would prefer the code that a checkpoint names, or ask on standard input
whether to run it: wherever one of its files names a class that transformers has, or does not know.
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
from comemo.processor import CoMemoProcessor
from comemo.safety.files import hub_options, is_published
from comemo.tokenizer import InternLM2Tokenizer

# What reads a checkpoint of this model in the place of each; None for what it has no use for.
OWN: dict[Any, Any] = {
    AutoConfig: CoMemoConfig,
    AutoTokenizer: InternLM2Tokenizer,
    AutoImageProcessor: CoMemoImageProcessor,
    AutoProcessor: CoMemoProcessor,
    AutoVideoProcessor: None,
    AutoFeatureExtractor: None,
}


def register() -> None:
    """Make the model known to the Auto classes and to pipelines."""
    AutoConfig.register(CoMemoConfig.model_type, CoMemoConfig)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto.register(CoMemoConfig, CoMemoForConditionalGeneration)
    # Directories that hold no config are known by the names that their files give.
    REGISTERED_TOKENIZER_CLASSES[InternLM2Tokenizer.__name__] = InternLM2Tokenizer
    AutoImageProcessor.register(CoMemoConfig, image_processor_classes={"pil": CoMemoImageProcessor})
    AutoProcessor.register(CoMemoConfig, CoMemoProcessor)
    for auto, own in OWN.items():
        auto.from_pretrained = staticmethod(_own_first(auto.__name__, auto.from_pretrained, own))


def _own_first(name: str, load: Callable[..., Any], own: Any) -> Callable[..., Any]:
    """`load`, but checkpoints of this model are read by `own`."""

    @functools.wraps(load)
    def from_pretrained(pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        path = pretrained_model_name_or_path
        if not is_published(path, **hub_options(kwargs)):
            return load(path, *args, **kwargs)
        if own is None:
            raise ValueError(
                f"{name}.from_pretrained: CoMemo knows pictures and text alone, got {str(path)!r}"
            )
        return own.from_pretrained(path, *args, **kwargs)

    return from_pretrained
