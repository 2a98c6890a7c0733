"""The decoder: Llama's blocks, and before every n-th of them a mixin layer.

Source: CoMemo (arXiv:2506.06279), sections on the memory path and RoPE-DHR.

Letters: B prompts, N tokens of a prompt, M tokens of the image memory, H heads, D head
dimension, d width of the language model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

import comemo_kernels as ops
from comemo.config import CoMemoConfig
from comemo.mixin import EPS, MixinLayer, Table
from comemo.plain import are_joined, is_plain, is_untouched, join_weights
from comemo_kernels import ImageMemory, QueryRotation


class CoMemoAttention(LlamaAttention):
    """Llama's self-attention with the rotation in float32, as published."""

    qkv: Tensor | None = None  # [(H + 2 G) D, d], of which the weights of all three are views

    def join(self) -> None:
        """Lay the weights of q, k and v behind one another, for one product."""
        self.qkv = join_weights(self.q_proj, self.k_proj, self.v_proj)

    def joined(self) -> bool:
        """Whether `qkv` still is what q, k and v are computed from."""
        if self.qkv is None:
            return False
        # A compiled step has no addresses; it trusts what it was compiled for.
        return torch.compiler.is_compiling() or are_joined(
            self.qkv, self.q_proj, self.k_proj, self.v_proj
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "CoMemoAttention":
        super()._apply(fn, recurse)  # moves or converts each weight by itself
        if self.qkv is not None and not self.joined():
            self.join()
        return self

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Table,
        attention_mask: Any = None,
        past_key_values: Any = None,
        residual: Tensor | None = None,
        eps: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Llama's, on normed hidden_states [B, N, d]; or on plain modules in fewer launches.

        With `residual` [B, N, d] the output has it added. With `eps`, of a norm that is folded
        into `qkv`, hidden_states are not normed yet.
        """
        B, N, _ = hidden_states.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        if eps is None or self.qkv is None:
            q, k, v = (proj(hidden_states) for proj in projections)
        else:
            qkv = ops.norm_linear(hidden_states, None, self.qkv, eps)
            q, k, v = qkv.split([proj.out_features for proj in projections], -1)
        q, k, v = (t.view(B, N, -1, self.head_dim) for t in (q, k, v))
        q, k = ops.apply_rotary(q, k, *position_embeddings)
        if hasattr(past_key_values, "attend"):  # of a decode loop: spans instead of a mask
            out, weights = past_key_values.attend(q, k, v, self.layer_idx), None
        else:
            out, weights = self._attend(q, k, v, attention_mask, past_key_values, **kwargs)
        out = out.reshape(B, N, -1)
        if residual is None:
            return self.o_proj(out), weights
        return ops.gated_residual(residual, out, self.o_proj.weight, None), weights

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, past_key_values: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """q [B, N, H, D] on keys and values [B, N, G, D] behind those of the cache."""
        N = q.shape[1]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, N, D]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        if N == 1 and self.config._attn_implementation == "sdpa" and not dropout:
            # Query heads that share a key head are rows of one: no key is repeated or read twice.
            q = q.view(len(q), k.shape[1], -1, self.head_dim)
            return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scaling), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)


class CoMemoDecoderLayer(LlamaDecoderLayer):
    """A decoder layer, behind a mixin layer where there is one."""

    folded = False  # whether the projections hold the norms' weights

    def __init__(self, config: CoMemoConfig, layer_idx: int) -> None:
        super().__init__(config.text_config, layer_idx)
        self.layer_idx = layer_idx
        self.self_attn = CoMemoAttention(config.text_config, layer_idx)
        has_mixin = layer_idx in config.mixin_layers
        self.mixin = MixinLayer(config.mixin_config) if has_mixin else None

    def forward(
        self,
        hidden_states: Tensor,
        image_memory: ImageMemory | None = None,
        rotation: QueryRotation | None = None,
        media_table: Table | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        if self.mixin is not None and image_memory is not None:
            if self.layer_idx in image_memory.keys:
                key = image_memory.keys[self.layer_idx]
                value = image_memory.values[self.layer_idx]
            else:
                # Built here and not ahead of the layers: sharding and offloading hooks make a
                # layer's weights whole only while its forward runs.
                if image_memory.media is None or media_table is None:
                    raise ValueError(
                        f"CoMemo: the image memory has neither keys of mixin layer {self.layer_idx}"
                        " nor the media to build them from"
                    )
                key, value = self.mixin.build(image_memory.media, media_table)
                if use_cache:
                    image_memory.update(self.layer_idx, key, value)
            scales = image_memory.scales.get(self.layer_idx)
            hidden_states = self.mixin(hidden_states, key, value, image_memory, rotation, scales)
        x = self._attend(hidden_states, use_cache=use_cache, **kwargs)
        norm, mlp = self.post_attention_layernorm, self.mlp
        if not is_plain(norm, mlp):
            return x + mlp(norm(x))
        weight = None if self.folded else norm.weight
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        wide = ops.norm_swiglu(x, weight, gate, up, norm.variance_epsilon)
        return ops.gated_residual(x, wide, mlp.down_proj.weight, None)

    def _attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x [B, N, d] and what the self-attention reads."""
        norm, attention = self.input_layernorm, self.self_attn
        parts = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        if not (is_untouched(attention) and is_plain(norm, *parts)):
            return x + attention(hidden_states=norm(x), **kwargs)[0]
        if self.folded and attention.joined():
            eps = norm.variance_epsilon
            return attention(hidden_states=x, residual=x, eps=eps, **kwargs)[0]
        # By the modules, for three launches would norm three times over.
        return attention(hidden_states=norm(x), residual=x, **kwargs)[0]


class CoMemoTextModel(LlamaPreTrainedModel):
    """The decoder: embeddings, layers with their mixin layers, final norm."""

    _no_split_modules = ["CoMemoDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "image_memory"]
    _can_record_outputs = {"hidden_states": CoMemoDecoderLayer, "attentions": CoMemoAttention}

    def __init__(self, config: CoMemoConfig) -> None:
        text = config.text_config
        super().__init__(text)  # its attention implementation can then be set like any model's
        self.comemo_config = config
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size, text.pad_token_id)
        self.layers = nn.ModuleList(
            CoMemoDecoderLayer(config, i) for i in range(text.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MixinLayer):  # a fresh mixin layer is the identity
            init.zeros_(module.attn_gate)
            init.zeros_(module.mlp_gate)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        image_memory: ImageMemory | None = None,
        query_position_ids: Tensor | None = None,
        token_counts: Tensor | None = None,
        rope_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        text, x = self.config, inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=text)
        if rope_lengths is None:
            if token_counts is None:
                token_counts = _count_tokens(x, attention_mask, past_key_values)
            rope_lengths = self.rope_lengths(position_ids, token_counts)
        place_in_sample = None
        if cu_seqlens is not None:
            place = torch.arange(x.shape[1], device=x.device)
            sample = torch.searchsorted(cu_seqlens, place, right=True) - 1
            place_in_sample = (place - cu_seqlens[sample])[None]
            longest = int(cu_seqlens.diff().max())
            lengths = cu_seqlens.to(torch.int32)
            kwargs.update(cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
            kwargs.update(max_length_q=longest, max_length_k=longest)
        mask = None
        if not hasattr(past_key_values, "attend"):
            mask = create_causal_mask(
                config=text,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                # Of a packed row only: RoPE-DHR ids repeat and would be taken for packed samples.
                position_ids=place_in_sample,
            )
        tables: dict[str, Any] = {
            "position_embeddings": self._self_table(x, position_ids, rope_lengths)
        }
        if image_memory is not None:
            places = position_ids if query_position_ids is None else query_position_ids
            tables |= self._prepare_memory(image_memory, x, places, bool(use_cache))
        for layer in self.layers:
            x = layer(
                x,
                image_memory=image_memory,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **tables,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values
        )

    def rope_lengths(self, position_ids: Tensor, token_counts: Tensor) -> Tensor:
        """[B], what dynamic scaling goes by, of prompts with ids [B, N] and so many tokens [B]."""
        by_position = self.comemo_config.ntk_length == "position"
        return position_ids.amax(1) + 1 if by_position else token_counts

    def _self_table(self, x: Tensor, position_ids: Tensor, rope_lengths: Tensor) -> Table:
        text, scaling = self.config, self.comemo_config.rope_scaling or {"type": None}
        if scaling["type"] == "linear":
            position_ids = position_ids / scaling["factor"]
        dynamic = {}
        if scaling["type"] == "dynamic":
            dynamic = {
                "factor": scaling["factor"],
                "length": rope_lengths,
                "max_length": text.max_position_embeddings,
            }
        table = ops.rotary_table(
            position_ids, text.head_dim, text.rope_parameters["rope_theta"], **dynamic
        )
        # Published: the angles' sine and cosine are rounded to the activations' dtype.
        return table[0].to(x.dtype), table[1].to(x.dtype)

    def _prepare_memory(
        self, memory: ImageMemory, x: Tensor, places: Tensor, use_cache: bool
    ) -> dict[str, Any]:
        """What mixin layers need beside the memory; its keys and values, if that can be now."""
        self._give_table(memory, x)
        tables: dict[str, Any] = {"rotation": memory.rotation(places)}
        if len(memory.keys) == len(self.comemo_config.mixin_layers) or memory.media is None:
            return tables
        if not (use_cache and memory.keeps and self.build_memory(memory)):
            cos, sin = memory.key_table()
            tables["media_table"] = cos[None], sin[None]
        return tables

    def _give_table(self, memory: ImageMemory, x: Tensor) -> None:
        if memory.table is None:
            # Generated text may go on behind the trained range.
            mixin = self.comemo_config.mixin_config
            length = 2 * mixin.max_position_embeddings
            cos, sin = ops.distance_table(mixin.head_dim, mixin.rope_theta, length, x.device)
            if memory.absolute:  # published: rounded to the activations' dtype
                cos, sin = cos.to(x.dtype), sin.to(x.dtype)
            memory.table = cos, sin

    def build_memory(self, memory: ImageMemory) -> bool:
        """Build keys and values of all mixin layers at once, ahead of the first forward.

        Args:
            memory: one with media and without keys, which is filled. A memory with media gets its
                table of angles in any case.

        Returns:
            Whether that was possible: the layers' weights have to be at hand, of one dtype and on
            one device, and no gradients be asked for. Otherwise each layer builds its own when it
            is first called.
        """
        if memory.media is None or memory.ids is None:
            return False
        self._give_table(memory, memory.media)  # copies for readers must have it
        if memory.keys:
            return False
        media, ids, table = memory.media, memory.ids, memory.table
        layers = {i: self.layers[i].mixin for i in self.comemo_config.mixin_layers}
        assert table is not None
        if not is_plain(
            *(part for mixin in layers.values() for part in (mixin.attn_norm, mixin.kv_proj))
        ):
            return False
        weights = [mixin.kv_proj.weight for mixin in layers.values()]
        norms = [mixin.attn_norm.weight for mixin in layers.values() if not mixin.folded]
        parameters = (media, *weights, *norms)
        if torch.is_grad_enabled() and any(t.requires_grad for t in parameters):
            return False
        devices = {t.device for t in (*parameters, *table)}
        if devices != {media.device} or {t.dtype for t in parameters} != {media.dtype}:
            return False
        mixin = self.comemo_config.mixin_config
        shape = (len(layers), len(media), mixin.num_heads, mixin.head_dim)
        keys, values = ops.memory_buffers(*shape, media.dtype, media.device).unbind(0)
        ops.build_memory(
            media,
            weights,
            norms or None,
            *table,
            ids,
            list(keys.unbind(0)),
            list(values.unbind(0)),
            eps=EPS,
        )
        for index, key, value in zip(layers, keys.unbind(0), values.unbind(0), strict=True):
            memory.update(index, key, value)
        return True


def _count_tokens(x: Tensor, attention_mask: Any, past_key_values: Any) -> Tensor:
    """[B] tokens so far, padding not counted."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask.sum(1)
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    return torch.zeros(x.shape[0], device=x.device, dtype=torch.long) + (past + x.shape[1])
