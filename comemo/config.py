"""Configuration of CoMemo: reads and writes the published `config.json`.

A published file nests `llm_config`, `vision_config` and `mixin_config`, with the names of its own
code; here they become transformers' `LlamaConfig` and `InternVLVisionConfig` and `MixinConfig`.
Only known keys are read: an old file has about seventy legacy ones.
"""

from copy import deepcopy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from comemo.config_names import (
    LLM_KEYS,
    NAMES_OF_CODE,
    PUBLISHED_BEHAVIOUR,
    VISION_RENAMED,
    bias_key,
    scaling_of,
    without_nulls,
)
from comemo.config_parts import (
    attention_by_part,
    check_agreement,
    check_parts,
    make_text,
    make_vision,
    text_from_published,
)
from comemo.config_plain import Sizes
from comemo.safety import settings as checks
from comemo.safety.settings import (
    CHOICES,
    LLM_MODEL_TYPES,
    MODEL_TYPE,
    check_settings,
    shorten,
)

# What transformers raises for wrong settings without a rule here.
UNREADABLE = (
    StrictDataclassError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


class MixinConfig(PreTrainedConfig):
    """Gated image cross-attention layers.

    Args:
        language_dim: width of the text's hidden states.
        vision_dim: width of the projected image tokens; equal to `language_dim`, because both
            share one norm weight.
        head_dim, num_heads: of the cross-attention.
        intermediate_size: width of the gated feed-forward network.
        mixin_every_n_layers: a mixin layer runs before decoder layers n, 2n, ... (1-based).
        rope_theta: base of the rotary angles, never scaled.
        max_position_embeddings: all position ids are less than this.
    """

    model_type = "comemo_mixin"
    base_config_key = "mixin_config"

    language_dim: int = 2048
    vision_dim: int = 2048
    head_dim: int = 128
    num_heads: int = 16
    intermediate_size: int = 8192
    mixin_every_n_layers: int = 4
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768


class CoMemoConfig(Sizes, PreTrainedConfig):
    """Everything about a CoMemo model that is not a weight. Defaults: CoMemo-2B's sizes.

    Args:
        text_config, vision_config, mixin_config: of the three parts, as objects or dictionaries.
        llm_config: the language model with published names; instead of `text_config`.
        llm_architecture: the class whose weight names the checkpoint uses.
        select_layer: which hidden state of the vision tower is projected, -1 the last.
        ps_version: raster order of the 2 x 2 fold: "v2" keeps it, "v1" transposes it.
        downsample_ratio: side of the folded raster divided by that of the patches.
        force_image_size: side of a tile in pixels.
        template: name of the chat template.
        use_thumbnail, min_dynamic_patch, max_dynamic_patch: how images are tiled.
        image_token_id: id of `<IMG_CONTEXT>`; from_pretrained reads it from the tokenizer's files.
        rope: "dhr" gives tiles the ids of their thumbnail, "original" numbers tokens 0..N-1.
        tile_order: "row" maps tiles to ids by their place in the image; "column" is the published
            quirk.
        decode_positions: the position of the mixin query of generated tokens with "dhr":
            "compressed" as in self-attention, "raw" the token count (the published quirk).
        ntk_length: the length that starts dynamic-NTK scaling, the highest "position" or the
            "token_count".
        memory_positions: how keys of the image memory are rotated: "relative", by their position in
            the image, so that they fit any prompt, or as published "absolute", by their position
            in the prompt. Both give the same except for rounding.
        tiles_at_once: tiles in one pass of the vision tower, a bound on its memory.
        recompute: what the backward pass of a feed-forward network computes again: "cheap" its
            normed input and the product after SwiGLU, "projections" its gate and up projections
            too, which leaves only its input in memory.
        rope_scaling: None, or {"type": "dynamic" | "linear", "factor": float}.

    Raises:
        ValueError: a value outside the choices above, or dimensions that do not fit together.
    """

    model_type = MODEL_TYPE
    sub_configs = {
        "text_config": LlamaConfig,
        "vision_config": InternVLVisionConfig,
        "mixin_config": MixinConfig,
    }
    # Outputs that Trainer drops: its predictions are the logits, with images and without.
    keys_to_ignore_at_inference = ["cache", "past_key_values", "image_memory", "image_outputs"]

    text_config: Any = None
    vision_config: Any = None
    mixin_config: Any = None
    llm_architecture: str = "InternLM2ForCausalLM"
    select_layer: int = -1
    ps_version: str = "v2"
    downsample_ratio: float = 0.5
    force_image_size: int | None = None
    template: str = "internlm2-chat"
    use_thumbnail: bool = True
    dynamic_image_size: bool = True
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    image_token_id: int | None = None
    rope: str = "dhr"
    tile_order: str = "row"
    decode_positions: str = "compressed"
    ntk_length: str = "position"
    memory_positions: str = "relative"
    tiles_at_once: int = 16
    recompute: str = "cheap"
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, llm_config: dict | None = None, **kwargs: Any) -> None:
        parts = {"llm_config": llm_config, "text_config": self.text_config}
        parts |= {"vision_config": self.vision_config, "mixin_config": self.mixin_config}
        check_parts(parts)
        checks.check_names("", type(self), kwargs)
        check_settings("", checks.WHOLE | checks.GENERAL, vars(self) | kwargs)
        if isinstance(self.text_config, dict):
            self.text_config = make_text(self.text_config)
        if llm_config is not None:
            llm_config = without_nulls(llm_config)
            architecture = (llm_config.get("architectures") or [self.llm_architecture])[0]
            self.llm_architecture = architecture
            published = text_from_published(llm_config, architecture)
            if self.text_config is None:
                self.text_config = published
            else:  # `to_dict` writes both
                check_agreement(llm_config, published, self.text_config)
            self.rope_scaling = deepcopy(llm_config.get("rope_scaling"))
        elif self.text_config is None:
            self.text_config = text_from_published({}, self.llm_architecture)
            self.rope_scaling = self.rope_scaling or {"type": "dynamic", "factor": 2.0}
        if not isinstance(self.vision_config, InternVLVisionConfig):
            self.vision_config = make_vision(self.vision_config or {}, self.force_image_size)
        self.force_image_size = self.vision_config.image_size[0]
        if not isinstance(self.mixin_config, MixinConfig):
            known = MixinConfig.__annotations__
            given = self.mixin_config or {}
            self.mixin_config = MixinConfig(**{k: v for k, v in given.items() if k in known})
        super().__post_init__(**kwargs)
        self.check()

    def _take_scaling(self) -> None:
        """Move rotary scaling to `rope_scaling`, in one form, also if it is in `text_config`."""
        theirs = dict(self.text_config.rope_parameters or {})
        theta = theirs.pop("rope_theta", 10000.0)
        self.rope_scaling = scaling_of(self.rope_scaling)
        scaling = scaling_of(theirs)
        if scaling is None:
            return
        if self.rope_scaling not in (None, scaling):
            raise ValueError(
                f"CoMemoConfig: rope_scaling {self.rope_scaling} and the text's rope_parameters"
                f" {scaling} must not differ"
            )
        self.rope_scaling = scaling
        self.text_config = deepcopy(self.text_config)
        # The scaling stays here: Llama's follows other rules and stays on once it begins.
        self.text_config.rope_parameters = {"rope_type": "default", "rope_theta": theta}

    def check(self) -> None:
        """Refuse values that no model can have, also those set after construction.

        Raises:
            ValueError: a value outside its choices, dimensions that do not fit together, a rotary
                scaling that the model does not support.
        """
        self._take_scaling()
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                got = shorten(value)
                raise ValueError(f"CoMemoConfig: {name} must be one of {allowed}, got {got}")
        check_settings("", checks.WHOLE | checks.GENERAL, vars(self))
        check_settings("text_config", checks.TEXT | checks.GENERAL, vars(self.text_config))
        check_settings("vision_config", checks.VISION, vars(self.vision_config))
        check_settings("mixin_config", checks.MIXIN, vars(self.mixin_config))
        checks.check_shapes(self)

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, Any] | None) -> None:
        """Mixin layers change only by their own key: the names of users are for self-attention."""
        PreTrainedConfig._attn_implementation.fset(self, attention_by_part(value))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> "CoMemoConfig":
        """As in transformers; `trust_remote_code` has no effect, because code is never loaded."""
        for name in ("code_revision", "trust_remote_code"):
            kwargs.pop(name, None)
        kwargs["name_or_path"] = pretrained_model_name_or_path
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            return super().get_config_dict(*args, **kwargs)
        except UNREADABLE as error:
            raise _unreadable(error) from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "CoMemoConfig":
        if not isinstance(config_dict, dict):
            got = shorten(config_dict)
            raise ValueError(f"CoMemoConfig: a config must be a dictionary, got {got}")
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"CoMemoConfig: model_type must be {cls.model_type!r}, got"
                f" {shorten(config_dict['model_type'])}: this is a checkpoint of another model"
            )
        check_settings("", checks.GENERAL, config_dict)
        try:
            safe = _without_code({**PUBLISHED_BEHAVIOUR, **config_dict})
            return super().from_dict(safe, **kwargs)
        except UNREADABLE as error:
            raise _unreadable(error) from error

    @classmethod
    def from_json_file(cls, json_file: Any) -> "CoMemoConfig":
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def to_dict(self) -> dict[str, Any]:
        """The published layout, and in addition what transformers reads and the published code
        hard-codes: `text_config`, and the parts' values under transformers' names too."""
        output = super().to_dict()
        text, rope_scaling = output["text_config"], output.pop("rope_scaling")
        output["llm_config"] = {key: text[key] for key in LLM_KEYS} | {
            "architectures": [self.llm_architecture],
            "model_type": LLM_MODEL_TYPES[self.llm_architecture],
            "rope_theta": self.text_config.rope_parameters["rope_theta"],
            "rope_scaling": rope_scaling,
            bias_key(self.llm_architecture): text["attention_bias"],
        }
        del output["llm_architecture"]
        vision = output["vision_config"]
        vision |= {published: vision[ours] for published, ours in VISION_RENAMED.items()}
        vision["architectures"] = ["InternVisionModel"]
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        output = self.to_dict()  # all values: the published code has other defaults
        output.pop("_name_or_path", None)  # private: a path on the user's machine
        vision = output["vision_config"]  # in the form that the published code reads
        vision["model_type"] = "intern_vit_6b"
        for key in ("image_size", "patch_size"):
            vision[key] = vision[key][0]
        mixin = output["mixin_config"]
        output["mixin_config"] = {key: mixin[key] for key in MixinConfig.__annotations__}
        return output


def _without_code(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in NAMES_OF_CODE
    }


def _unreadable(error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"CoMemoConfig: the config cannot be read: {type(error).__name__}: {reason}")
