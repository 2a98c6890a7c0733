"""A conversation as data: what was said and shown, and the prompt that it makes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from comemo import prompts
from comemo.chat.transcript import NOBODY, Transcript
from comemo.vision import check_tiles

CHOICES = {"visibility": ("causal", "all"), "rope": ("dhr", "original")}


@dataclass(frozen=True)
class Picture:
    """A picture of a conversation.

    Attributes:
        number: that no other picture of the conversation ever had.
        grid: (cols, rows).
        tokens: image tokens.
        turn: index of the question that it came with.
        pixel_values: [T, 3, side, side] until its memory is built.
    """

    number: int
    grid: tuple[int, int]
    tokens: int
    turn: int
    pixel_values: Tensor | None = None


@dataclass(frozen=True)
class Conversation:
    """What was said and shown so far.

    Attributes:
        system_message: instead of the template's own.
        rope: "dhr" or "original".
        visibility: "causal" or "all", as of `ChatSession`.
        turns: (question, answer) pairs, `<image>` marks in the questions.
        pictures: in the order of their marks.

    Raises:
        ValueError: an unknown choice.
    """

    system_message: str | None = None
    rope: str = "dhr"
    visibility: str = "causal"
    turns: tuple[tuple[str, str], ...] = ()
    pictures: tuple[Picture, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"ChatSession: {name} must be one of {allowed}, got {value!r}")

    def answered(self, question: str, answer: str) -> "Conversation":
        """The conversation one turn later."""
        return replace(self, turns=(*self.turns, (question, answer)))

    def built(self) -> "Conversation":
        """The same without pixels, of which the memory is built."""
        pictures = tuple(replace(picture, pixel_values=None) for picture in self.pictures)
        return replace(self, pictures=pictures)

    def prompt(self, question: str, model: Any, tokenizer: Any) -> tuple[Transcript, list[int]]:
        """All of it up to the answer to a question.

        Args:
            question: the next one.
            model: whose config says how prompts are written and numbered.
            tokenizer: of its checkpoint.

        Returns:
            The tokens as a transcript, and their ids.

        Raises:
            ValueError: marks and pictures that differ in number.
        """
        template = model.config.template
        turns: Sequence[tuple[str, str | None]] = (*self.turns, (question, None))
        counts = [picture.tokens for picture in self.pictures]
        ids, _ = prompts.encode_turns(tokenizer, turns, template, self.system_message, counts)
        tokens = torch.tensor(ids)
        image_mask = tokens == tokenizer.convert_tokens_to_ids(prompts.IMAGE_CONTEXT)
        grids = [picture.grid for picture in self.pictures]
        positions = model.model.prompt_position_ids(
            image_mask[None], torch.ones(1, len(ids)), grids if self.rope == "dhr" else None
        )[0]
        numbers = torch.tensor([-1 - picture.number for picture in self.pictures]).long()
        tokens[image_mask] = numbers.repeat_interleave(torch.tensor(counts, dtype=torch.long))
        stop = tokenizer.convert_tokens_to_ids(prompts.stop_text(template))
        visible = self._visible(torch.tensor(ids) == stop)
        scaling = scaled_length(model, positions.max()[None], torch.tensor([len(ids)]))
        first = [int((tokens == number).nonzero()[0]) for number in numbers]
        pictures = tuple(
            (picture.number, int(positions[place]))
            for picture, place in zip(self.pictures, first, strict=True)
        )
        return Transcript.of(tokens, positions, positions, visible, scaling, pictures), ids

    def _visible(self, separators: Tensor) -> Tensor:
        """[N] or a number: how many pictures each token sees."""
        if not self.pictures:
            return torch.tensor(NOBODY)
        if self.visibility == "all":
            return torch.tensor(len(self.pictures))
        # Every message that holds anything ends with one separator, the system message always.
        closed = separators.long().cumsum(0) - separators.long()  # messages before each token
        before = [1]  # messages before each question
        for turn in self.turns:
            before.append(before[-1] + sum(bool(text) for text in turn))
        # What comes with the first question is seen by the system message too, as published.
        first = [before[picture.turn] if picture.turn else 0 for picture in self.pictures]
        return torch.searchsorted(torch.tensor(first), closed, right=True)


def scaled_length(model: Any, positions: Tensor, tokens: Tensor) -> Tensor:
    """The lengths that dynamic scaling goes by, where it scales, else 0.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        positions: [T], highest position ids so far.
        tokens: [T], how many tokens there are so far.
    """
    config = model.config
    length = model.model.language_model.rope_lengths(positions[:, None], tokens)
    if (config.rope_scaling or {}).get("type") != "dynamic":
        return torch.zeros_like(length)
    return torch.where(length > config.text_config.max_position_embeddings, length, 0)


def load_pictures(
    images: Any, turn: int, numbers: Any, image_processor: Any, config: Any
) -> tuple[Picture, ...]:
    """Read and tile the pictures of a question.

    Args:
        images: one or a list: what the image processor takes, or (pixel_values, grid).
        turn: index of the question.
        numbers: an iterator of fresh numbers.
        image_processor: a `CoMemoImageProcessor`.
        config: a `CoMemoConfig`.

    Raises:
        ValueError: a bad picture, or tiles that do not fit their grid.
    """
    found = []
    for image in images if isinstance(images, list) else [] if images is None else [images]:
        if isinstance(image, tuple):
            pixel_values, (cols, rows) = image
        else:
            loaded = image_processor(image)
            pixel_values, grids = loaded["pixel_values"], loaded["tile_grid"].tolist()
            if len(grids) != 1:
                raise ValueError(
                    f"ChatSession.ask: an item of images must be one picture, got {len(grids)}:"
                    " pass a list of pictures"
                )
            ((cols, rows),) = grids
        check_tiles("ChatSession.ask", pixel_values, config.vision_config.image_size[0])
        grid = (int(cols), int(rows))
        tokens = ops.image_tokens(grid, config.side, config.use_thumbnail)
        if tokens != len(pixel_values) * config.tokens_per_tile:
            raise ValueError(
                f"ChatSession.ask: a picture of grid {grid} must have"
                f" {tokens // config.tokens_per_tile} tiles, got {len(pixel_values)}"
            )
        found.append(Picture(next(numbers), grid, tokens, turn, pixel_values))
    return tuple(found)
