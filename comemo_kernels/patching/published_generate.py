"""`generate` of the published code: memory built once, nothing left on the model, any release.

The published language model is written for transformers 4.37 to 4.41. After that `generate` is not
inherited, makes caches of its own and lacks functions that are called. So a call uses a view of
the language model: an object of a class with what is missing, which shares all modules.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from comemo_kernels import operations as ops
from comemo_kernels.patching.plain import is_plain
from comemo_kernels.patching.published_block import READING, Reading
from comemo_kernels.patching.published_decode import Decoding, room_of
from comemo_kernels.patching.replacement import Replacement


class _Generates:
    """What all releases of `generate` ask of a model whose KV cache is a tuple of pairs."""

    _cache_name = "past_key_values"  # what `generate` calls it, also to reorder beams

    def can_generate(self) -> bool:
        return True

    def _supports_default_dynamic_cache(self) -> bool:
        return False

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """The model makes its own tuples."""

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs[self._cache_name] = outputs.past_key_values
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            model_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        ids = model_kwargs.get("position_ids")
        if ids is not None:  # RoPE-DHR: self-attention counts on from the compressed ids
            model_kwargs["position_ids"] = ids[:, -1:] + 1
        return model_kwargs


@functools.lru_cache(maxsize=16)
def generating_class(kind: Any) -> type:
    """A class with `generate` for every release, in front of that of a language model."""
    if issubclass(kind, _Generates):
        return kind
    bases: tuple[type, ...] = (_Generates, kind)
    release = importlib.import_module(f"{_package_of(kind)}.generation.utils")
    if not hasattr(kind, "generate"):
        bases += (release.GenerationMixin,)
    names = getattr(release, "ALL_CACHE_NAMES", [_Generates._cache_name])
    name = names[0] if _Generates._cache_name not in names else _Generates._cache_name

    # `generate` looks at the signatures of both.
    @functools.wraps(kind.prepare_inputs_for_generation)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name in kwargs:
            kwargs["past_key_values"] = kwargs.pop(name)
        return kind.prepare_inputs_for_generation(self, *args, **kwargs)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own, reading = functools.partial(kind.forward, self), READING.get()
        if reading is None or reading.decoding is None:
            return own(*args, **kwargs)
        return reading.decoding.forward(own, self, reading, *args, **kwargs)

    members = {"_cache_name": name, "prepare_inputs_for_generation": prepare, "forward": forward}
    return type(kind.__name__, bases, members | {"__module__": kind.__module__})


def _package_of(kind: type) -> str:
    """The package that defines PreTrainedModel, wherever the model comes from."""
    base = next(c for c in kind.__mro__ if c.__name__ == "PreTrainedModel")
    return base.__module__.partition(".")[0]


def view_of(language_model: nn.Module) -> Any:
    """An object that generates with the modules of a language model."""
    given: Any = type(language_model)
    kind: Any = generating_class(given)
    view = object.__new__(kind)
    vars(view).update(vars(language_model))
    if vars(view).get("generation_config") is None:
        settings = importlib.import_module(f"{_package_of(kind)}.generation.configuration_utils")
        view.generation_config = settings.GenerationConfig.from_model_config(view.config)
    return view


def extract_feature(call: Replacement, pixel_values: Tensor) -> Tensor:
    """Image tokens [T, S * S, d] of tiles [T, 3, h, w]."""
    model = call.module
    projector = model.mlp1
    names = [type(part).__name__ for part in projector]
    if names != ["LayerNorm", "Linear", "GELU", "Linear"] or not is_plain(projector, biased=True):
        return call.refuse("a part of the projector has to be called", pixel_values)
    norm, first, activation, second = projector
    if activation.approximate != "none":
        return call.refuse("the activation of the projector is approximate", pixel_values)
    last = model.select_layer == -1
    out = model.vision_model(
        pixel_values=pixel_values, output_hidden_states=not last, return_dict=True
    )
    tokens = out.last_hidden_state if last else out.hidden_states[model.select_layer]
    return ops.project_tiles(
        tokens,
        norm.weight,
        norm.bias,
        first.weight,
        first.bias,
        second.weight,
        second.bias,
        model.downsample_ratio,
        "v1" if model.ps_version == "v1" else "v2",
        norm.eps,
    )


@torch.no_grad()
def generate(
    call: Replacement,
    pixel_values: Tensor | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    visual_features: Tensor | None = None,
    generation_config: Any = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    num_patches_list: Any = None,
    position_ids: Tensor | None = None,
    cross_attention_media_position_ids: Tensor | None = None,
    **generate_kwargs: Any,
) -> Any:
    """Generate, with arguments and results of the published function; nothing stays on the model.

    Raises:
        ValueError: arguments that do not fit together, instead of an error deep inside.
    """
    model = call.module
    if input_ids is None:
        raise ValueError("generate: wanted input_ids [1, N], got None")
    embeds = model.language_model.get_input_embeddings()(input_ids)
    vision_x = None
    media_ids = cross_attention_media_position_ids
    if pixel_values is not None:
        selected = find_image_tokens(model, input_ids)
        features = visual_features
        if features is None:
            features = model.extract_feature(pixel_values)
        vision_x = features.flatten(0, 1)[None]
        place_features(embeds, selected, vision_x[0])
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if media_ids is None:
            media_ids = position_ids[selected[:1]][None]
        check_ids(position_ids, media_ids, input_ids, vision_x)
    layers = model.language_model.model.layers
    blocks = [b for layer in layers if (b := layer.gated_cross_attn_layer) is not None]
    options = {"output_hidden_states": output_hidden_states}
    if position_ids is not None:
        options["position_ids"] = position_ids.to(embeds.device)
    view = view_of(model.language_model)
    room = room_of(generation_config, generate_kwargs, view.generation_config, input_ids.shape[1])
    decoding = Decoding(room)
    reading = READING.set(Reading(vision_x, media_ids, position_ids, blocks, decoding))
    try:
        return view.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config,
            use_cache=True,
            **{name: value for name, value in options.items() if value is not None},
            **generate_kwargs,
        )
    finally:
        READING.reset(reading)
        decoding.close()


def find_image_tokens(model: Any, input_ids: Tensor) -> Tensor:
    """bool [1, N], True at image tokens."""
    if model.img_context_token_id is None:
        raise ValueError(
            "generate: wanted model.img_context_token_id, the id of <IMG_CONTEXT>, got None"
        )
    if len(input_ids) != 1:
        raise ValueError(
            f"generate: with images input_ids must be [1, N], got {tuple(input_ids.shape)}"
        )
    return input_ids == model.img_context_token_id


def place_features(embeds: Tensor, selected: Tensor, features: Tensor) -> None:
    """Write features [M, d] over the embeddings [1, N, d] of the image tokens."""
    count = int(selected.sum())
    if count != len(features):
        raise ValueError(
            f"generate: input_ids must have one image token for each of {len(features)} projected"
            f" tokens of pixel_values, got {count}"
        )
    embeds[selected] = features.to(embeds.device, embeds.dtype)


def check_ids(position_ids: Tensor, media_ids: Tensor, input_ids: Tensor, vision_x: Tensor) -> None:
    """Raise unless there is an id for each token."""
    if position_ids.shape != input_ids.shape:
        raise ValueError(
            f"generate: position_ids must be {tuple(input_ids.shape)} as input_ids, got"
            f" {tuple(position_ids.shape)}"
        )
    if media_ids.shape != vision_x.shape[:2]:
        raise ValueError(
            "generate: cross_attention_media_position_ids must have an id for each image token,"
            f" {tuple(vision_x.shape[:2])}, got {tuple(media_ids.shape)}"
        )
