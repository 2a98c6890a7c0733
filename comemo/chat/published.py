"""The published `chat` call: questions about images, several turns, and text alone."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

import comemo_kernels as ops
from comemo import prompts
from comemo.chat.driver import build_prompt, check_tokenizer, generate_answer
from comemo.chat.options import text_options
from comemo.decode.interface import ModelMixin
from comemo.memory.protocols import KeepsMemories
from comemo.vision import check_tiles

History = list[tuple[str, str]]
Grids = Sequence[tuple[int, int]]


class CoMemoChat(ModelMixin):
    """`chat` for a model with `generate`."""

    def chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        history: Sequence[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        target_aspect_ratio: Grids | tuple[int, int] | None = None,
        verbose: bool = False,
        *,
        system_message: str | None = None,
        streamer: Any = None,
        memory_store: KeepsMemories | None = None,
    ) -> str | tuple[str, History]:
        """Answer a question about images.

        Args:
            tokenizer: of the checkpoint.
            pixel_values: [T, 3, side, side], the tiles of all images of the conversation in order;
                None to chat about text alone.
            question: text; `<image>` marks the position of an image. If the conversation has no
                mark, one is put on a line before its first question. Names of control tokens in
                it remain text.
            generation_config: options of `generate` that give one text, as a dictionary or a
                GenerationConfig; not changed.
            history: earlier (question, answer) pairs; not changed.
            return_history: whether to return the history with this turn added.
            num_patches_list: tiles of each image; None for one image.
            target_aspect_ratio: (cols, rows) of each image, for RoPE-DHR; None for original RoPE
                (recommended for reading text in images).
            verbose: print the prompt and the answer.
            system_message: instead of the template's own.
            streamer: receives tokens as they are generated.
            memory_store: a `MemoryStore` to look images up in.

        Returns:
            The answer, or (answer, new history).

        Raises:
            ValueError: images, marks, tiles and grids that disagree, a prompt beyond the position
                range, or an option that does not give one text (speculative decoding,
                `use_cache=False`, outputs beside the text). Nothing was computed.
        """
        options: dict[str, Any] = {"generation_config": generation_config}
        if not isinstance(generation_config, GenerationConfig):
            options = {"pad_token_id": tokenizer.pad_token_id} | dict(generation_config or {})
        options = text_options("chat", options, self, tokenizer)
        turns = [*(history or []), (question, None)]
        if pixel_values is not None and not any(prompts.IMAGE_MARK in q for q, _ in turns):
            turns[0] = (prompts.with_image_mark(turns[0][0]), turns[0][1])
        prompt, inputs = self.prepare_chat(
            tokenizer,
            pixel_values,
            turns,
            num_patches_list,
            target_aspect_ratio,
            system_message=system_message,
            memory_store=memory_store,
        )
        stop = tokenizer.convert_tokens_to_ids(prompts.stop_text(self.config.template))
        options["eos_token_id"] = stop
        _, answer = generate_answer(self, tokenizer, inputs | {"streamer": streamer}, options)
        if verbose:
            print(_shorten(prompt), answer)
        if not return_history:
            return answer
        return answer, [*((q, str(a)) for q, a in turns[:-1]), (turns[-1][0], answer)]

    @torch.no_grad()
    def prepare_chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        turns: Sequence[tuple[str, str | None]],
        num_patches_list: Sequence[int] | None = None,
        target_aspect_ratio: Grids | tuple[int, int] | None = None,
        system_message: str | None = None,
        memory_store: KeepsMemories | None = None,
    ) -> tuple[str, dict[str, Any]]:
        """The prompt of a conversation, and the inputs of `generate` for its next answer.

        Args:
            turns: (question, answer) pairs, the last answer None.
            tokenizer, pixel_values, num_patches_list, target_aspect_ratio, system_message,
                memory_store: see `chat`.

        Returns:
            prompt: the text, with image tokens.
            inputs: embeddings, positions and the image memory. `input_ids` is the start token
                alone: as published, penalties on repetition see generated tokens, not the prompt.

        Raises:
            ValueError: see `chat`.
        """
        config, model = self.config, self.model
        check_tokenizer(tokenizer, prompts.stop_text(config.template))
        tiles, grids = check_images(
            pixel_values, num_patches_list, target_aspect_ratio, config.use_thumbnail
        )
        counts = [count * config.tokens_per_tile for count in tiles]
        prompt = build_prompt(self, tokenizer, turns, system_message, counts, grids)
        prompt = prompt.to(self.device)
        memory = None
        if pixel_values is not None:
            memory = model.build_image_memory(
                pixel_values, prompt.image_mask, prompt.position_ids, grids, memory_store
            )
        return prompts.expand_images(prompt.text, counts).replace(prompts.MARKER, ""), {
            "input_ids": prompt.input_ids[:, :1],
            "inputs_embeds": model.embed(prompt.input_ids, prompt.image_mask, memory),
            "attention_mask": torch.ones_like(prompt.input_ids),
            "position_ids": prompt.position_ids,
            "image_memory": memory,
        }


def check_images(
    pixel_values: Tensor | None,
    num_patches_list: Sequence[int] | None,
    grids: Any,
    use_thumbnail: bool = True,
) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Tiles and grid of each image, checked.

    Args:
        pixel_values: [T, 3, side, side] or None.
        num_patches_list: tiles of each image; None for one image, or to derive them from `grids`.
        grids: (cols, rows) of each image, a bare pair for one image, or None.
        use_thumbnail: whether images of more than one tile have a thumbnail.

    Raises:
        ValueError: images, counts and grids that disagree.
    """
    if grids is not None and len(grids) == 2 and all(isinstance(n, int) for n in grids):
        grids = [grids]
    if grids is not None:
        grids = [(int(cols), int(rows)) for cols, rows in grids]
    if pixel_values is None:
        if num_patches_list or grids:
            raise ValueError(
                f"chat: num_patches_list {num_patches_list} and target_aspect_ratio {grids} need"
                " pixel_values, got None"
            )
        return [], None
    check_tiles("chat", pixel_values)
    total = pixel_values.shape[0]
    tiles = [total] if num_patches_list is None else [int(count) for count in num_patches_list]
    if sum(tiles) != total or min(tiles, default=0) < 1:
        raise ValueError(
            f"chat: num_patches_list {tiles} must be positive and sum to the {total} tiles of"
            " pixel_values"
        )
    if grids is not None:
        wanted = [ops.image_tokens(grid, 1, use_thumbnail) for grid in grids]
        if wanted != tiles:
            raise ValueError(
                f"chat: target_aspect_ratio {grids} stands for {wanted} tiles"
                f"{' with thumbnails' if use_thumbnail else ''}, got {tiles}"
            )
    return tiles, grids


def _shorten(prompt: str) -> str:
    """The prompt with a mark in place of each image's tokens."""
    start, context, end = prompts.IMAGE_START, prompts.IMAGE_CONTEXT, prompts.IMAGE_END
    return re.sub(f"{start}({context})+{end}", prompts.IMAGE_MARK, prompt)
