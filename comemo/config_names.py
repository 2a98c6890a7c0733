"""Names of settings in published files and in transformers, and what both mean the same by."""

import math
from typing import Any

from comemo.safety.settings import shorten

# How published checkpoints were trained and evaluated; their configs may not say so.
PUBLISHED_BEHAVIOUR = {
    "tile_order": "column",
    "decode_positions": "raw",
    "ntk_length": "token_count",
}
# Keys that name code, or kernels to download: ignored in every part of a file.
NAMES_OF_CODE = (
    "auto_map",
    "custom_pipelines",
    "attn_implementation",
    "experts_implementation",
    "_attn_implementation",
    "_experts_implementation",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
)
LLM_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "mlp_bias",
)
VISION_KEYS = (  # the same in published files and in transformers
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "norm_type",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
    "num_channels",
)
VISION_RENAMED = {  # published -> transformers
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "dropout": "hidden_dropout_prob",
    "initializer_factor": "layer_scale_init_value",
}
FLOATS = (  # transformers refuses the integers 0 and 1 for them
    "initializer_range",
    "rms_norm_eps",
    "layer_norm_eps",
    "initializer_factor",
    "layer_scale_init_value",
)


def without_nulls(llm: dict[str, Any]) -> dict[str, Any]:
    """A published `llm_config` without null values: null means that a setting is not given."""
    return {key: value for key, value in llm.items() if value is not None}


def bias_key(architecture: str) -> str:
    """The published name for biases of the attention's projections."""
    return "bias" if architecture == "InternLM2ForCausalLM" else "attention_bias"


def scaling_of(given: dict[str, Any] | None, name: str = "rope_scaling") -> dict[str, Any] | None:
    """Read rotary scaling.

    Args:
        given: with published or transformers' names.
        name: of the setting, for the message.

    Returns:
        {"type": ..., "factor": ...}; None for no scaling.

    Raises:
        ValueError: a scaling that the model does not support.
    """
    if not isinstance(given, (dict, type(None))):
        raise ValueError(f"CoMemoConfig: {name} must be null or a dictionary, got {shorten(given)}")
    known = {key: value for key, value in (given or {}).items() if value is not None}
    for key in ("rope_theta", "original_max_position_embeddings"):  # not used by these scalings
        known.pop(key, None)
    kinds = {str(known.pop(key)) for key in ("type", "rope_type") if key in known}
    factor = known.pop("factor", None)
    if kinds == {"default"} or not (kinds or factor or known):
        return None
    valid = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    valid = valid and 0 < factor < math.inf
    if len(kinds) != 1 or not kinds <= {"dynamic", "linear"} or known or not valid:
        raise ValueError(
            f"CoMemoConfig: {name} type must be 'dynamic' or 'linear', with a positive factor and"
            f" nothing else, got {shorten(given)}"
        )
    return {"type": kinds.pop(), "factor": factor}
