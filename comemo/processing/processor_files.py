"""Load a processor from the files of a checkpoint: only CoMemo's own classes are made of them."""

import math
import warnings
from typing import Any

from comemo import prompts
from comemo.config import CoMemoConfig
from comemo.image_processor import IMAGE_NAMES, CoMemoImageProcessor
from comemo.processing.options import TEXT_NAMES
from comemo.processing.tokenizer_files import CheckpointTokenizer
from comemo.safety.files import check_class, find_file, hub_options, read_json
from comemo.tokenizer import check_keywords

PUBLISHED_TEMPLATES = {prompts.chat_template(name) for name in prompts.TEMPLATES}


class LoadsProcessor:
    """`from_pretrained` for a `ProcessorMixin`."""

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, but no other class is loaded and no unknown chat template used.

        A template is a program: one that is not published is ignored with a warning, unless
        `chat_template` is given.

        Raises:
            ValueError: files of another processor, or with an audio tokenizer.
        """
        path, hub = pretrained_model_name_or_path, hub_options(kwargs)
        function = f"{cls.__name__}.from_pretrained"
        content = read_json(path, "processor_config.json", **hub)
        known = (cls.__name__, "CoMemoProcessor")
        check_class(function, path, content.get("processor_class"), known)
        if "audio_tokenizer" in content or find_file(path, "audio_tokenizer_config.json", **hub):
            raise ValueError(f"{function}: the model takes only images, got an audio_tokenizer")
        found, rest = super().get_processor_dict(path, **kwargs)  # type: ignore[misc]
        template = found.pop("chat_template", None)
        if isinstance(template, str) and template in PUBLISHED_TEMPLATES:
            found["chat_template"] = template
        elif template is not None and kwargs.get("chat_template") is None:
            warnings.warn(
                f"{function}: the chat template in {str(path)!r} is not a published one and not"
                " used: pass it as chat_template if you trust it",
                stacklevel=3,
            )
        return found, rest

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Published checkpoints have no processor files: everything is in the config."""
        path, hub = pretrained_model_name_or_path, hub_options(kwargs)
        config = CoMemoConfig.from_pretrained(path, **hub)
        known = processor_dict if processor_dict is not None else {}
        known.setdefault("chat_template", prompts.chat_template(config.template))
        known.setdefault("tokens_per_tile", config.tokens_per_tile)
        settings = known.pop("image_processor", None)
        if settings is None:
            settings, _ = CoMemoImageProcessor.get_image_processor_dict(path, **hub)
        tokenizer = kwargs.pop("tokenizer", None)
        for name in ("chat_template", "tokens_per_tile", "image_processor"):
            kwargs.pop(name, None)  # of the class itself
        of_images = {n: kwargs.pop(n) for n in list(kwargs) if n in IMAGE_NAMES - TEXT_NAMES}
        images = CoMemoImageProcessor.from_dict(settings, **of_images)
        known["tokens_per_tile"] = scale_tokens(
            known["tokens_per_tile"], settings["input_size"], images.input_size
        )
        if "_from_pipeline" not in kwargs:  # a pipeline also passes options of the model
            check_keywords(f"{cls.__name__}.from_pretrained", kwargs)
        if tokenizer is None:
            tokenizer = CheckpointTokenizer.from_pretrained(path, **kwargs)
        return [images, tokenizer]


def scale_tokens(tokens: int, size: int, other: int) -> int:
    """Image tokens of a tile of another size.

    Args:
        tokens: of a tile of `size` pixels.
        size, other: sides of tiles in pixels.

    Raises:
        ValueError: the other tile does not have a whole number of tokens along a side.
    """
    if size == other:
        return tokens
    side, rest = divmod(math.isqrt(tokens) * other, size)
    if rest or not side:
        step = size // math.gcd(math.isqrt(tokens), size)
        raise ValueError(
            f"CoMemoProcessor: input_size must be a multiple of {step}, got {other}: a tile of"
            f" {size} pixels has {math.isqrt(tokens)} tokens along its side"
        )
    return side**2
