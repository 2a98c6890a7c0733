"""How images enter the model: position ids, image memory and embeddings of prompts.

Letters: B prompts, N tokens of a prompt, M tokens of the image memory, T tiles, d width of the
language model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from comemo.config import CoMemoConfig
from comemo.memory import tracing
from comemo.memory.protocols import KeepsMemories
from comemo.parallel.split import Split, agree
from comemo.vision import check_tiles
from comemo_kernels import ImageMemory, split_images


def queries_at_count(config: CoMemoConfig, has_images: bool) -> bool:
    """Whether mixin queries of generated tokens are at the token count, not at the position id.

    This is the published `decode_positions="raw"`. Only mixin layers have these queries, so that
    it matters with images alone.
    """
    return has_images and config.decode_positions == "raw"


class CoMemoImages:
    """Images for a model with `project_images`, `multi_modal_projector` and embeddings."""

    config: CoMemoConfig
    device: Any
    dtype: Any
    get_input_embeddings: Any
    language_model: Any
    multi_modal_projector: Any
    project_images: Any
    vision_tower: Any
    split: Split | None

    def prompt_position_ids(
        self,
        image_mask: Tensor,
        attention_mask: Tensor,
        tile_grid: Sequence[Sequence[int]] | Tensor | None = None,
    ) -> Tensor:
        """Position ids [B, N] of whole prompts by the rule that `config.rope` names.

        Without `tile_grid` ((cols, rows) of each image) tokens are numbered 0..N-1 under any rule,
        as in original RoPE.
        """
        if tile_grid is None or self.config.rope == "original":
            counted = attention_mask.long()
            return (counted.cumsum(1) - 1).clamp(min=0) * counted
        if torch.compiler.is_compiling() and isinstance(tile_grid, Tensor):
            raise ValueError(
                "CoMemo: torch.compile and torch.export need tile_grid as a list of (cols, rows),"
                " because it is a constant of the graph, got a tensor"
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
        memory_store: KeepsMemories | None = None,
        embeds: Tensor | None = None,
    ) -> ImageMemory:
        """Memory of a batch of prompts: image features now, keys and values on first use.

        Args:
            pixel_values: [T, 3, side, side], the tiles of all prompts in reading order.
            image_mask: bool [B, N], True at image tokens.
            position_ids: [B, N].
            tile_grid: (cols, rows) of each image. None treats the images of a prompt as one, so
                that they can only be reused together.
            memory_store: a `MemoryStore` to look images up in. Keys and values are then built at
                once, without gradients.
            embeds: [B, N, d], contiguous: the image tokens are written at `image_mask`, together
                with the memory's media. Excludes a store; use `embed` after it.

        Raises:
            ValueError: no tiles, tiles that do not match the image tokens, or a model whose
                memories cannot be stored. Nothing was computed.
        """
        if memory_store is not None and embeds is not None:
            raise ValueError("build_image_memory: embeds exclude a memory_store")
        config, sizes = self.config, None
        check_tiles("build_image_memory", pixel_values, config.vision_config.image_size[0])
        absolute = config.memory_positions == "absolute"
        if tile_grid is not None:
            grids = tile_grid.tolist() if isinstance(tile_grid, Tensor) else tile_grid
            sizes = [
                ops.image_tokens((int(cols), int(rows)), config.side, config.use_thumbnail)
                for cols, rows in grids
            ]
        if torch.compiler.is_compiling():
            media = self.project_images(pixel_values.to(self.dtype)).flatten(0, 1)
            return tracing.traced_memory(media, image_mask, position_ids, sizes, absolute)
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

    def agree(self, known: list[bool]) -> list[bool]:
        """What all ranks that divide this model know, of what this one knows. All must call."""
        return agree(self.split, known)

    def build_image_memories(self, pixels: list[Tensor], ids: list[Tensor]) -> list[ImageMemory]:
        """Memories of several images, with keys and values of all mixin layers.

        The vision tower and the projections run once for all images.

        Args:
            pixels: [t, 3, side, side] of each image.
            ids: integers [m] of each image, position ids of its tokens minus that of the first.

        Returns:
            A memory for each image. They share storage, and nobody reads them yet.

        Raises:
            ValueError: a model that cannot build all keys and values at once.
        """
        media = self.project_images(torch.cat(pixels).to(self.device)).flatten(0, 1)
        sizes = [len(part) for part in ids]
        memory = ImageMemory.from_media(media, torch.cat(ids), [sum(sizes)], sizes)
        if not self.language_model.build_memory(memory):
            raise ValueError(
                "build_image_memories: keys and values of all mixin layers must be built at once,"
                f" got media of {media.dtype} on {media.device} for weights of {self.dtype} on"
                f" {self.device}"
            )
        memory.table = None  # of the model, not of an image
        return split_images(memory)

    def embed(
        self,
        input_ids: Tensor,
        image_mask: Tensor | None,
        memory: ImageMemory | None,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """Embeddings [B, n, d] of whole prompts; image tokens are the memory's media.

        Args:
            input_ids: [B, N].
            image_mask: bool [B, N], True at image tokens.
            memory: of the prompts.
            first, last: the slice of the N tokens to embed.

        Raises:
            ValueError: prompts with fewer image tokens than their memory, or spans per token.
        """
        embeds = self.get_input_embeddings()(input_ids[:, first:last])
        return self.with_media(embeds, image_mask, memory, first, last)

    def with_media(
        self,
        embeds: Tensor,
        image_mask: Tensor | None,
        memory: ImageMemory | None,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """Embeddings [B, n, d] with the memory's media at image tokens; arguments as in `embed`."""
        if memory is None or memory.media is None or memory.spans is None or image_mask is None:
            return embeds
        # Image token j of prompt b is media[start_b + j]. Beams share the media of their prompt.
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
        image_mask = image_mask & (index < end)  # a generated image token is a plain word
        index, image_mask = index[:, first:last], image_mask[:, first:last]
        if torch.compiler.is_compiling():  # the number of image tokens is unknown
            found = memory.media[index.clamp(0, len(memory.media) - 1)]
            return torch.where(image_mask[..., None], found.to(embeds), embeds)
        return embeds.masked_scatter(
            image_mask[..., None], memory.media[index[image_mask]].to(embeds.device, embeds.dtype)
        )

    def _blank_memory(self, rows: int) -> ImageMemory:
        """A memory of one blank tile, whose result is discarded, for distributed training.

        Every process must call the same modules and contribute a gradient, possibly zero, for
        every weight. Without this, a batch without images beside one with images would make
        sharded weights wait forever and DDP refuse the next step.
        """
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
        return replace(memory, active=nobody)  # the layers' output is discarded

    def _embed_images(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor,
        image_mask: Tensor,
        position_ids: Tensor,
        tile_grid: Any,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, ImageMemory]:
        """Embeddings and image memory of whole prompts; the image tokens are written once."""
        if torch.compiler.is_compiling():
            embeds = self.get_input_embeddings()(input_ids) if embeds is None else embeds
            memory = self.build_image_memory(pixel_values, image_mask, position_ids, tile_grid)
            return tracing.with_media(embeds, image_mask, memory), memory
        given = embeds is not None
        embeds = self.get_input_embeddings()(input_ids) if embeds is None else embeds
        where = next(self.multi_modal_projector.parameters()).device
        if embeds.device != where:
            memory = self.build_image_memory(pixel_values, image_mask, position_ids, tile_grid)
            return self.with_media(embeds, image_mask, memory), memory
        # A hook of the embeddings may have made them a leaf, which cannot be written in place.
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
