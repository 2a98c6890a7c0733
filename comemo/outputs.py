"""Outputs of the models, and the two names of the KV cache.

transformers 5.24 renamed `past_key_values` to `cache`, in arguments and in outputs. The models
accept and return both names; `CACHE` is the name that the installed transformers uses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils.deprecation import deprecate_kwarg

from comemo_kernels import ImageMemory

OLD_NAME = "past_key_values"
RENAMED = "cache" in BaseModelOutputWithPast.__dataclass_fields__
CACHE = "cache" if RENAMED else OLD_NAME


def one_cache(verb: str, cache: Any, past_key_values: Any) -> Any:
    """The KV cache, by whichever of its names.

    Args:
        verb: the function that the error names.
        cache, past_key_values: at least one is None, or both are the same object.

    Raises:
        ValueError: two different caches.
    """
    if cache is None or past_key_values is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    raise ValueError(
        f"{verb}: cache and past_key_values are two names of one argument: give one, got"
        f" {type(cache).__name__} and {type(past_key_values).__name__}"
    )


def take_cache(verb: str, kwargs: dict[str, Any]) -> Any:
    """Rename the KV cache in keyword arguments to `CACHE`, and return it.

    Raises:
        ValueError: two different caches.
    """
    given = "cache" in kwargs or OLD_NAME in kwargs
    cache = one_cache(verb, kwargs.pop("cache", None), kwargs.pop(OLD_NAME, None))
    if given:
        kwargs[CACHE] = cache
    return cache


def warn_old_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a forward: it warns about the deprecated name as transformers' models do."""
    if not RENAMED:
        return forward
    return deprecate_kwarg(OLD_NAME, "5.40.0", new_name="cache", raise_if_both_names=True)(forward)


class BothNames:
    """Gives an output the field `cache` beside `past_key_values`; since 5.24 it has both."""

    if not RENAMED:

        @property
        def cache(self) -> Any:
            return getattr(self, OLD_NAME)

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(OLD_NAME if key == "cache" else key)  # type: ignore[misc]


@dataclass
class CoMemoModelOutput(BothNames, BaseModelOutputWithPast):
    """Output of the model without its head.

    Attributes:
        image_memory: the memory that was read, an argument of the next call.
        image_outputs: with `pixel_values`, the image tokens [T, tokens per tile, d] as its
            `pooler_output`.
    """

    image_memory: ImageMemory | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class CoMemoOutput(BothNames, CausalLMOutputWithPast):
    """Output of the model with its head.

    Attributes:
        image_memory, image_outputs: see `CoMemoModelOutput`.
        label_losses: with `skip_logits`, the loss of each label [B, N], float32, unweighted,
            without a gradient; 0 where there is no label.
    """

    image_memory: ImageMemory | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    label_losses: Tensor | None = None
