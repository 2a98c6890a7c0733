"""A config read without transformers, for what tells its sizes and computes nothing.

transformers takes seconds to import. `read_plain` understands files in which nothing is unusual;
`CoMemoConfig` reads all others, and says what is wrong with them.
"""

from types import SimpleNamespace
from typing import Any

from comemo.config_names import (
    LLM_KEYS,
    NAMES_OF_CODE,
    PUBLISHED_BEHAVIOUR,
    bias_key,
    scaling_of,
    without_nulls,
)
from comemo.safety import settings as checks
from comemo.safety.settings import CHOICES, LLM_MODEL_TYPES, MODEL_TYPE, check_settings

# What `CoMemoConfig` has for settings that a file does not give.
DEFAULTS: dict[str, Any] = {
    "select_layer": -1,
    "ps_version": "v2",
    "downsample_ratio": 0.5,
    "force_image_size": None,
    "template": "internlm2-chat",
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "rope": "dhr",
    "tile_order": "row",
    "decode_positions": "compressed",
    "ntk_length": "position",
    "memory_positions": "relative",
    "tiles_at_once": 16,
    "recompute": "cheap",
}
_PARTS = ("llm_config", "text_config", "vision_config", "mixin_config")
_WHOLE = {*checks.WHOLE, *CHOICES, *_PARTS, "model_type"}
_TEXT = {
    *LLM_KEYS,
    "attention_bias",
    "model_type",
    "pretraining_tp",
    "rope_parameters",
    "use_cache",
}
# Settings of every config that change nothing here: by their rules, or with these values.
_ANY = ("architectures", "dtype", "torch_dtype", "transformers_version")
_IDLE: dict[str, tuple[Any, ...]] = {
    "_commit_hash": (None,),
    "_name_or_path": ("",),
    "chunk_size_feed_forward": (0,),
    "id2label": ({"0": "LABEL_0", "1": "LABEL_1"},),
    "is_encoder_decoder": (False,),
    "label2id": ({"LABEL_0": 0, "LABEL_1": 1},),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "pad2square": (False,),
    "problem_type": (None,),
    "return_dict": (True,),
    "use_backbone_lora": (0,),
    "use_llm_lora": (0,),
    "use_temporal": (False,),
}
_FRACTIONS = {  # transformers takes no whole number for these
    "": ("downsample_ratio",),
    "llm_config": ("attention_dropout",),
    "text_config": ("attention_dropout",),
    "vision_config": ("attention_dropout", "dropout", "hidden_dropout_prob"),
    "mixin_config": ("rope_theta",),
}
_VISION_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_TEXT_SIZES = ("vocab_size", *_VISION_SIZES, "num_key_value_heads")
_MIXIN_SIZES = ("language_dim", "vision_dim", "head_dim", "num_heads", "mixin_every_n_layers")


class Sizes:
    """Sizes that follow from the settings of a config and of its parts."""

    text_config: Any
    vision_config: Any
    mixin_config: Any
    downsample_ratio: float

    @property
    def side(self) -> int:
        """Tokens along a tile's side (16 for 448 px)."""
        patches = self.vision_config.image_size[0] // self.vision_config.patch_size[0]
        return int(patches * self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return self.side**2

    @property
    def mixin_layers(self) -> tuple[int, ...]:
        """Indices (0-based) of the decoder layers that have a mixin layer before them."""
        n = self.mixin_config.mixin_every_n_layers
        return tuple(range(n - 1, self.text_config.num_hidden_layers, n))


class PlainConfig(Sizes):
    """Settings of a config by name, and the sizes of its three parts."""

    llm_architecture: str
    force_image_size: int | None

    def __init__(self, settings: dict[str, Any]) -> None:
        vars(self).update(settings)


def read_plain(content: Any) -> PlainConfig | None:
    """Read a config as `CoMemoConfig.from_dict` does.

    Args:
        content: of config.json.

    Returns:
        The config; None if `CoMemoConfig` must read it, because something in it is unusual or
        wrong.
    """
    try:
        return _read(content)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        return None


def _read(content: dict[str, Any]) -> PlainConfig:
    rules = checks.WHOLE | checks.GENERAL
    _expect(content.get("model_type", MODEL_TYPE) == MODEL_TYPE)
    whole = PUBLISHED_BEHAVIOUR | _checked("", content, rules, _WHOLE)
    config = PlainConfig(DEFAULTS | whole)
    for name, allowed in CHOICES.items():
        _expect(name not in whole or whole[name] in allowed)
    config.text_config, config.llm_architecture = _text_of(whole)
    mixin = _checked("mixin_config", whole["mixin_config"], checks.MIXIN)
    config.mixin_config = SimpleNamespace(**{name: mixin[name] for name in _MIXIN_SIZES})
    vision = _checked("vision_config", whole["vision_config"], checks.VISION)
    pixels, patch = config.force_image_size or vision["image_size"], vision["patch_size"]
    config.vision_config = SimpleNamespace(
        **{name: vision[name] for name in _VISION_SIZES},
        image_size=_pair(pixels),
        patch_size=_pair(patch),
    )
    config.force_image_size = config.vision_config.image_size[0]
    checks.check_shapes(config)
    return config


def _text_of(whole: dict[str, Any]) -> tuple[SimpleNamespace, str]:
    """The sizes of the language model, and its class."""
    rules = checks.TEXT | {"architectures": checks.GENERAL["architectures"]}
    llm = _checked("llm_config", without_nulls(whole["llm_config"]), rules)
    architecture = llm["architectures"][0]
    _expect(architecture in LLM_MODEL_TYPES)
    scaling_of(llm.get("rope_scaling"))
    text = llm
    if "text_config" in whole:  # both describe one model
        text = _checked("text_config", whole["text_config"], checks.TEXT | checks.GENERAL, _TEXT)
        _expect(text.get("model_type") == LLM_MODEL_TYPES["LlamaForCausalLM"])
        for key in LLM_KEYS:
            _expect(key not in llm or key.endswith("_token_id") or text[key] == llm[key])
        _expect(text["attention_bias"] is llm[bias_key(architecture)])
        theta = float(llm["rope_theta"])
        _expect(text["rope_parameters"] == {"rope_type": "default", "rope_theta": theta})
    sizes = {name: text[name] for name in _TEXT_SIZES}
    _expect(None not in sizes.values())
    checks.check_heads("text_config", sizes)
    sizes["head_dim"] = text.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    return SimpleNamespace(**sizes), architecture


def _checked(
    part: str, given: dict[str, Any], rules: dict[str, checks.Rule], known: set[str] | None = None
) -> dict[str, Any]:
    """The settings of a part without those that name code; only `known` names if there are any."""
    given = {name: value for name, value in given.items() if name not in NAMES_OF_CODE}
    check_settings(part, rules, given)
    for name, value in given.items():
        _expect(known is None or name in known or name in _ANY or value in _IDLE[name])
    _expect(all(type(given.get(name, 0.0)) is float for name in _FRACTIONS[part]))
    return given


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _expect(usual: bool) -> None:
    if not usual:
        raise ValueError("read_plain: wanted a usual config, got another one")
