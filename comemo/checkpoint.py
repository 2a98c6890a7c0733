"""Published checkpoints: their weight names, and strict loading.

transformers' own conversion translates the names, so sharding, device maps and low-memory loading
work; `save_pretrained` applies the same table in reverse.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    ConversionOps,
    WeightConverter,
    WeightRenaming,
)

from comemo.config import CoMemoConfig
from comemo.parallel.launch import take_division
from comemo.parallel.pretrained import load_divided, saved_whole
from comemo.safety.files import check_weights, find_file, hub_options, read_json
from comemo.weights.fusable import refuse_folded
from comemo.weights.fused_files import name_source, quantises, split_fused
from comemo.weights.placed import free_layers
from comemo.weights.quantised import speed_up
from comemo.weights.quantising import check_quantised, check_savable

PUBLISHED = re.compile(r"vision_model\.|mlp1\.|language_model\.(model|output|lm_head)\.")

# Regular expression of the published name -> name here. Order matters when saving: the table is
# read from its end, and a more specific name (.mixin.mlp.) must come before a general one (.mlp.).
VISION = [
    (r"^vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
    (
        r"^vision_model\.embeddings\.position_embedding",
        "model.vision_tower.embeddings.position_embeddings",
    ),
    (
        r"^vision_model\.embeddings\.patch_embedding\.",
        "model.vision_tower.embeddings.patch_embeddings.projection.",
    ),
    (r"^vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
    (r"\.ls1", ".lambda_1"),
    (r"\.ls2", ".lambda_2"),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.q_norm\.", ".attention.q_norm."),
    (r"\.attn\.k_norm\.", ".attention.k_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"^mlp1\.", "model.multi_modal_projector."),
]
MIXIN = [
    (r"\.gated_cross_attn_layer\.cross_attention_norm\.", ".mixin.attn_norm."),
    (r"\.gated_cross_attn_layer\.cross_attn\.to_q\.", ".mixin.q_proj."),
    (r"\.gated_cross_attn_layer\.cross_attn\.to_kv\.", ".mixin.kv_proj."),
    (r"\.gated_cross_attn_layer\.cross_attn\.to_out\.", ".mixin.o_proj."),
    (r"\.gated_cross_attn_layer\.attn_gate", ".mixin.attn_gate"),
    (r"\.gated_cross_attn_layer\.ff_gate", ".mixin.mlp_gate"),
    (r"\.gated_cross_attn_layer\.ffn_norm_2\.", ".mixin.mlp_norm."),
    (r"\.gated_cross_attn_layer\.ffn_2\.w1\.", ".mixin.mlp.gate_proj."),
    (r"\.gated_cross_attn_layer\.ffn_2\.w3\.", ".mixin.mlp.up_proj."),
    (r"\.gated_cross_attn_layer\.ffn_2\.w2\.", ".mixin.mlp.down_proj."),
]
LLM = {
    "InternLM2ForCausalLM": [
        (r"\.decoder_layer\.attention\.wo\.", ".self_attn.o_proj."),
        (r"\.decoder_layer\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"\.decoder_layer\.feed_forward\.w3\.", ".mlp.up_proj."),
        (r"\.decoder_layer\.feed_forward\.w2\.", ".mlp.down_proj."),
        (r"\.decoder_layer\.attention_norm\.", ".input_layernorm."),
        (r"\.decoder_layer\.ffn_norm\.", ".post_attention_layernorm."),
        (r"^model\.language_model\.tok_embeddings\.", "model.language_model.embed_tokens."),
        (r"^language_model\.output\.", "lm_head."),
    ],
    "LlamaForCausalLM": [
        (r"\.decoder_layer\.self_attn\.", ".self_attn."),
        (r"\.decoder_layer\.mlp\.gate_proj\.", ".mlp.gate_proj."),
        (r"\.decoder_layer\.mlp\.up_proj\.", ".mlp.up_proj."),
        (r"\.decoder_layer\.mlp\.down_proj\.", ".mlp.down_proj."),
        (r"\.decoder_layer\.input_layernorm\.", ".input_layernorm."),
        (r"\.decoder_layer\.post_attention_layernorm\.", ".post_attention_layernorm."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ],
}
DECODER = [(r"^language_model\.model\.", "model.language_model.")]
# For reading, one table for both language models: each rule matches in a checkpoint of either.
READING = [
    (r"\.decoder_layer\.(?:attention\.wo|self_attn\.o_proj)\.", ".self_attn.o_proj."),
    (r"\.decoder_layer\.(?:attention\.(?=wqkv)|self_attn\.(?=[qkv]_proj))", ".self_attn."),
    (r"\.decoder_layer\.(?:feed_forward\.w1|mlp\.gate_proj)\.", ".mlp.gate_proj."),
    (r"\.decoder_layer\.(?:feed_forward\.w3|mlp\.up_proj)\.", ".mlp.up_proj."),
    (r"\.decoder_layer\.(?:feed_forward\.w2|mlp\.down_proj)\.", ".mlp.down_proj."),
    (r"\.decoder_layer\.(?:attention_norm|input_layernorm)\.", ".input_layernorm."),
    (r"\.decoder_layer\.(?:ffn_norm|post_attention_layernorm)\.", ".post_attention_layernorm."),
    (
        r"^language_model\.model\.(?:tok_embeddings|embed_tokens)\.",
        "model.language_model.embed_tokens.",
    ),
    (r"^language_model\.model\.(?=layers|norm)", "model.language_model."),
    (r"^language_model\.(?:output|lm_head)\.", "lm_head."),
]


class SplitGroupedQKV(ConversionOps):
    """Splits InternLM2's fused weight, rows (kv head, [q..., k, v], D), into q, k and v."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict, source_patterns: list, target_patterns: list, config: Any, **_: Any
    ) -> dict[str, Tensor]:
        (fused,) = (_one(t) for t in input_dict.values())
        group, dim = _group(config)
        if fused.shape[0] % ((group + 2) * dim):  # reported later, as a wrong shape
            parts = (fused, fused[:0], fused[:0])
        else:
            rows = rearrange(fused, "(kv qkv d) ... -> kv qkv d ...", qkv=group + 2, d=dim)
            by_kind = rows.split([group, 1, 1], dim=1)  # q, k, v
            parts = tuple(rearrange(x, "kv n d ... -> (kv n d) ...") for x in by_kind)
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseGroupedQKV()


class FuseGroupedQKV(ConversionOps):
    """The inverse of `SplitGroupedQKV`."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict, source_patterns: list, target_patterns: list, config: Any, **_: Any
    ) -> dict[str, Tensor]:
        group, dim = _group(config)
        parts = [
            rearrange(_one(input_dict[name]), "(kv n d) ... -> kv n d ...", n=heads, d=dim)
            for name, heads in zip(source_patterns, (group, 1, 1), strict=True)  # q, k, v
        ]
        fused = rearrange(torch.cat(parts, 1), "kv qkv d ... -> (kv qkv d) ...")
        return {target_patterns[0]: fused.contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitGroupedQKV()


def _one(value: Tensor | list[Tensor]) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _group(config: Any) -> tuple[int, int]:
    """Query heads per key-value head, and the head dimension."""
    text = getattr(config, "text_config", config)
    return text.num_attention_heads // text.num_key_value_heads, text.head_dim


Fused = tuple[str, list[str], ConversionOps]  # part of the published name, of those here


def _vision_qkv() -> Fused:
    return ".attn.qkv.", [f".attention.{name}_proj." for name in "qkv"], Chunk(dim=0)


def _rules(
    renamings: list[tuple[str, str]], fused: list[Fused]
) -> list[WeightRenaming | WeightConverter]:
    return [
        *(WeightRenaming(old, new) for old, new in renamings),
        *(WeightConverter([old], new, operations=[operation]) for old, new, operation in fused),
    ]


def conversions(architecture: str) -> list[WeightRenaming | WeightConverter]:
    """The table for a language model that `save_pretrained` applies in reverse."""
    fused = [_vision_qkv()]
    if architecture == "InternLM2ForCausalLM":
        names = [f".self_attn.{name}_proj." for name in "qkv"]
        fused.append((".decoder_layer.attention.wqkv.", names, SplitGroupedQKV()))
    return _rules(VISION + DECODER + LLM[architecture] + MIXIN, fused)


def _reading() -> tuple[list[tuple[str, str]], list[Fused]]:
    names = [f".{name}_proj." for name in "qkv"]
    return VISION + READING + MIXIN, [_vision_qkv(), (".wqkv.", names, SplitGroupedQKV())]


def from_published(weights: Mapping[str, Any], config: CoMemoConfig) -> dict[str, Any]:
    """Convert weights to the names used here.

    Args:
        weights: published name -> weight, all weights of a checkpoint or some.
        config: of the model.
    """
    renamings, fused = _reading()
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        for pattern, ours in renamings:
            name = re.sub(pattern, ours, name, count=1)
        parts = {name: weight}
        for old, new, operation in fused:
            if old in name:
                targets = [name.replace(old, part) for part in new]
                parts = operation.convert({name: weight}, [name], targets, config=config)
        found |= parts
    return found


register_checkpoint_conversion_mapping(CoMemoConfig.model_type, _rules(*_reading()), overwrite=True)


class PublishedCheckpoint:
    """Strict `from_pretrained` and a `save_pretrained` that writes the published layout."""

    config: CoMemoConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights in the published layout or under the names used here; runs no code of it.

        `trust_remote_code` has no effect. With `tp_plan="auto"`, or `distributed_config` with
        `tp_size` or `pp_size`, the ranks of torchrun divide the model, see `take_division`.

        Raises:
            ValueError: missing, unexpected or wrongly shaped weights, all listed; weights that are
                pickles; an adapter in the same directory; a checkpoint of another model.
        """
        directory, hub = pretrained_model_name_or_path, hub_options(kwargs)
        kwargs.pop("trust_remote_code", None)
        if directory is not None and os.path.isdir(directory):
            check_weights(Path(directory), kwargs.get("config") is not None)
        if directory is not None and find_file(directory, "adapter_config.json", **hub):
            raise ValueError(
                f"{cls.__name__}.from_pretrained({directory}): adapter_config.json must not be in"
                " the same directory as the weights, because it can name code to import: keep the"
                " adapter in its own directory and load it with load_adapter"
            )
        function = f"{cls.__name__}.from_pretrained"
        if directory is not None and (division := take_division(function, kwargs)) is not None:
            model = load_divided(cls, directory, division, kwargs, from_published, hub)
            _read_token_ids(model, directory, hub)
            return (model, {}) if kwargs.get("output_loading_info") else model
        kwargs["use_safetensors"] = kwargs["weights_only"] = True
        kwargs["ignore_mismatched_sizes"] = True  # reported below, all at once
        wants_info = kwargs.pop("output_loading_info", False)
        source = directory
        if directory is not None and quantises(cls, directory, kwargs, hub):
            source = split_fused(cls, directory, kwargs, from_published, hub)
        model, info = super().from_pretrained(  # type: ignore[misc]
            source, *args, output_loading_info=True, **kwargs
        )
        faults = [
            f"{kind}: {sorted(str(key) for key in info[kind])}"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
            if info.get(kind)
        ]
        if faults:
            raise ValueError(f"{cls.__name__}.from_pretrained({directory}): " + "; ".join(faults))
        if directory is not None:
            if source is None:
                name_source(model, directory, hub)
            _read_token_ids(model, directory, hub)
        if getattr(model, "hf_device_map", None):
            free_layers(model.base_model)
        if getattr(model, "hf_quantizer", None) is not None:
            check_quantised(function, model)
            speed_up(model)
        return (model, info) if wants_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the published layout, or with `save_original_format=False` the names used here.

        Of a model that ranks divide all ranks call, and the first writes the whole. A
        `CoMemoModel` writes the same names, except those of the language modelling head. Weights
        that torchao quantised are always written under the names used here.

        Raises:
            ValueError: the model is folded for inference, or quantised in a form that cannot be
                saved.
        """
        refuse_folded("save_pretrained", self)
        if check_savable("save_pretrained", self):
            kwargs["save_original_format"] = False
        self._weight_conversions = conversions(self.config.llm_architecture)
        prefix = self._prefix_of_names()
        if prefix and kwargs.get("save_original_format", True):
            state = kwargs.get("state_dict") or self.state_dict()  # type: ignore[attr-defined]
            kwargs["state_dict"] = {prefix + name: weight for name, weight in state.items()}
        with saved_whole(self, kwargs) as options:
            if options is not None:
                super().save_pretrained(*args, **options)  # type: ignore[misc]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in `nn.Module`, for weights under the names used here or under the published ones.

        Trainers use it to load what `save_pretrained` wrote, whole or shard by shard.

        Args:
            state_dict: name -> weight.
            strict: whether all weights must be given.
            assign: as in `nn.Module`.

        Returns:
            The missing names, none if `strict`, and no unexpected names.

        Raises:
            ValueError: weights that are unexpected, of another shape or, if `strict`, missing, all
                listed; a folded model: it would ignore the norms and gates that it loads. Nothing
                was loaded then.
        """
        refuse_folded("load_state_dict", self)
        own = self.state_dict()  # type: ignore[attr-defined]
        prefix = self._prefix_of_names()
        if any(PUBLISHED.match(name) for name in state_dict):
            state_dict = from_published(state_dict, self.config)
            if prefix:  # this model has no head
                state_dict = {
                    name.removeprefix(prefix): weight
                    for name, weight in state_dict.items()
                    if name.startswith(prefix)
                }
        unexpected = sorted(state_dict.keys() - own.keys())
        missing = sorted(own.keys() - state_dict.keys()) if strict else []
        shapes = [
            f"{name} {tuple(weight.shape)} for {tuple(own[name].shape)}"
            for name, weight in state_dict.items()
            if name in own and hasattr(weight, "shape") and weight.shape != own[name].shape
        ]
        faults = {"unexpected": unexpected, "missing": missing, "of another shape": shapes}
        if any(faults.values()):
            listed = "; ".join(f"{kind}: {names}" for kind, names in faults.items() if names)
            raise ValueError(f"{type(self).__name__}.load_state_dict: weights {listed}")
        return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]

    def _prefix_of_names(self) -> str:
        """The prefix of published names that a model without a head does not have."""
        has_base = hasattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        return "" if has_base else f"{self.base_model_prefix}."  # type: ignore[attr-defined]


def _read_token_ids(model: PreTrainedModel, directory: Any, hub: dict[str, Any]) -> None:
    """Read from the tokenizer's files what published configs lack: image token, stop token."""
    settings = read_json(directory, "tokenizer_config.json", **hub)
    added = settings.get("added_tokens_decoder", {})
    ids = {token["content"]: int(index) for index, token in added.items()}
    if model.config.image_token_id is None:
        model.config.image_token_id = ids.get("<IMG_CONTEXT>")
    end, generation = ids.get("<|im_end|>"), getattr(model, "generation_config", None)
    if generation is not None and end is not None:
        stops = generation.eos_token_id if generation.eos_token_id is not None else []
        stops = [stops] if isinstance(stops, int) else list(stops)
        generation.eos_token_id = [*stops, end] if end not in stops else stops
