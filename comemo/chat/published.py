"""The published `chat` call: questions about pictures, several turns, and text alone."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

import comemo_kernels as ops
from comemo import prompts
from comemo.chat.options import text_options
from comemo.vision import check_tiles

History = list[tuple[str, str]]


class CoMemoChat:
    """`chat` for a model with `generate`."""

    config: Any
    model: Any
    device: Any
    generate: Any
    _check_range: Any

    def chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        history: Sequence[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        target_aspect_ratio: Sequence[tuple[int, int]] | tuple[int, int] | None = None,
        verbose: bool = False,
        *,
        system_message: str | None = None,
        streamer: Any = None,
        memory_store: Any = None,
    ) -> str | tuple[str, History]:
        """Answer a question about pictures.

        Args:
            tokenizer: of the checkpoint.
            pixel_values: [T, 3, side, side], the tiles of all pictures of the conversation in
                order; None to chat about text alone.
            question: text; `<image>` marks where a picture goes. Without any mark in the
                conversation a line with one is put before its first question. Names of control
                tokens in it stay text.
            generation_config: what `generate` takes, as a dictionary or a GenerationConfig, as far
                as it gives one text; not changed.
            history: earlier (question, answer) pairs; not changed.
            return_history: whether to return the history with this turn added.
            num_patches_list: tiles of each picture; None for one picture.
            target_aspect_ratio: (cols, rows) of each picture, for RoPE-DHR; None for original
                RoPE (recommended for reading text in pictures).
            verbose: print the prompt and the answer.
            system_message: instead of the template's own.
            streamer: receives tokens as they come.
            memory_store: a `MemoryStore`, where known pictures are looked up and new ones kept.

        Returns:
            The answer, or (answer, new history).

        Raises:
            ValueError: pictures, marks, tiles and grids that disagree, a prompt beyond the position
                range, or an option that does not give one text (drafts, `use_cache=False`, outputs
                beside the text); nothing was computed then.
        """
        options: dict[str, Any] = {"generation_config": generation_config}
        if not isinstance(generation_config, GenerationConfig):
            options = {"pad_token_id": tokenizer.pad_token_id} | dict(generation_config or {})
        options = text_options("chat", options, self, tokenizer)
        turns = [*(history or []), (question, None)]
        if pixel_values is not None and not any(prompts.IMAGE_MARK in q for q, _ in turns):
            turns[0] = (prompts.with_image_mark(turns[0][0]), turns[0][1])
        prompt, inputs = self.prepare_chat(
            *(tokenizer, pixel_values, turns, num_patches_list, target_aspect_ratio),
            system_message=system_message,
            memory_store=memory_store,
        )
        stop = prompts.stop_text(self.config.template)
        options["eos_token_id"] = tokenizer.convert_tokens_to_ids(stop)
        output = self.generate(**inputs, **options, streamer=streamer)
        text = tokenizer.decode(output[0, 1:], skip_special_tokens=True)
        answer = text.split(stop)[0].strip()
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
        target_aspect_ratio: Sequence[tuple[int, int]] | tuple[int, int] | None = None,
        system_message: str | None = None,
        memory_store: Any = None,
    ) -> tuple[str, dict[str, Any]]:
        """The prompt of a conversation, and what `generate` takes to go on with it.

        Args:
            turns: (question, answer) pairs, the last answer None.
            tokenizer, pixel_values, num_patches_list, target_aspect_ratio, system_message,
                memory_store: as of `chat`.

        Returns:
            prompt: the text, pictures expanded.
            inputs: embeddings, positions and the image memory. The ids that `generate` goes on
                from are the start token alone: as published, penalties on repetition see what
                was generated, not the prompt.

        Raises:
            ValueError: as of `chat`.
        """
        config, model = self.config, self.model
        check_tokenizer(tokenizer, prompts.stop_text(config.template))
        tiles, grids = check_pictures(
            pixel_values, num_patches_list, target_aspect_ratio, config.use_thumbnail
        )
        counts = [count * config.tokens_per_tile for count in tiles]
        ids, prompt = prompts.encode_turns(
            tokenizer, turns, config.template, system_message, counts
        )
        input_ids = torch.tensor([ids], device=self.device)
        image_mask = input_ids == tokenizer.convert_tokens_to_ids(prompts.IMAGE_CONTEXT)
        attention_mask = torch.ones_like(input_ids)
        position_ids = model.prompt_position_ids(image_mask, attention_mask, grids)
        self._check_range(position_ids, attention_mask, bool(tiles))
        memory = None
        if pixel_values is not None:
            memory = model.build_image_memory(
                pixel_values, image_mask, position_ids, grids, memory_store
            )
        return prompts.expand_images(prompt, counts).replace(prompts.MARKER, ""), {
            "input_ids": input_ids[:, :1],
            "inputs_embeds": model.embed(input_ids, image_mask, memory),
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "image_memory": memory,
        }


def check_tokenizer(tokenizer: Any, stop: str) -> None:
    """Refuse a tokenizer in which control tokens are no tokens: prompts would be wrong words.

    Raises:
        ValueError: naming what is missing.
    """
    wanted = (prompts.IMAGE_START, prompts.IMAGE_CONTEXT, prompts.IMAGE_END, stop)
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ValueError(
            f"chat: the tokenizer must hold {list(wanted)} as added tokens, {missing} are missing:"
            " is the checkpoint's tokenizer_config.json there?"
        )


def check_pictures(
    pixel_values: Tensor | None,
    num_patches_list: Sequence[int] | None,
    grids: Any,
    use_thumbnail: bool = True,
) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Tiles of each picture and its grid, or one clear error.

    Args:
        pixel_values: [T, 3, side, side] or None.
        num_patches_list: tiles of each picture; None for one picture, or as the grids say.
        grids: (cols, rows) of each picture, a bare pair for one picture, or None.
        use_thumbnail: whether pictures of more than one tile carry a thumbnail.

    Raises:
        ValueError: pictures, counts and grids that disagree.
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
    """The prompt with each picture back to its mark."""
    start, context, end = prompts.IMAGE_START, prompts.IMAGE_CONTEXT, prompts.IMAGE_END
    return re.sub(f"{start}({context})+{end}", prompts.IMAGE_MARK, prompt)
