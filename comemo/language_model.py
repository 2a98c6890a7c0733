"""The language model: Llama's decoder layers, with a mixin layer before every n-th of them.

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
from comemo.attention import check_flash, known_attention
from comemo.config import CoMemoConfig
from comemo.memory.building import BuildsMemory
from comemo.mixin import KeyAngles, MixinLayer, feed_forward
from comemo.outputs import CACHE, OLD_NAME, CoMemoModelOutput, one_cache
from comemo.packed_attention import SampleGroups, attend_samples, group_samples
from comemo.packing import VARLEN, places_in_samples
from comemo.parallel.split import Split, enter, leave, own_weights
from comemo.weights.fusable import apply_linear, are_joined, is_fusable, is_untouched, join_weights
from comemo_kernels import ImageMemory, QueryRotation

Table = tuple[Tensor, Tensor]  # cos, sin [B, N, D/2]


class CoMemoAttention(LlamaAttention):
    """Llama's self-attention with the rotation in float32, as published."""

    qkv: Tensor | None = None  # [(H + 2 G) D, d]; the weights of q, k and v are views of it

    def join(self) -> None:
        """Concatenate the q, k and v weights, for one GEMM."""
        self.qkv = join_weights(self.q_proj, self.k_proj, self.v_proj)

    def joined(self) -> bool:
        """Whether the q, k and v weights still are views of `qkv`."""
        if self.qkv is None:
            return False
        # Tracing has no addresses; a compiled step assumes what it was compiled for.
        return torch.compiler.is_compiling() or are_joined(
            self.qkv, self.q_proj, self.k_proj, self.v_proj
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "CoMemoAttention":
        super()._apply(fn, recurse)  # moves or converts each weight separately
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
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Llama's self-attention of normed hidden_states [B, N, d].

        `residual` [B, N, d] is added to the output. With `eps`, of a norm that is folded into
        `qkv`, hidden_states are not normed yet.
        """
        cache = one_cache("CoMemoAttention", cache, past_key_values)
        B, N, _ = hidden_states.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        if eps is None or self.qkv is None:
            q, k, v = (apply_linear(proj, hidden_states) for proj in projections)
        else:
            qkv = ops.norm_linear(hidden_states, None, self.qkv, eps)
            q, k, v = qkv.split([proj.out_features for proj in projections], -1)
        q, k, v = (t.view(B, N, -1, self.head_dim) for t in (q, k, v))
        q, k = ops.apply_rotary(q, k, *position_embeddings)
        if hasattr(cache, "attend"):  # a decode loop: spans instead of a mask
            out, weights = cache.attend(q, k, v, self.layer_idx), None
        else:
            out, weights = self._attend(q, k, v, attention_mask, cache, **kwargs)
        out = out.reshape(B, N, -1)
        if residual is None:
            return self.o_proj(out), weights
        return ops.gated_residual(residual, out, self.o_proj.weight, None), weights

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        cache: Any,
        samples: SampleGroups | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """q [B, N, H, D] reads the cache and new keys and values [B, N, G, D], or its sample."""
        N = q.shape[1]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, N, D]
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        if samples is not None:
            return attend_samples(q, k, v, samples, dropout, self.scaling), None
        if N == 1 and self.config._attn_implementation == "sdpa" and not dropout:
            # Query heads of one key head become its rows: keys are neither repeated nor read twice.
            q = q.view(len(q), k.shape[1], -1, self.head_dim)
            return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scaling), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)


class CoMemoDecoderLayer(LlamaDecoderLayer):
    """A decoder layer, after its mixin layer if it has one."""

    folded = False  # whether the projections hold the norms' weights
    split: Split | None = None  # the ranks that divide heads and columns; then its own are here

    def __init__(self, config: CoMemoConfig, layer_idx: int) -> None:
        super().__init__(config.text_config, layer_idx)
        self.layer_idx = layer_idx
        self.self_attn = CoMemoAttention(config.text_config, layer_idx)
        has_mixin = layer_idx in config.mixin_layers
        self.mixin = MixinLayer(config.mixin_config, layer_idx) if has_mixin else None

    def forward(
        self,
        hidden_states: Tensor,
        media: Tensor | None = None,
        image_memory: ImageMemory | None = None,
        rotation: QueryRotation | None = None,
        key_angles: KeyAngles | None = None,
        use_cache: bool | None = False,
        recompute: str = "cheap",
        **kwargs: Any,
    ) -> Tensor:
        """One layer on hidden_states [B, N, d]; `media` to `recompute` go to the mixin layer."""
        of_mixin = media, image_memory, rotation, key_angles, use_cache, recompute
        if self.split is None or not self.split.sharded:
            return self._forward(hidden_states, *of_mixin, **kwargs)
        with own_weights(self.split, self):
            return self._forward(hidden_states, *of_mixin, **kwargs)

    def _forward(
        self,
        hidden_states: Tensor,
        media: Tensor | None,
        image_memory: ImageMemory | None,
        rotation: QueryRotation | None,
        key_angles: KeyAngles | None,
        use_cache: bool | None,
        recompute: str,
        **kwargs: Any,
    ) -> Tensor:
        if self.mixin is not None and image_memory is not None:
            hidden_states = self.mixin(
                hidden_states,
                media,
                image_memory,
                rotation,
                key_angles,
                bool(use_cache),
                recompute,
            )
        x = self._attend(hidden_states, use_cache=use_cache, **kwargs)
        norm, mlp = self.post_attention_layernorm, self.mlp
        if not is_fusable(norm, mlp):
            x, residual = enter(self.split, x)
            return leave(self.split, residual + mlp(norm(x)))
        weight = None if self.folded else norm.weight
        return feed_forward(x, weight, mlp, None, norm.variance_epsilon, recompute, self.split)

    def _attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x [B, N, d] plus the self-attention of its norm."""
        norm, attention = self.input_layernorm, self.self_attn
        parts = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        x, residual = enter(self.split, x)
        if not (is_untouched(attention) and is_fusable(norm, *parts)):
            return leave(self.split, residual + attention(hidden_states=norm(x), **kwargs)[0])
        if self.folded and attention.joined():
            kwargs |= {"hidden_states": x, "eps": norm.variance_epsilon}
        else:
            # By the modules, because three fused launches would compute the norm three times.
            kwargs["hidden_states"] = norm(x)
        return leave(self.split, attention(residual=residual, **kwargs)[0])


class CoMemoTextModel(BuildsMemory, LlamaPreTrainedModel):
    """Embeddings, decoder layers with their mixin layers, final norm."""

    _no_split_modules = ["CoMemoDecoderLayer"]
    _skip_keys_device_placement = ["cache", OLD_NAME, "image_memory"]
    _can_record_outputs = {"hidden_states": CoMemoDecoderLayer, "attentions": CoMemoAttention}

    def __init__(self, config: CoMemoConfig) -> None:
        text = config.text_config
        super().__init__(text)  # so that its attention implementation can be set
        self.comemo_config, mixin = config, config.mixin_config
        mixin._attn_implementation_internal = known_attention(
            self, mixin._attn_implementation, is_init_check=True
        )
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
        sample_places: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CoMemoModelOutput:
        text, x = self.config, inputs_embeds
        cache = one_cache("CoMemo", cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=text)
        places = sample_places
        check_flash(text._attn_implementation, x, places, cache, attention_mask)
        if cu_seqlens is not None:
            token_counts = self._longest_sample(cu_seqlens, position_ids)
            places = places_in_samples(cu_seqlens, x.shape[0], x.shape[1], x.device)
            lengths, longest = cu_seqlens.to(x.device, torch.int32), int(cu_seqlens.diff().max())
            kwargs.update(zip(VARLEN, (lengths, lengths, longest, longest), strict=True))
            if text._attn_implementation == "sdpa":
                kwargs["samples"] = group_samples(cu_seqlens.tolist(), x.device)
        if rope_lengths is None:
            if token_counts is None:
                token_counts = _count_tokens(x, attention_mask, cache)
            rope_lengths = self.rope_lengths(position_ids, token_counts)
        mask = None
        if not hasattr(cache, "attend") and "samples" not in kwargs:
            mask = create_causal_mask(
                config=text,
                inputs_embeds=x,
                attention_mask=attention_mask,
                # Only for packed rows: repeating RoPE-DHR ids would look like packed samples.
                position_ids=places,
                **{CACHE: cache},
            )
        tables: dict[str, Any] = {
            "position_embeddings": self._self_table(x, position_ids, rope_lengths)
        }
        media = None
        if image_memory is not None:
            tokens = position_ids if query_position_ids is None else query_position_ids
            tables |= self._prepare_memory(image_memory, x, tokens, bool(use_cache))
            # A separate argument, because gradient checkpointing ignores tensors inside objects.
            media = image_memory.media if torch.is_grad_enabled() else None
        for layer in self.layers:
            x = layer(
                x,
                media,
                image_memory=image_memory,
                attention_mask=mask,
                use_cache=use_cache,
                recompute=self.comemo_config.recompute,
                **{CACHE: cache},
                **tables,
                **kwargs,
            )
        return CoMemoModelOutput(last_hidden_state=self.norm(x), **{CACHE: cache})

    def _longest_sample(self, bounds: Tensor, position_ids: Tensor) -> Tensor:
        """[B], tokens of the longest sample, so that packing does not change angles."""
        longest = bounds.diff().max()
        if (self.comemo_config.rope_scaling or {}).get("type") == "dynamic" and len(bounds) > 2:
            highest = self.rope_lengths(position_ids, longest[None]).max()
            if int(highest) > (limit := self.config.max_position_embeddings):
                raise ValueError(
                    f"CoMemo: packed samples must be within the trained range of {limit}, because"
                    f" dynamic scaling applies to a whole row, got {int(highest)}: pass it alone"
                )
        return longest.to(position_ids.device).expand(len(position_ids))

    def rope_lengths(self, position_ids: Tensor, token_counts: Tensor) -> Tensor:
        """[B], the lengths for dynamic scaling, of prompts with ids [B, N] and token_counts [B]."""
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
        # Published: cosine and sine are rounded to the activations' dtype.
        return table[0].to(x.dtype), table[1].to(x.dtype)


def _count_tokens(x: Tensor, attention_mask: Any, cache: Any) -> Tensor:
    """[B] tokens so far, without padding."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask.sum(1)
    past = 0 if cache is None else cache.get_seq_length()
    return torch.zeros(x.shape[0], device=x.device, dtype=torch.long) + (past + x.shape[1])
