"""The model without its head: vision tower, projector and decoder, and how images enter them.

Letters: B prompts, N tokens of a prompt, M tokens of the image memory, T tiles, d width of the
language model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.internvl.modeling_internvl import InternVLVisionModel
from transformers.utils.generic import can_return_tuple

import comemo_kernels as ops
from comemo.checkpoint import PublishedCheckpoint
from comemo.config import CoMemoConfig
from comemo.decoder import CoMemoTextModel
from comemo.outputs import CACHE, OLD_NAME, CoMemoModelOutput, one_cache, told_of_old_name
from comemo.packing import (
    VARLEN,
    find_begins,
    find_bounds,
    places_from_begins,
    prompt_positions,
    take_bounds,
    within_samples,
)
from comemo.plain import offloaded_to
from comemo.store import MemoryStore
from comemo.tracing import traced_memory, with_media
from comemo.vision import CoMemoVision
from comemo_kernels import ImageMemory

# What a forward takes beside the arguments that it names.
KEYWORDS = {"output_attentions", "output_hidden_states", *VARLEN}


class CoMemoPreTrainedModel(PublishedCheckpoint, PreTrainedModel):
    config: CoMemoConfig
    config_class = CoMemoConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CoMemoDecoderLayer", "InternVLVisionLayer"]
    _skip_keys_device_placement = ["cache", OLD_NAME, "image_memory"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def device(self) -> torch.device:
        """Where inputs go: of the first weight, or where offloaded weights are brought to."""
        device = super().device
        return device if device.type != "meta" else offloaded_to(self) or device


class CoMemoModel(CoMemoVision, CoMemoPreTrainedModel):
    """Vision tower, projector and decoder."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: CoMemoConfig) -> None:
        config.check()
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
        if torch.compiler.is_compiling() and isinstance(tile_grid, Tensor):
            raise ValueError(
                "CoMemo: torch.compile and torch.export need tile_grid as a list of (cols, rows),"
                " which they take for constants, got a tensor"
            )
        return ops.rope_dhr_positions(
            image_mask,
            attention_mask,
            tile_grid,
            self.config.side,
            self.config.tile_order,
            self.config.use_thumbnail,
            validate=not torch.compiler.is_compiling(),
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
        config, sizes = self.config, None
        absolute = config.memory_positions == "absolute"
        if tile_grid is not None:
            grids = tile_grid.tolist() if isinstance(tile_grid, Tensor) else tile_grid
            sizes = [
                ops.image_tokens((int(cols), int(rows)), config.side, config.use_thumbnail)
                for cols, rows in grids
            ]
        if torch.compiler.is_compiling():
            media = self.project_images(pixel_values.to(self.dtype)).flatten(0, 1)
            return traced_memory(media, image_mask, position_ids, sizes, absolute)
        lengths = image_mask.sum(1).tolist()
        wanted = pixel_values.shape[0] * config.tokens_per_tile
        if sum(lengths) != wanted:
            raise ValueError(
                f"build_image_memory: {pixel_values.shape[0]} tiles of"
                f" {config.tokens_per_tile} tokens for prompts that hold {lengths} image tokens"
            )
        ids = position_ids[image_mask].to(self.device)
        if memory_store is not None and len(pixel_values):
            return memory_store.image_memory(self, pixel_values, ids, lengths, sizes)
        rows = None if embeds is None else ops.image_rows(image_mask, wanted)
        pixel_values = pixel_values.to(self.device, self.dtype)
        media = self.project_images(pixel_values, embeds, rows).flatten(0, 1)
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
        return self._with_media(embeds, image_mask, memory, first, last)

    def _with_media(
        self,
        embeds: Tensor,
        image_mask: Tensor | None,
        memory: ImageMemory | None,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        if memory is None or memory.media is None or memory.spans is None or image_mask is None:
            return embeds
        # Token j of prompt b's images is media[start_b + j]: beams share their prompt's media.
        spans = memory.spans.to(embeds.device)
        start, end = spans[:, 0].split(1, dim=-1)  # [B, 1]
        torn = spans.shape[1] != 1
        if not (torn or torch.compiler.is_compiling()):
            torn = bool((image_mask.sum(1, keepdim=True) < end - start).any())
        if torn:
            raise ValueError(
                f"embed: prompts with {image_mask.sum(1).tolist()} image tokens must hold the whole"
                f" image memory, whose spans are {tuple(spans.shape)}: {spans[:, 0].tolist()}"
            )
        index = start + image_mask.long().cumsum(1) - 1
        image_mask = image_mask & (index < end)  # an image token that was generated is a word
        index, image_mask = index[:, first:last], image_mask[:, first:last]
        if torch.compiler.is_compiling():  # which cannot ask how many there are
            found = memory.media[index.clamp(0, len(memory.media) - 1)]
            return torch.where(image_mask[..., None], found.to(embeds), embeds)
        return embeds.masked_scatter(
            image_mask[..., None], memory.media[index[image_mask]].to(embeds.device, embeds.dtype)
        )

    @told_of_old_name
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
        use_cache: bool | None = None,
        query_position_ids: Tensor | None = None,
        token_counts: Tensor | None = None,
        rope_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CoMemoModelOutput:
        """The last hidden states [B, N, d]; arguments as of `CoMemoForConditionalGeneration`."""
        _check_keywords(kwargs)
        cache = one_cache("CoMemo", cache, past_key_values)
        if input_ids is None and inputs_embeds is None:
            raise ValueError("CoMemo: give either input_ids or inputs_embeds")
        if pixel_values is None and input_ids is not None and inputs_embeds is not None:
            raise ValueError("CoMemo: input_ids beside inputs_embeds need pixel_values to place")
        if pixel_values is not None and (input_ids is None or image_memory is not None):
            raise ValueError("CoMemo: pixel_values need input_ids and exclude an image_memory")
        past = 0 if cache is None else cache.get_seq_length()
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        B, N = given.shape[:2]
        image_mask = None
        # Image tokens are looked for where images may stand: in a prompt, not while decoding.
        if pixel_values is not None or (
            image_memory is not None and inputs_embeds is None and N > 1 and past == 0
        ):
            assert input_ids is not None
            image_mask = self.find_image_tokens(input_ids)
        bounds = take_bounds(cu_seqlens, kwargs, B, N)
        places = None
        if (bounds, cache, attention_mask) == (None,) * 3 and position_ids is not None and N > 1:
            seen = image_mask
            if seen is None and input_ids is not None and self.config.image_token_id is not None:
                seen = self.find_image_tokens(input_ids)
            begins = find_begins(position_ids, seen)
            if torch.compiler.is_compiling():  # which cannot ask how many samples there are
                places = places_from_begins(begins)
            else:
                bounds = find_bounds(begins)
        if bounds is not None:
            attention_mask, use_cache = _check_pack(attention_mask, use_cache, cache)
        if position_ids is None and bounds is not None:
            mask = torch.zeros(B, N, dtype=torch.bool, device=given.device)
            position_ids = prompt_positions(
                *(self, mask if image_mask is None else image_mask, bounds, tile_grid),
                lambda grid: ops.image_tokens(grid, self.config.side, self.config.use_thumbnail),
            )
        if position_ids is None and image_mask is not None:
            mask = torch.ones(B, N, dtype=torch.long, device=given.device)
            mask = mask if attention_mask is None else attention_mask
            position_ids = self.prompt_position_ids(image_mask, mask, tile_grid)
        if pixel_values is not None:
            assert image_mask is not None
            assert position_ids is not None
            inputs_embeds, image_memory = self._embed_images(
                input_ids, pixel_values, image_mask, position_ids, tile_grid, inputs_embeds
            )
            if bounds is not None:
                image_memory = within_samples(image_memory, image_mask, bounds)
        elif inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, image_mask, image_memory)
        if position_ids is None:
            position_ids = past + torch.arange(N, device=inputs_embeds.device).expand(B, N)
            if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
                counted = attention_mask.long().cumsum(1) - 1
                position_ids = counted.clamp(min=0)[:, -N:]
        read = image_memory
        if read is None and self.training and torch.is_grad_enabled() and past == 0:
            read = self._blank_memory(B)
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            image_memory=read,
            use_cache=use_cache,
            query_position_ids=query_position_ids,
            token_counts=token_counts,
            rope_lengths=rope_lengths,
            cu_seqlens=bounds,
            sample_places=places,
            **{CACHE: cache},
            **kwargs,
        )
        output.image_memory = image_memory
        if pixel_values is not None and image_memory is not None and image_memory.media is not None:
            media = image_memory.media.unflatten(0, (len(pixel_values), -1))
            output.image_outputs = BaseModelOutputWithPooling(pooler_output=media)
        return output

    def _blank_memory(self, rows: int) -> ImageMemory | None:
        """A memory of one blank tile of which nothing is kept, for training in several processes.

        There every process has to call the same modules and bring a gradient, though it be zero,
        for every weight: with pictures in another process's batch and none in this one, sharded
        weights would otherwise wait for ever and DDP refuse the next step.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        side = self.config.vision_config.image_size
        tile = torch.zeros(1, 3, *side, device=self.device, dtype=self.dtype)
        media = self.project_images(tile).flatten(0, 1)
        memory = ImageMemory.from_media(
            media,
            torch.arange(len(media), device=media.device),
            [len(media)],
            absolute=self.config.memory_positions == "absolute",
        ).repeat_interleave(rows)
        nobody = torch.zeros(rows, 1, 1, dtype=torch.bool, device=media.device)
        return replace(memory, active=nobody)  # what is read is not passed on

    def _embed_images(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor,
        image_mask: Tensor,
        position_ids: Tensor,
        tile_grid: Any,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, ImageMemory]:
        """Embeddings and image memory of whole prompts, their image tokens written once."""
        if torch.compiler.is_compiling():
            embeds = self.get_input_embeddings()(input_ids) if embeds is None else embeds
            memory = self.build_image_memory(pixel_values, image_mask, position_ids, tile_grid)
            return with_media(embeds, image_mask, memory), memory
        given = embeds is not None
        embeds = self.get_input_embeddings()(input_ids) if embeds is None else embeds
        where = next(self.multi_modal_projector.parameters()).device
        if embeds.device != where:
            memory = self.build_image_memory(pixel_values, image_mask, position_ids, tile_grid)
            return self._with_media(embeds, image_mask, memory), memory
        # A hook of the embeddings may have made them a leaf, which cannot be written.
        embeds = embeds.clone() if given or embeds.requires_grad else embeds.contiguous()
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


def _check_keywords(kwargs: dict[str, Any]) -> None:
    if unknown := kwargs.keys() - KEYWORDS:
        raise ValueError(
            f"CoMemo: a forward takes the arguments that it names and {sorted(KEYWORDS)}, got"
            f" {sorted(unknown)}"
        )


def _check_pack(attention_mask: Any, use_cache: bool | None, cache: Any) -> tuple[None, bool]:
    """Of packed rows: no mask and no cache, which know of no samples."""
    padded = attention_mask is not None and not bool((torch.as_tensor(attention_mask) == 1).all())
    if padded or use_cache or cache is not None:
        got = "padding in attention_mask" if padded else "use_cache=True or a cache"
        raise ValueError(
            "CoMemo: packed rows (cu_seqlens, cu_seq_lens_q or position_ids that begin anew) are"
            f" read at once, without padding and without a cache, got {got}"
        )
    return None, False
