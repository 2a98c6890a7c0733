"""The published mixin layers: gated cross-attention that projects the image for every token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.published_model.parts import (
    InternLM2MLP,
    InternLM2RMSNorm,
    InternLM2RotaryEmbedding,
    rotate,
)


class CrossAttention(nn.Module):
    """State of a call is set on it from outside, as published."""

    media_attn_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        inner = self.heads * self.head_dim
        self.to_q = nn.Linear(config.language_dim, inner, bias=False)
        self.to_kv = nn.Linear(config.vision_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.language_dim, bias=False)
        self.rotary_emb = InternLM2RotaryEmbedding(self.head_dim, 32768, 1000000)
        self.text_position_ids: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        use_cached_media: bool = False,
        media_position_ids: Any = None,
        text_position_ids: Any = None,
        text_time: Tensor | None = None,
    ) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, N, D]

        q = heads(self.to_q(x))
        k, v = (heads(t) for t in self.to_kv(media).chunk(2, -1))
        ids = text_position_ids
        if use_cached_media and self.text_position_ids is not None:
            ids = self.text_position_ids[:, -1:]
        cos, sin = self.rotary_emb(v, seq_len=ids.max().item() + 1)
        q = rotate(q, cos, sin, ids)
        if use_cached_media:
            if self.text_position_ids is None:
                self.text_position_ids = text_position_ids
            known = self.text_position_ids
            assert known is not None
            known = torch.cat([known, known.new_tensor([[known.shape[1]]])], 1)
            self.text_position_ids = known
        cos, sin = self.rotary_emb(v, seq_len=media_position_ids.max().item() + 1)
        k = rotate(k, cos, sin, media_position_ids)
        if self.cu_seqlens_q is not None and self.cu_seqlens_k is not None:
            # Flash attention of packed rows, one sample after the other.
            counts = self.cu_seqlens_q[0].diff().tolist(), self.cu_seqlens_k[0].diff().tolist()
            split = q.split(counts[0], 2), *(t.split(counts[1], 2) for t in (k, v))
            parts = zip(*split, strict=True)
            out = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)
        else:
            out = F.scaled_dot_product_attention(q, k, v, self.media_attn_mask)
        if text_time is not None:
            out = out.masked_fill((text_time == 1)[:, None, :, None], 0.0)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GatedCrossAttentionBlock(nn.Module):
    cross_attn_media_position_ids: Tensor | None = None
    cross_attn_text_position_ids: Tensor | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.cross_attention_norm = InternLM2RMSNorm(config.language_dim, eps=1e-5)
        self.ffn_norm_2 = InternLM2RMSNorm(config.language_dim, eps=1e-5)
        self.cross_attn = CrossAttention(config)
        self.attn_gate = nn.Parameter(torch.tensor([0.0]))
        self.ffn_2 = InternLM2MLP(config.language_dim, config.intermediate_size)
        self.ff_gate = nn.Parameter(torch.tensor([0.0]))
        self.media: Tensor | None = None

    def forward(self, x: Tensor, media: Tensor, use_cached_media: bool = False) -> Tensor:
        read = self.cross_attn(
            self.cross_attention_norm(x),
            self.cross_attention_norm(media),
            use_cached_media=use_cached_media,
            media_position_ids=self.cross_attn_media_position_ids,
            text_position_ids=self.cross_attn_text_position_ids,
        )
        x = read * self.attn_gate.tanh() + x
        return self.ffn_2(self.ffn_norm_2(x)) * self.ff_gate.tanh() + x


class MixinLayer(nn.Module):
    def __init__(self, gated_cross_attn_layer: nn.Module | None, decoder_layer: nn.Module) -> None:
        super().__init__()
        self.gated_cross_attn_layer = gated_cross_attn_layer
        self.decoder_layer = decoder_layer
        self.vis_x: Tensor | None = None
        self.use_cached_media = False

    def is_conditioned(self) -> bool:
        return self.vis_x is not None

    def condition_vis_x(self, vis_x: Tensor | None) -> None:
        self.vis_x = vis_x

    def condition_media(self, media: Any, text_position_ids: Any) -> None:
        block = self.gated_cross_attn_layer
        if block is not None:
            block.media = media
            block.cross_attn.text_position_ids = text_position_ids

    def condition_use_cached_media(self, use_cached_media: bool) -> None:
        self.use_cached_media = use_cached_media

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        if self.gated_cross_attn_layer is not None and self.vis_x is not None:
            hidden_states = self.gated_cross_attn_layer(
                hidden_states, self.vis_x, use_cached_media=self.use_cached_media
            )
        return self.decoder_layer(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            **kwargs,
        )


class LMMixin(nn.Module):
    """What the published code puts in front of the class of a language model's instance."""

    initialized_mixin = False

    def _get_decoder_layers(self) -> nn.ModuleList:
        return self.model.layers

    def init_mixin(self, config: Any) -> None:
        layers = [
            MixinLayer(
                GatedCrossAttentionBlock(config)
                if (index + 1) % config.mixin_every_n_layers == 0
                else None,
                layer,
            )
            for index, layer in enumerate(self._get_decoder_layers())
        ]
        self.model.layers = nn.ModuleList(layers)
        self.initialized_mixin = True
        self._use_cached_vision_x = False

    def forward(self, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(position_ids=position_ids, **kwargs)

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        standardize_cache_format: bool = False,
    ) -> dict[str, Any]:
        model_kwargs["past_key_values"] = self._extract_past_from_model_output(
            outputs, standardize_cache_format=standardize_cache_format
        )
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            model_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if model_kwargs["past_key_values"] and "position_ids" in model_kwargs:
            model_kwargs["position_ids"] = model_kwargs["position_ids"][:, -1:] + 1
        return model_kwargs

    def is_conditioned(self) -> bool:
        return all(layer.is_conditioned() for layer in self._get_decoder_layers())

    def clear_conditioned_layers(self) -> None:
        for layer in self._get_decoder_layers():
            layer.condition_vis_x(None)
            layer.condition_use_cached_media(False)
            layer.condition_media(None, None)


def extend_instance(model: nn.Module, mixin: type) -> None:
    """Put a class in front of that of one instance, under its name."""
    model.__class__ = type(type(model).__name__, (mixin, type(model)), {})
