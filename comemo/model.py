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
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.internvl.modeling_internvl import InternVLVisionModel
from transformers.utils.generic import can_return_tuple

import comemo_kernels as ops
from comemo.chat import CoMemoChat
from comemo.checkpoint import PublishedCheckpoint
from comemo.config import CoMemoConfig
from comemo.decoder import CoMemoTextModel
from comemo.folding import FoldsForInference
from comemo.generation import CoMemoGeneration
from comemo.store import MemoryStore
from comemo_kernels import ImageMemory


@dataclass
class CoMemoOutput(CausalLMOutputWithPast):
    """Adds `image_memory`: the memory that was read, to be handed to the next call."""

    image_memory: ImageMemory | None = None


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


class CoMemoModel(CoMemoPreTrainedModel):
    """Vision tower, projector and decoder."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

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

    def get_image_features(
        self, pixel_values: Tensor, embeds: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Projected image tokens [T, tokens per tile, d] of tiles [T, 3, side, side].

        Only the vision layers up to `select_layer` run, on `config.tiles_at_once` tiles at a time:
        what lies between two layers is bounded by that, whatever T.

        Args:
            pixel_values: [T, 3, side, side].
            embeds, rows: where to write the image tokens besides, as of `project_tiles`.

        Raises:
            ValueError: pixel values that are not square tiles of three colours; or as of
                `project_tiles`.
        """
        config = self.config
        if pixel_values.ndim != 4 or pixel_values.shape[2] != pixel_values.shape[3]:
            raise ValueError(
                "get_image_features: pixel_values must be [tiles, 3, side, side], got"
                f" {tuple(pixel_values.shape)}"
            )
        norm, first, _, second = self.multi_modal_projector
        weights = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias)
        rounds = pixel_values.split(config.tiles_at_once)
        into_one = len(rounds) > 1 and not (
            torch.is_grad_enabled() or torch.is_autocast_enabled(pixel_values.device.type)
        )
        media, parts, end = None, [], 0
        for tiles in rounds:
            x = self._see(tiles)
            per_tile = round((x.shape[1] - 1) * config.downsample_ratio**2)
            start, end = end, end + len(tiles) * per_tile
            if into_one and media is None:
                media = x.new_empty(len(pixel_values) * per_tile, len(second.bias))
            parts.append(
                ops.project_tiles(
                    x,
                    *weights,
                    ratio=config.downsample_ratio,
                    version=config.ps_version,
                    eps=norm.eps,
                    media=None if media is None else media[start:end],
                    embeds=embeds,
                    rows=None if rows is None else rows[start:end],
                )
            )
        if media is not None:
            return media.view(len(pixel_values), -1, media.shape[1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _see(self, tiles: Tensor) -> Tensor:
        """The vision tower's tokens [T, 1 + tokens, C], class token first."""
        vision = self.vision_tower
        depth = self.config.select_layer % (len(vision.encoder.layer) + 1)
        x = vision.embeddings(tiles)
        for layer in vision.encoder.layer[:depth]:
            x = layer(x)
        return x

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
        return ops.rope_dhr_positions(
            image_mask,
            attention_mask,
            tile_grid,
            self.config.side,
            self.config.tile_order,
            self.config.use_thumbnail,
        )

    def build_image_memory(
        self,
        pixel_values: Tensor,
        image_mask: Tensor,
        position_ids: Tensor,
        tile_grid: Sequence[Sequence[int]] | Tensor | None = None,
        memory_store: MemoryStore | None = None,
        embeds: Tensor | None = None,
    ) -> ImageMemory:
        """Memory of a batch of prompts: image features now, keys and values at first use.

        Args:
            pixel_values: [T, 3, side, side], all prompts' tiles in reading order.
            image_mask: bool [B, N], True at image tokens.
            position_ids: [B, N].
            tile_grid: (cols, rows) of each image; None takes a prompt's images for one, which then
                can only be reused together.
            memory_store: where known pictures are looked up and new ones kept. Keys and values are
                then built at once, and nothing of it carries gradients.
            embeds: [B, N, d], contiguous: the image tokens are written at `image_mask`, together
                with the memory's media. Excludes a store; `embed` does it afterwards.

        Raises:
            ValueError: tiles that do not match the image tokens, or a model whose memories cannot
                be stored, before anything is computed.
        """
        if memory_store is not None and embeds is not None:
            raise ValueError("build_image_memory: embeds exclude a memory_store")
        lengths = image_mask.sum(1).tolist()
        wanted = pixel_values.shape[0] * self.config.tokens_per_tile
        if sum(lengths) != wanted:
            raise ValueError(
                f"build_image_memory: {pixel_values.shape[0]} tiles of"
                f" {self.config.tokens_per_tile} tokens for prompts that hold {lengths} image"
                " tokens"
            )
        ids = position_ids[image_mask].to(self.device)
        config, sizes = self.config, None
        if tile_grid is not None:
            grids = tile_grid.tolist() if isinstance(tile_grid, Tensor) else tile_grid
            sizes = [
                ops.image_tokens((int(cols), int(rows)), config.side, config.use_thumbnail)
                for cols, rows in grids
            ]
        if memory_store is not None and len(pixel_values):
            return memory_store.image_memory(self, pixel_values, ids, lengths, sizes)
        rows = None if embeds is None else ops.image_rows(image_mask, wanted)
        pixel_values = pixel_values.to(self.device, self.dtype)
        media = self.get_image_features(pixel_values, embeds, rows).flatten(0, 1)
        absolute = config.memory_positions == "absolute"
        return ImageMemory.from_media(media, ids, lengths, sizes, absolute=absolute)

    def embed(
        self,
        input_ids: Tensor,
        image_mask: Tensor | None,
        memory: ImageMemory | None,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """Embeddings [B, n, d] of whole prompts, image tokens taken from the memory's media.

        Args:
            input_ids: [B, N].
            image_mask: bool [B, N], True at image tokens.
            memory: of the prompts.
            first, last: embed the tokens from one index to another, of all N.

        Raises:
            ValueError: prompts with fewer image tokens than their memory, or spans per token.
        """
        embeds = self.get_input_embeddings()(input_ids[:, first:last])
        if memory is None or memory.media is None or memory.spans is None or image_mask is None:
            return embeds
        # Token j of prompt b's images is media[start_b + j]: beams share their prompt's media.
        spans = memory.spans.to(embeds.device)
        start, end = spans[:, 0].split(1, dim=-1)  # [B, 1]
        if spans.shape[1] != 1 or (image_mask.sum(1, keepdim=True) < end - start).any():
            raise ValueError(
                f"embed: prompts with {image_mask.sum(1).tolist()} image tokens must hold the whole"
                f" image memory, whose spans are {tuple(spans.shape)}: {spans[:, 0].tolist()}"
            )
        index = start + image_mask.long().cumsum(1) - 1
        image_mask = image_mask & (index < end)  # an image token that was generated is a word
        index, image_mask = index[:, first:last], image_mask[:, first:last]
        return embeds.masked_scatter(
            image_mask[..., None], memory.media[index[image_mask]].to(embeds.device, embeds.dtype)
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
        if pixel_values is not None and (inputs_embeds is not None or image_memory is not None):
            raise ValueError("CoMemo: pixel_values need input_ids and exclude an image_memory")
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
            if pixel_values is not None:
                assert image_mask is not None
                assert position_ids is not None
                inputs_embeds, image_memory = self._embed_images(
                    input_ids, pixel_values, image_mask, position_ids, tile_grid
                )
            else:
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

    def _embed_images(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        image_mask: Tensor,
        position_ids: Tensor,
        tile_grid: Any,
    ) -> tuple[Tensor, ImageMemory]:
        """Embeddings and image memory of whole prompts, their image tokens written once."""
        embeds = self.get_input_embeddings()(input_ids)
        if embeds.device != self.multi_modal_projector[0].weight.device:
            memory = self.build_image_memory(pixel_values, image_mask, position_ids, tile_grid)
            return self.embed(input_ids, image_mask, memory), memory
        # A hook of the embeddings may have made them a leaf, which cannot be written.
        embeds = embeds.clone() if embeds.requires_grad else embeds.contiguous()
        memory = self.build_image_memory(
            pixel_values, image_mask, position_ids, tile_grid, embeds=embeds
        )
        return embeds, memory

    def find_image_tokens(self, input_ids: Tensor) -> Tensor:
        """bool [B, N], True at `<IMG_CONTEXT>`."""
        if self.config.image_token_id is None:
            raise ValueError(
                "CoMemo: config.image_token_id is not set: the checkpoint's tokenizer files name"
                " no <IMG_CONTEXT>; set it to tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>')"
            )
        return input_ids == self.config.image_token_id


class CoMemoForConditionalGeneration(
    CoMemoChat, CoMemoGeneration, FoldsForInference, CoMemoPreTrainedModel, GenerationMixin
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
        rope_lengths: Tensor | None = None,
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
            rope_lengths: [B], what dynamic scaling goes by, where that is more than these tokens
                and the cache tell; derived if None.
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
            rope_lengths=rope_lengths,
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
