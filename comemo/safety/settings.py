"""The valid values of a config's settings: a wrong value is a ValueError that names it.

Command lines are read with these values: importing them must take no time, so torch and
transformers are imported by the few tests that need them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

MODEL_TYPE = "comemo_chat"
LLM_MODEL_TYPES = {"InternLM2ForCausalLM": "internlm2", "LlamaForCausalLM": "llama"}
CHOICES: dict[str, tuple[str, ...]] = {
    "rope": ("dhr", "original"),
    "tile_order": ("row", "column"),
    "decode_positions": ("compressed", "raw"),
    "ntk_length": ("position", "token_count"),
    "memory_positions": ("relative", "absolute"),
    "recompute": ("cheap", "projections"),
    "ps_version": ("v1", "v2"),
    "llm_architecture": tuple(LLM_MODEL_TYPES),
}
DTYPES = ("float32", "bfloat16", "float16")  # that a model can run in
BITS = ("int8", "int4")  # of weights, see `comemo.weights.quantising`
ACTIVATIONS = ("gelu", "silu")  # of published checkpoints; transformers has more

# 1024 tiles are 262,144 tokens: more than any context, and a bound on the list of candidates
MAX_TILES = 1024
LARGEST = 2**24  # of sizes and positions; more is a mistake, or an attack on the memory
MOST_LAYERS = 4096

# What is wanted, as text or by a function that is called for a wrong value, and a test for it.
Rule = tuple[str | Callable[[], str], Callable[[Any], bool]]


def _whole(low: int, high: int = LARGEST) -> Rule:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return f"a whole number from {low} to {high}", fits


def _number(low: float, high: float, above: bool = False) -> Rule:
    def fits(value: Any) -> bool:
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        return known and (low < value if above else low <= value) and value <= high

    return f"a number {'above' if above else 'from'} {low:g} {'up ' * above}to {high:g}", fits


def _one_of(*choices: str) -> Rule:
    return f"one of {choices}", lambda value: isinstance(value, str) and value in choices


def _optional(rule: Rule) -> Rule:
    return f"null or {rule[0]}", lambda value: value is None or rule[1](value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_ids(value: Any) -> bool:
    return _ID[1](value) or (isinstance(value, list) and all(map(_ID[1], value)))


def _is_side(value: Any) -> bool:
    """Whether it is a number, or the same number twice, as transformers writes it."""
    both = value if isinstance(value, (list, tuple)) else (value, value)
    return len(both) == 2 and both[0] == both[1] and _SIZE[1](both[0])


def _is_dtype(value: Any) -> bool:
    if isinstance(value, str) and value in DTYPES:
        return True
    import torch

    value = getattr(torch, value, None) if isinstance(value, str) else value
    return isinstance(value, torch.dtype) and value.is_floating_point


def _activations() -> tuple[str, ...]:
    from transformers.activations import ACT2FN

    return tuple(sorted(ACT2FN))


def _is_activation(value: Any) -> bool:
    return isinstance(value, str) and (value in ACTIVATIONS or value in _activations())


def _are_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(
        str(index).isdecimal() and isinstance(label, str) for index, label in value.items()
    )


def _are_numbered(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_whole(0)[1], value.values()))


_SIZE, _FLAG = _whole(1), ("true or false", lambda value: isinstance(value, bool))
_TEXT = ("a text", lambda value: isinstance(value, str))
_ID = _whole(-1)  # some checkpoints have -1 for no id
_SIDE = ("a whole number of pixels, or the same number twice", _is_side)
_ACTIVATION: Rule = (lambda: f"one of {_activations()}", _is_activation)
_SHARE, _ANGLES = _number(0, 1), _number(0, 1e12, above=True)
_DTYPE = _optional(("the name of a floating-point dtype", _is_dtype))

# Of every config of transformers.
GENERAL: dict[str, Rule] = {
    "architectures": _optional(("a list of names", _are_texts)),
    "chunk_size_feed_forward": _whole(0),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "id2label": _optional(("a dictionary of labels by number", _are_labels)),
    "label2id": _optional(("a dictionary of numbers by label", _are_numbered)),
    "is_encoder_decoder": _FLAG,
    "num_labels": _whole(0, MAX_TILES),
    "output_attentions": _optional(_FLAG),
    "output_hidden_states": _optional(_FLAG),
    "return_dict": ("true", lambda value: value is True),  # the parts read outputs by name
    "problem_type": _optional(
        _one_of("regression", "single_label_classification", "multi_label_classification")
    ),
    "transformers_version": _optional(_TEXT),
    "per_layer_config": ("null, because all layers are alike", lambda value: value is None),
}
# Of the language model, in both vocabularies.
TEXT: dict[str, Rule] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings"), _SIZE),
    **dict.fromkeys(("head_dim", "num_key_value_heads", "pretraining_tp"), _optional(_SIZE)),
    **dict.fromkeys(("bias", "attention_bias", "mlp_bias"), _FLAG),
    **dict.fromkeys(("tie_word_embeddings", "use_cache"), _FLAG),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), _optional(_ID)),
    "num_hidden_layers": _whole(1, MOST_LAYERS),
    "hidden_act": _ACTIVATION,
    "initializer_range": _SHARE,
    "rms_norm_eps": _SHARE,
    "attention_dropout": _SHARE,
    "rope_theta": _ANGLES,
    "eos_token_id": _optional((f"{_ID[0]}, or a list of such", _are_ids)),
}
# Of `generation_config`, where None means that the file does not say it.
GENERATION: dict[str, Rule] = {**TEXT, "use_cache": _optional(_FLAG)}
VISION: dict[str, Rule] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), _SIZE),
    **dict.fromkeys(("qkv_bias", "attention_bias", "qk_normalization", "use_qk_norm"), _FLAG),
    **dict.fromkeys(("dropout", "hidden_dropout_prob", "attention_dropout"), _SHARE),
    **dict.fromkeys(("initializer_range", "layer_norm_eps"), _SHARE),
    **dict.fromkeys(("initializer_factor", "layer_scale_init_value"), _number(0, LARGEST)),
    **dict.fromkeys(("image_size", "patch_size"), _SIDE),
    "num_hidden_layers": _whole(1, MOST_LAYERS),
    "num_channels": _SIZE,
    "hidden_act": _ACTIVATION,
    "norm_type": _one_of("layer_norm", "rms_norm"),
}
MIXIN: dict[str, Rule] = {
    **dict.fromkeys(("language_dim", "vision_dim", "head_dim", "num_heads"), _SIZE),
    **dict.fromkeys(("intermediate_size", "max_position_embeddings"), _SIZE),
    "mixin_every_n_layers": _SIZE,
    "rope_theta": _ANGLES,
}
WHOLE: dict[str, Rule] = {
    "select_layer": _whole(-MOST_LAYERS, MOST_LAYERS),
    "downsample_ratio": _number(0, 1, above=True),
    "force_image_size": _optional(_SIZE),
    "template": _TEXT,
    **dict.fromkeys(("use_thumbnail", "dynamic_image_size", "tie_word_embeddings"), _FLAG),
    **dict.fromkeys(("min_dynamic_patch", "max_dynamic_patch"), _whole(1, MAX_TILES)),
    "image_token_id": _optional(_ID),
    "tiles_at_once": _SIZE,
}


def check_settings(part: str, rules: Mapping[str, Rule], given: Mapping[str, Any]) -> None:
    """Refuse values that break the rule of their name.

    Args:
        part: the config's part, for the message; "" for the config itself.
        rules: by name; names without a rule may have any value.
        given: value by name.

    Raises:
        ValueError: names the first wrong value.
    """
    for name, value in given.items():
        wanted, fits = rules.get(name, _ANYTHING)
        if not fits(value):
            raise ValueError(
                f"CoMemoConfig: {_place(part, name)} must be {as_text(wanted)}, got"
                f" {shorten(value)}"
            )


def as_text(wanted: str | Callable[[], str]) -> str:
    """The first part of a `Rule`, for a message."""
    return wanted if isinstance(wanted, str) else wanted()


_ANYTHING: Rule = ("anything", lambda value: True)


def shorten(value: Any) -> str:
    """The `repr` of a value; of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... of {len(text):,} characters"


def check_names(part: str, kind: type, given: Mapping[str, Any]) -> None:
    """Refuse settings that would hide a method or a constant of their class.

    Args:
        part: see `check_settings`.
        kind: the class whose attributes they become.
        given: value by name.

    Raises:
        ValueError: the first such name.
    """
    free = {"model_type", *(field.name for field in dataclasses.fields(kind))}
    for name in given:
        settable = isinstance(held := getattr(kind, name, None), property) and held.fset
        if hasattr(kind, name) and name not in free and not settable:
            raise ValueError(f"CoMemoConfig: {_place(part, name)} is not a setting")


def _place(part: str, name: str) -> str:
    return f"{part}.{name}" if part else name


def check_heads(part: str, given: Mapping[str, Any]) -> None:
    """Refuse heads that do not divide the width.

    Args:
        part: see `check_settings`.
        given: value by name; missing ones are not checked.

    Raises:
        ValueError: they do not.
    """
    width, heads = given.get("hidden_size", 0), given.get("num_attention_heads", 1)
    if width % heads:
        raise ValueError(
            f"CoMemoConfig: {_place(part, 'num_attention_heads')} must divide its hidden_size"
            f" {width}, got {heads}"
        )


def check_shapes(config: Any) -> None:
    """Refuse sizes that are valid one by one but do not fit together.

    Args:
        config: a whole `CoMemoConfig`.

    Raises:
        ValueError: heads that do not divide a width, rasters that cannot be folded, ...
    """
    text, vision, mixin = config.text_config, config.vision_config, config.mixin_config
    dims = (mixin.language_dim, mixin.vision_dim)
    if dims != (text.hidden_size, text.hidden_size):
        raise ValueError(
            "CoMemoConfig: language_dim and vision_dim of mixin_config must equal the language"
            f" model's hidden_size {text.hidden_size}, got {dims}"
        )
    depth = vision.num_hidden_layers
    if not -depth - 1 <= config.select_layer <= depth:
        raise ValueError(
            f"CoMemoConfig: select_layer {config.select_layer} is outside the {depth + 1} hidden"
            " states of the vision tower"
        )
    check_heads("text_config", vars(text))
    check_heads("vision_config", vars(vision))
    if text.num_attention_heads % text.num_key_value_heads:
        raise ValueError(
            "CoMemoConfig: num_key_value_heads must divide num_attention_heads"
            f" {text.num_attention_heads}, got {text.num_key_value_heads}"
        )
    for name, part in (("text_config", text), ("mixin_config", mixin)):
        if part.head_dim % 2:
            raise ValueError(
                f"CoMemoConfig: head_dim of {name} must be even, because it is rotated in pairs,"
                f" got {part.head_dim}"
            )
    pixels, patch = vision.image_size[0], vision.patch_size[0]
    patches, fold = pixels // patch, round(1 / config.downsample_ratio)
    if not math.isclose(fold * config.downsample_ratio, 1) or not patches or patches % fold:
        raise ValueError(
            "CoMemoConfig: downsample_ratio must be 1 / n with n dividing the patches along a"
            f" tile's side, got {config.downsample_ratio} for {patches} of them: image_size or"
            f" force_image_size {pixels}, patch_size {patch}"
        )
    if config.min_dynamic_patch > config.max_dynamic_patch:
        raise ValueError(
            f"CoMemoConfig: min_dynamic_patch must be at most max_dynamic_patch"
            f" {config.max_dynamic_patch}, got {config.min_dynamic_patch}"
        )
