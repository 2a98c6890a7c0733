"""CoMemo: a language model that sees each image twice.

Context path: image tokens stand in the sequence. Memory path: before every n-th decoder layer a
mixin layer lets all tokens read the image memory through gated cross-attention.
Source: CoMemo (arXiv:2506.06279). The vision tower is transformers' InternVL and the decoder is
made of Llama's blocks; the image memory is an argument, never state of a module.

Letters: B prompts, N tokens of a prompt, M tokens of the image memory, H heads, D head
dimension, T tiles, d width of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.internvl.modeling_internvl import InternVLVisionModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

import comemo_kernels as ops
from comemo.chat import CoMemoChat
from comemo.checkpoint import PublishedCheckpoint
from comemo.config import CoMemoConfig, MixinConfig
from comemo.generation import CoMemoGeneration
from comemo_kernels import ImageMemory

Table = tuple[Tensor, Tensor]  # cos, sin [B, N, D/2]


@dataclass
class CoMemoOutput(CausalLMOutputWithPast):
    """Adds `image_memory`: the memory that was read, to be handed to the next call."""

    image_memory: ImageMemory | None = None


class MixinLayer(nn.Module):
    """Gated image cross-attention and a gated feed-forward network; the identity at gates 0."""

    def __init__(self, config: MixinConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        width, inner = config.language_dim, config.num_heads * config.head_dim
        self.attn_norm = LlamaRMSNorm(width, eps=1e-5)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.kv_proj = nn.Linear(config.vision_dim, 2 * inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.mlp_norm = LlamaRMSNorm(width, eps=1e-5)
        self.mlp = LlamaMLP(
            LlamaConfig(hidden_size=width, intermediate_size=config.intermediate_size)
        )
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def build(self, media: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [M, H, D] of `media` [M, d], by the norm of the text."""
        kv = self.kv_proj(self.attn_norm(media)).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = kv.unbind(1)
        return ops.apply_rotary(key[None], *table)[0], value

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, memory: ImageMemory, table: Table
    ) -> Tensor:
        """x [B, N, d] -> [B, N, d]; prompts without any image pass unchanged."""
        q = self.q_proj(self.attn_norm(x)).unflatten(-1, (self.num_heads, self.head_dim))
        q = ops.apply_rotary(q, *table)  # [B, N, H, D]
        read = self.o_proj(ops.attend_images(q, key, value, memory.spans).flatten(2))
        y = x + self.attn_gate.tanh() * read
        y = y + self.mlp_gate.tanh() * self.mlp(self.mlp_norm(y))
        return y if memory.active is None else torch.where(memory.active, y, x)


class CoMemoAttention(LlamaAttention):
    """Llama's self-attention with the rotation in float32, as published."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Table,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        B, N, _ = hidden_states.shape
        q, k, v = (
            proj(hidden_states).view(B, N, -1, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (ops.apply_rotary(t, *position_embeddings) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, N, D]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.reshape(B, N, -1)), weights


class CoMemoDecoderLayer(LlamaDecoderLayer):
    """A decoder layer, behind a mixin layer where there is one."""

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
        query_table: Table | None = None,
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
            hidden_states = self.mixin(hidden_states, key, value, image_memory, query_table)
        return super().forward(hidden_states, use_cache=use_cache, **kwargs)


class CoMemoPreTrainedModel(PublishedCheckpoint, PreTrainedModel):
    config: CoMemoConfig
    config_class = CoMemoConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CoMemoDecoderLayer", "InternVLVisionLayer"]
    _skip_keys_device_placement = ["past_key_values", "image_memory"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


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
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        text, x = self.config, inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=text)
        if token_counts is None:
            token_counts = _count_tokens(x, attention_mask, past_key_values)
        place_in_sample = None
        if cu_seqlens is not None:
            place = torch.arange(x.shape[1], device=x.device)
            sample = torch.searchsorted(cu_seqlens, place, right=True) - 1
            place_in_sample = (place - cu_seqlens[sample])[None]
            longest = int(cu_seqlens.diff().max())
            lengths = cu_seqlens.to(torch.int32)
            kwargs.update(cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
            kwargs.update(max_length_q=longest, max_length_k=longest)
        mask = create_causal_mask(
            config=text,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # Of a packed row only: RoPE-DHR ids repeat and would be taken for packed samples.
            position_ids=place_in_sample,
        )
        tables: dict[str, Any] = {
            "position_embeddings": self._self_table(x, position_ids, token_counts)
        }
        if image_memory is not None:
            tables["query_table"] = self._mixin_table(
                x, position_ids if query_position_ids is None else query_position_ids
            )
            unbuilt = len(image_memory.keys) < len(self.comemo_config.mixin_layers)
            if unbuilt and image_memory.position_ids is not None:
                tables["media_table"] = self._mixin_table(x, image_memory.position_ids[None])
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

    def _self_table(self, x: Tensor, position_ids: Tensor, token_counts: Tensor) -> Table:
        text, scaling = self.config, self.comemo_config.rope_scaling or {"type": None}
        if scaling["type"] == "linear":
            position_ids = position_ids / scaling["factor"]
        dynamic = {}
        if scaling["type"] == "dynamic":
            by_position = self.comemo_config.ntk_length == "position"
            dynamic = {
                "factor": scaling["factor"],
                "length": position_ids.amax(1) + 1 if by_position else token_counts,
                "max_length": text.max_position_embeddings,
            }
        table = ops.rotary_table(
            position_ids, text.head_dim, text.rope_parameters["rope_theta"], **dynamic
        )
        # Published: the angles' sine and cosine are rounded to the activations' dtype.
        return table[0].to(x.dtype), table[1].to(x.dtype)

    def _mixin_table(self, x: Tensor, position_ids: Tensor) -> Table:
        mixin = self.comemo_config.mixin_config
        cos, sin = ops.rotary_table(position_ids, mixin.head_dim, mixin.rope_theta)
        return cos.to(x.dtype), sin.to(x.dtype)


class CoMemoModel(CoMemoPreTrainedModel):
    """Vision tower, projector and decoder."""

    def __init__(self, config: CoMemoConfig) -> None:
        super().__init__(config)
        channels = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
        width = config.text_config.hidden_size
        self.vision_tower = InternVLVisionModel(config.vision_config)
        if config.vision_config.use_qk_norm:
            for layer in self.vision_tower.encoder.layer:  # published: every norm has one eps
                for norm in (layer.attention.q_norm, layer.attention.k_norm):
                    norm.variance_epsilon = config.vision_config.layer_norm_eps
        self.multi_modal_projector = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width)
        )
        self.language_model = CoMemoTextModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected image tokens [T, tokens per tile, d] of tiles [T, 3, side, side].

        Only the vision layers up to `select_layer` run.

        Raises:
            ValueError: pixel values that are not square tiles of three colours.
        """
        vision, config = self.vision_tower, self.config
        if pixel_values.ndim != 4 or pixel_values.shape[2] != pixel_values.shape[3]:
            raise ValueError(
                "get_image_features: pixel_values must be [tiles, 3, side, side], got"
                f" {tuple(pixel_values.shape)}"
            )
        depth = config.select_layer % (len(vision.encoder.layer) + 1)
        x = vision.embeddings(pixel_values)
        for layer in vision.encoder.layer[:depth]:
            x = layer(x)
        norm, first, _, second = self.multi_modal_projector
        return ops.project_tiles(
            x,
            *(norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias),
            ratio=config.downsample_ratio,
            version=config.ps_version,
            eps=norm.eps,
        )

    def prompt_position_ids(
        self,
        image_mask: Tensor,
        attention_mask: Tensor,
        tile_grid: Sequence[Sequence[int]] | Tensor | None = None,
    ) -> Tensor:
        """Position ids [B, N] of whole prompts by the rule that `config.rope` names.

        Without `tile_grid` ((cols, rows) of each image) tokens are numbered 0..N-1, whatever the
        rule: that is original RoPE.
        """
        if tile_grid is None or self.config.rope == "original":
            counted = attention_mask.long()
            return (counted.cumsum(1) - 1).clamp(min=0) * counted
        grids = tile_grid.tolist() if isinstance(tile_grid, Tensor) else tile_grid
        return ops.rope_dhr_positions(
            image_mask,
            attention_mask,
            [(int(cols), int(rows)) for cols, rows in grids],
            self.config.side,
            self.config.tile_order,
            self.config.use_thumbnail,
        )

    def build_image_memory(
        self, pixel_values: Tensor, image_mask: Tensor, position_ids: Tensor
    ) -> ImageMemory:
        """Memory of a batch of prompts: image features now, keys and values at first use.

        Args:
            pixel_values: [T, 3, side, side], all prompts' tiles in reading order.
            image_mask: bool [B, N], True at image tokens.
            position_ids: [B, N].

        Raises:
            ValueError: tiles that do not match the image tokens, before anything is computed.
        """
        lengths = image_mask.sum(1).tolist()
        wanted = pixel_values.shape[0] * self.config.tokens_per_tile
        if sum(lengths) != wanted:
            raise ValueError(
                f"build_image_memory: {pixel_values.shape[0]} tiles of"
                f" {self.config.tokens_per_tile} tokens for prompts that hold {lengths} image"
                " tokens"
            )
        media = self.get_image_features(pixel_values.to(self.device, self.dtype)).flatten(0, 1)
        ids = position_ids[image_mask].to(media.device)
        return ImageMemory.from_media(media, ids, lengths)

    def embed(
        self, input_ids: Tensor, image_mask: Tensor | None, memory: ImageMemory | None
    ) -> Tensor:
        """Embeddings [B, N, d] of a whole prompt, image tokens taken from the memory's media."""
        embeds = self.get_input_embeddings()(input_ids)
        if memory is None or memory.media is None or image_mask is None:
            return embeds
        # Token j of prompt b's images is media[start_b + j]: beams share their prompt's media.
        start, end = memory.spans[:, 0].to(embeds.device).split(1, dim=-1)  # [B, 1]
        index = start + image_mask.long().cumsum(1) - 1
        image_mask = image_mask & (index < end)  # an image token that was generated is a word
        index = index[image_mask]
        return embeds.masked_scatter(
            image_mask[..., None], memory.media[index].to(embeds.device, embeds.dtype)
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_grid: Any = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_memory: ImageMemory | None = None,
        **kwargs: Any,
    ) -> tuple[BaseModelOutputWithPast, ImageMemory | None]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("CoMemo: give either input_ids or inputs_embeds")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if inputs_embeds is None:
            assert input_ids is not None
            image_mask = None
            # Image tokens are looked for where images may stand: in a prompt, not while decoding.
            if pixel_values is not None or (
                image_memory is not None and input_ids.shape[1] > 1 and past == 0
            ):
                image_mask = self.find_image_tokens(input_ids)
                if position_ids is None:
                    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                    position_ids = self.prompt_position_ids(image_mask, mask, tile_grid)
                if image_memory is None:
                    image_memory = self.build_image_memory(pixel_values, image_mask, position_ids)
            inputs_embeds = self.embed(input_ids, image_mask, image_memory)
        if position_ids is None:
            position_ids = past + torch.arange(
                inputs_embeds.shape[1], device=inputs_embeds.device
            ).expand(inputs_embeds.shape[:2])
            if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
                counted = attention_mask.long().cumsum(1) - 1
                position_ids = counted.clamp(min=0)[:, -inputs_embeds.shape[1] :]
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            image_memory=image_memory,
            **kwargs,
        )
        return output, image_memory

    def find_image_tokens(self, input_ids: Tensor) -> Tensor:
        """bool [B, N], True at `<IMG_CONTEXT>`."""
        if self.config.image_token_id is None:
            raise ValueError(
                "CoMemo: config.image_token_id is not set: the checkpoint's tokenizer files name"
                " no <IMG_CONTEXT>; set it to tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>')"
            )
        return input_ids == self.config.image_token_id


class CoMemoForConditionalGeneration(
    CoMemoChat, CoMemoGeneration, CoMemoPreTrainedModel, GenerationMixin
):
    """CoMemo with a language modelling head: `generate`, `chat`, training forward."""

    _tied_weights_keys: dict[str, str] = {}

    def __init__(self, config: CoMemoConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = CoMemoModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_grid: Any = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_memory: ImageMemory | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        query_position_ids: Tensor | None = None,
        token_counts: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> CoMemoOutput:
        """One pass over prompts, packed samples or new tokens.

        Args:
            input_ids: [B, N]; prompts of different lengths are padded on the left.
            pixel_values: [T, 3, side, side], tiles of all images in reading order.
            tile_grid: (cols, rows) of each image; None for original RoPE.
            attention_mask: [B, past + N], 0 at padding.
            position_ids: [B, N]; computed by `config.rope` if None.
            past_key_values: cache of the self-attention alone.
            inputs_embeds: [B, N, d] instead of `input_ids`.
            image_memory: of an earlier call, instead of `pixel_values`; filled on first use.
            labels: [B, N], -100 where nothing is to be learned; shifted here.
            loss_weights: [B, N], weight of each label: loss = sum(w * l) / sum(w).
            use_cache: whether to keep past_key_values and the memory's keys and values.
            logits_to_keep: last positions, or indices, to compute logits for; 0 for all.
            query_position_ids: [B, N], where the mixin queries stand if not at `position_ids`.
            token_counts: [B], tokens so far; derived if None.
            cu_seqlens: [samples + 1] bounds of packed samples in one row (B = 1).

        Returns:
            `CoMemoOutput` with loss, logits [B, N, vocabulary], past_key_values, image_memory.
        """
        output, image_memory = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            tile_grid=tile_grid,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_memory=image_memory,
            use_cache=use_cache,
            query_position_ids=query_position_ids,
            token_counts=token_counts,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None if labels is None else _loss(logits, labels, loss_weights)
        return CoMemoOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_memory=image_memory,
        )


def _loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    labels = labels[:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, reduction="none")
    if weights is None:
        return losses.sum() / (labels != -100).sum()
    weights = weights[:, 1:].flatten() * (labels != -100)
    return (losses * weights).sum() / weights.sum()


def _count_tokens(x: Tensor, attention_mask: Any, past_key_values: Any) -> Tensor:
    """[B] tokens so far, padding not counted."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask.sum(1)
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    return torch.zeros(x.shape[0], device=x.device, dtype=torch.long) + (past + x.shape[1])
