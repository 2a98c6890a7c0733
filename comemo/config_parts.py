"""The parts of a config, made from files with published or with transformers' names."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from comemo.config_names import (
    FLOATS,
    LLM_KEYS,
    VISION_KEYS,
    VISION_RENAMED,
    bias_key,
    scaling_of,
    without_nulls,
)
from comemo.safety.settings import (
    GENERAL,
    MIXIN,
    TEXT,
    VISION,
    check_heads,
    check_names,
    check_settings,
    shorten,
)

OWN_ATTENTION = "comemo_kernels"  # the attention of mixin layers, if no other one is chosen
ATTENTION_PARTS = ("", "text_config", "vision_config", "mixin_config")


def attention_by_part(chosen: str | dict[str, Any] | None) -> dict[str, Any]:
    """A choice of `attn_implementation`, as transformers' dictionary of the parts that it is for.

    Args:
        chosen: names by part; a name alone is for everything but the mixin layers.

    Raises:
        ValueError: an unknown part, or our attention for a part without an image memory.
    """
    parts = chosen if isinstance(chosen, dict) else dict.fromkeys(ATTENTION_PARTS[:3], chosen)
    if unknown := [part for part in parts if part not in ATTENTION_PARTS]:
        raise ValueError(
            f"CoMemoConfig: attn_implementation must have keys of {ATTENTION_PARTS}, got"
            f" {shorten(unknown)}"
        )
    if wrong := [p for p in ATTENTION_PARTS[:3] if parts.get(p) == OWN_ATTENTION]:
        raise ValueError(
            f"CoMemoConfig: attn_implementation {OWN_ATTENTION!r} must be for 'mixin_config', got"
            f" {wrong}: it reads an image memory by spans, not a KV cache by a causal mask"
        )
    return parts


def check_parts(parts: dict[str, Any]) -> None:
    """Refuse wrong settings before objects are made from them.

    Args:
        parts: `llm_config`, `text_config`, `vision_config` and `mixin_config`, as given.

    Raises:
        ValueError: a part that is neither a dictionary nor a config, or a wrong setting in one.
    """
    rules = {"llm_config": TEXT | {"architectures": GENERAL["architectures"]}}
    rules |= {"text_config": TEXT | GENERAL, "vision_config": VISION, "mixin_config": MIXIN}
    for name, part in parts.items():
        if not isinstance(part, (dict, PreTrainedConfig, type(None))):
            raise ValueError(f"CoMemoConfig: {name} must be a dictionary, got {shorten(part)}")
        if isinstance(part, dict):
            check_settings(name, rules[name], without_nulls(part) if name == "llm_config" else part)


def make_text(text: dict[str, Any]) -> LlamaConfig:
    """Make the language model's config.

    Args:
        text: with transformers' names.

    Raises:
        ValueError: invalid names or rotary scaling, sizes that do not fit together.
    """
    check_names("text_config", LlamaConfig, text)
    rotary = text.get("rope_parameters")
    scaling_of(rotary, "text_config.rope_parameters")
    check_settings("text_config.rope_parameters", TEXT, rotary or {})
    return _make(LlamaConfig, "text_config", deepcopy(text))


def text_from_published(llm: dict[str, Any], architecture: str) -> LlamaConfig:
    """Make the language model's config; an empty `llm` gives that of the published model.

    Args:
        llm: with published names, from `without_nulls`.
        architecture: the class that the names belong to.

    Raises:
        ValueError: sizes that do not fit together.
    """
    published = {  # internlm2-chat-1_8b; its configuration class has attention bias by default
        "vocab_size": 92553,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 2,
    }
    internlm2 = architecture == "InternLM2ForCausalLM"
    known = {key: llm[key] for key in LLM_KEYS if key in llm}
    bias = llm.get(bias_key(architecture), internlm2 and bool(llm))
    theta = llm.get("rope_theta", 1e6 if not llm else 10000.0)
    # The scaling stays in CoMemoConfig: Llama's follows other rules and stays on once it begins.
    rotary = {"rope_type": "default", "rope_theta": float(theta)}
    rest = {"attention_bias": bias, "rope_parameters": rotary}
    return _make(LlamaConfig, "llm_config", (known if llm else published) | rest)


def make_vision(vision: dict[str, Any], image_size: int | None) -> InternVLVisionConfig:
    """Make the vision tower's config.

    Args:
        vision: with published or transformers' names; the published name wins.
        image_size: in pixels, instead of the tower's own.

    Raises:
        ValueError: settings that transformers refuses.
    """
    known = {key: vision[key] for key in (*VISION_KEYS, *VISION_RENAMED.values()) if key in vision}
    known |= {ours: vision[key] for key, ours in VISION_RENAMED.items() if key in vision}
    known = {
        "attention_bias": True,
        **known,
        "image_size": image_size or vision.get("image_size", 448),
        "patch_size": vision.get("patch_size", 14),
        "use_mean_pooling": True,  # no final norm: the published tower has none
    }
    return _make(InternVLVisionConfig, "vision_config", known)


def _make(kind: Callable[..., Any], part: str, values: dict[str, Any]) -> Any:
    values = {key: float(value) if key in FLOATS else value for key, value in values.items()}
    check_heads(part, values)
    try:
        return kind(**values)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"CoMemoConfig: {part} is refused by transformers: {reason}") from error


def check_agreement(llm: dict[str, Any], published: LlamaConfig, text: LlamaConfig) -> None:
    """Refuse two configs of the language model, `llm_config` and `text_config`, that differ.

    Args:
        llm: `llm_config`, from `without_nulls`.
        published: what `text_from_published` made of it.
        text: `text_config`.

    Raises:
        ValueError: names all settings that differ.
    """
    differ = [
        key
        for key in LLM_KEYS
        if not key.endswith("_token_id")
        and key in llm
        and getattr(published, key) != getattr(text, key)
    ]
    if published.attention_bias != text.attention_bias:
        differ.append("attention_bias")
    theta = llm.get("rope_theta")
    if theta is not None and float(theta) != float(text.rope_parameters["rope_theta"]):
        differ.append("rope_theta")
    if differ:
        raise ValueError(
            "CoMemoConfig: llm_config and text_config describe the same language model and must"
            f" agree, they differ in {differ}: give only one of them"
        )
