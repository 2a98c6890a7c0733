"""The published language model: Llama with a fused qkv projection, tuples as KV cache.

Source: InternLM2 (arXiv:2403.17297) as CoMemo ships it, without its flash attention.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from bench.published_model.parts import (
    InternLM2DynamicNTKScalingRotaryEmbedding,
    InternLM2MLP,
    InternLM2RMSNorm,
    InternLM2RotaryEmbedding,
    rotate,
)


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"
    has_no_defaults_at_init = True

    def __init__(self, **settings: Any) -> None:
        own = {
            "vocab_size": 92544,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-5,
            "bias": False,
            "rope_theta": 1e6,
        }
        own |= {name: value for name, value in settings.items() if name in own}
        tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
        super().__init__(**{name: settings.get(name) for name in tokens})
        self.use_cache = True
        self.tie_word_embeddings = False
        for name, value in own.items():
            setattr(self, name, value)
        scaling = settings.get("rope_scaling", {"type": "dynamic", "factor": 2.0})
        self.rotary_scaling = None if scaling is None else dict(scaling)
        self.architectures = ["InternLM2ForCausalLM"]


class InternLM2Attention(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.is_causal = True
        wide = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.wqkv = nn.Linear(self.hidden_size, wide, bias=config.bias)
        self.wo = nn.Linear(self.num_heads * self.head_dim, self.hidden_size, bias=config.bias)
        longest, theta = config.max_position_embeddings, config.rope_theta
        scaling = config.rotary_scaling
        if scaling is None:
            self.rotary_emb = InternLM2RotaryEmbedding(self.head_dim, longest, theta)
        else:
            assert scaling["type"] == "dynamic", scaling
            self.rotary_emb = InternLM2DynamicNTKScalingRotaryEmbedding(
                self.head_dim, longest, theta, scaling["factor"]
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        B, N, _ = hidden_states.shape
        groups = self.num_key_value_groups
        qkv = self.wqkv(hidden_states).unflatten(-1, (-1, groups + 2, self.head_dim))
        q = qkv[..., :groups, :].flatten(2, 3).transpose(1, 2)  # [B, H, N, D]
        k, v = (qkv[..., i, :].transpose(1, 2) for i in (-2, -1))  # [B, G, N, D]
        length = N + (0 if past_key_value is None else past_key_value[0].shape[-2])
        cos, sin = self.rotary_emb(v, seq_len=length)
        q, k = (rotate(t, cos, sin, position_ids) for t in (q, k))
        if past_key_value is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past_key_value, (k, v), strict=True))
        past_key_value = (k, v) if use_cache else None
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out = self.wo((weights @ v).transpose(1, 2).reshape(B, N, self.hidden_size))
        return out, weights if output_attentions else None, past_key_value


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.attention = InternLM2Attention(config)
        self.feed_forward = InternLM2MLP(config.hidden_size, config.intermediate_size)
        self.attention_norm = InternLM2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = InternLM2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        out, weights, past = self.attention(
            hidden_states=self.attention_norm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = hidden_states + out
        hidden_states = hidden_states + self.feed_forward(self.ffn_norm(hidden_states))
        extra = ((weights,) if output_attentions else ()) + ((past,) if use_cache else ())
        return (hidden_states, *extra)


class InternLM2PreTrainedModel(PreTrainedModel):
    config_class = InternLM2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternLM2DecoderLayer"]
    _skip_keys_device_placement = "past_key_values"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)


def causal_mask(mask: Tensor | None, hidden_states: Tensor, past: int) -> Tensor:
    """An additive mask [B, 1, N, past + N] from a padding mask [B, past + N]."""
    B, N, _ = hidden_states.shape
    least = torch.finfo(hidden_states.dtype).min
    rows = torch.arange(past, past + N, device=hidden_states.device)
    seen = torch.arange(past + N, device=hidden_states.device) <= rows[:, None]
    seen = seen.expand(B, 1, N, past + N)
    if mask is not None:
        seen = seen & mask[:, None, None, :].bool()
    return torch.zeros(seen.shape, dtype=hidden_states.dtype, device=seen.device).masked_fill(
        ~seen, least
    )


class InternLM2Model(InternLM2PreTrainedModel):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            InternLM2DecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = InternLM2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if inputs_embeds is None:
            inputs_embeds = self.tok_embeddings(input_ids)
        N = inputs_embeds.shape[1]
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if position_ids is None:
            position_ids = torch.arange(past, past + N, device=inputs_embeds.device)[None]
        mask = causal_mask(attention_mask, inputs_embeds, past)
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = use_cache and not checkpointing
        hidden_states = inputs_embeds
        all_states: tuple[Tensor, ...] = ()
        all_weights: tuple[Tensor, ...] = ()
        cache: tuple[Any, ...] = ()
        for index, decoder_layer in enumerate(self.layers):
            all_states += (hidden_states,)
            if checkpointing:
                outputs = torch.utils.checkpoint.checkpoint(
                    decoder_layer, hidden_states, mask, position_ids, use_reentrant=False
                )
            else:
                outputs = decoder_layer(
                    hidden_states,
                    attention_mask=mask,
                    position_ids=position_ids,
                    past_key_value=None if past_key_values is None else past_key_values[index],
                    output_attentions=bool(output_attentions),
                    use_cache=use_cache,
                )
            hidden_states = outputs[0]
            if use_cache:
                cache += (outputs[-1],)
            if output_attentions:
                all_weights += (outputs[1],)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=(*all_states, hidden_states) if output_hidden_states else None,
            attentions=all_weights if output_attentions else None,
        )


class InternLM2ForCausalLM(InternLM2PreTrainedModel):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.vocab_size = config.vocab_size
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return CausalLMOutputWithPast(
            logits=self.output(outputs[0]).float(),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if past_key_values is not None:
            past = past_key_values[0][0].shape[2]
            first = past if input_ids.shape[1] > past else input_ids.shape[1] - 1
            input_ids = input_ids[:, first:]
        position_ids = kwargs.get("position_ids")
        if attention_mask is not None and position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(
                attention_mask == 0, 1
            )
            if past_key_values:
                position_ids = position_ids[:, -input_ids.shape[1] :]
        embedded = inputs_embeds is not None and past_key_values is None
        return {
            "inputs_embeds" if embedded else "input_ids": inputs_embeds if embedded else input_ids,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": attention_mask,
        }

    @staticmethod
    def _reorder_cache(past_key_values: Any, beam_idx: Tensor) -> tuple[Any, ...]:
        return tuple(
            tuple(t.index_select(0, beam_idx.to(t.device)) for t in pair)
            for pair in past_key_values
        )
