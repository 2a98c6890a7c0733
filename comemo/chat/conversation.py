"""A conversation as data: turns and images, and the prompt that they make."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from comemo import prompts
from comemo.chat.driver import Prompt, build_prompt
from comemo.chat.transcript import NO_IMAGES, Transcript
from comemo.config import CoMemoConfig
from comemo.decode.interface import GeneratingModel
from comemo.image_processor import CoMemoImageProcessor, flatten_images
from comemo.memory.inputs import queries_at_count
from comemo.tokenizer import InternLM2Tokenizer
from comemo.vision import check_tiles

CHOICES = {"visibility": ("causal", "all"), "rope": ("dhr", "original")}


@dataclass(frozen=True)
class ShownImage:
    """An image of a conversation.

    Attributes:
        number: unique within the conversation, never reused.
        grid: (cols, rows).
        tokens: image tokens.
        turn: index of the question that it came with.
        pixel_values: [T, 3, side, side] until its memory is built, then None.
    """

    number: int
    grid: tuple[int, int]
    tokens: int
    turn: int
    pixel_values: Tensor | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns and images so far.

    Attributes:
        system_message: instead of the template's own.
        rope: "dhr" or "original".
        visibility: "causal" or "all", see `ChatSession`.
        turns: (question, answer) pairs, `<image>` marks in the questions.
        images: in the order of their marks.

    Raises:
        ValueError: an unknown choice.
    """

    system_message: str | None = None
    rope: str = "dhr"
    visibility: str = "causal"
    turns: tuple[tuple[str, str], ...] = ()
    images: tuple[ShownImage, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"ChatSession: {name} must be one of {allowed}, got {value!r}")

    def answered(self, question: str, answer: str) -> "Conversation":
        """The conversation with one more turn."""
        return replace(self, turns=(*self.turns, (question, answer)))

    def built(self) -> "Conversation":
        """The conversation without pixels, once the memory is built."""
        return replace(self, images=tuple(replace(im, pixel_values=None) for im in self.images))

    def mark(self, question: str) -> str:
        """The question with a mark for each image that no earlier question shows.

        Raises:
            ValueError: it has marks, but not as many.
        """
        shown = sum(text.count(prompts.IMAGE_MARK) for text, _ in self.turns)
        marks, wanted = question.count(prompts.IMAGE_MARK), len(self.images) - shown
        if marks not in (0, wanted):
            raise ValueError(
                f"ChatSession.ask: the question must have a {prompts.IMAGE_MARK} mark for each of"
                f" its {wanted} images, or none, got {marks}"
            )
        return question if marks else f"{prompts.IMAGE_MARK}\n" * wanted + question

    def prompt(
        self, question: str, model: GeneratingModel, tokenizer: InternLM2Tokenizer
    ) -> tuple[Transcript, Prompt]:
        """Everything up to the answer to a question.

        Args:
            question: the next one.
            model: whose config determines template and positions.
            tokenizer: of its checkpoint.

        Returns:
            The tokens as a transcript, and the prompt, both on the CPU.

        Raises:
            ValueError: see `build_prompt`.
        """
        counts = [image.tokens for image in self.images]
        prompt = build_prompt(
            model,
            tokenizer,
            (*self.turns, (question, None)),
            self.system_message,
            counts,
            [image.grid for image in self.images] if self.rope == "dhr" else None,
        )
        numbers = [image.number for image in self.images]
        stop = tokenizer.convert_tokens_to_ids(prompts.stop_text(model.config.template))
        visible = self._visible(prompt.input_ids[0] == stop)
        return transcribe_prompt(prompt, numbers, counts, visible, model), prompt

    def _visible(self, separators: Tensor) -> Tensor:
        """[N] or a number: how many images each token reads."""
        if not self.images:
            return torch.tensor(NO_IMAGES)
        if self.visibility == "all":
            return torch.tensor(len(self.images))
        before = [1]  # messages before each question
        for turn in self.turns:
            before.append(before[-1] + sum(bool(text) for text in turn))
        # As published, the system message reads images of the first question too.
        return visible_images(separators, [before[im.turn] if im.turn else 0 for im in self.images])


def visible_images(separators: Tensor, first: Sequence[int]) -> Tensor:
    """[N], how many images each token reads if an image is read from its message on.

    Every message that is not empty ends with one separator, the system message always.

    Args:
        separators: bool [N], True at the tokens that end messages.
        first: for each image in reading order, how many messages end before that.
    """
    closed = separators.long().cumsum(0) - separators.long()  # messages before each token
    return torch.searchsorted(torch.tensor(first), closed, right=True)


def transcribe_prompt(
    prompt: Prompt,
    numbers: Sequence[int],
    counts: Sequence[int],
    visible: Tensor,
    model: GeneratingModel,
) -> Transcript:
    """The transcript of a prompt.

    Args:
        prompt: on the CPU.
        numbers: of its images, at least 0.
        counts: tokens of each image.
        visible: [N] or one number, how many images each token reads.
        model: whose config determines scaling.
    """
    ids, positions, image_mask = (
        t[0] for t in (prompt.input_ids, prompt.position_ids, prompt.image_mask)
    )
    tokens = ids.clone()
    named = torch.tensor([-1 - number for number in numbers]).long()
    tokens[image_mask] = named.repeat_interleave(torch.tensor(counts, dtype=torch.long))
    scaling = scaled_lengths(model, positions.max()[None], torch.tensor([len(ids)]))
    begins = torch.tensor([0, *counts]).long().cumsum(0)[:-1]
    first = positions[image_mask][begins].tolist() if len(counts) else []
    images = tuple((number, int(position)) for number, position in zip(numbers, first, strict=True))
    return Transcript.of(tokens, positions, positions, visible, scaling, images)


def transcribe(tokens: Tensor, prompt: Transcript, model: GeneratingModel) -> Transcript:
    """The transcript of generated tokens [n], which follow a prompt."""
    count = len(prompt) + torch.arange(len(tokens))
    positions = prompt.positions[-1] + 1 + torch.arange(len(tokens))
    at_count = queries_at_count(model.config, bool(prompt.images))
    return Transcript.of(
        tokens.cpu(),
        positions,
        count if at_count else positions,
        prompt.visible[-1],
        scaled_lengths(model, positions, count + 1),
        prompt.images,
    )


def scaled_lengths(model: GeneratingModel, positions: Tensor, tokens: Tensor) -> Tensor:
    """[T], lengths for dynamic scaling where it takes effect, else 0.

    Args:
        model: whose config determines them.
        positions: [T], highest position ids so far.
        tokens: [T], tokens so far.
    """
    config = model.config
    length = model.model.rope_lengths(positions[:, None], tokens)
    if (config.rope_scaling or {}).get("type") != "dynamic":
        return torch.zeros_like(length)
    return torch.where(length > config.text_config.max_position_embeddings, length, 0)


def load_images(
    images: Any,
    turn: int,
    numbers: Iterator[int],
    image_processor: CoMemoImageProcessor,
    config: CoMemoConfig,
) -> tuple[ShownImage, ...]:
    """Read and tile the images of a question.

    Args:
        images: one or a list: inputs of the image processor, or (pixel_values, grid).
        turn: index of the question.
        numbers: an iterator of unused numbers.
        image_processor: of the checkpoint.
        config: of the model.

    Raises:
        ValueError: a bad image, or tiles that do not match their grid.
    """
    given = images if isinstance(images, list) else [] if images is None else [images]
    sources = [flatten_images(image) for image in given if not isinstance(image, tuple)]
    for source in sources:
        if len(source) != 1:
            raise ValueError(
                f"ChatSession.ask: an item of images must be one image, got {len(source)}:"
                " pass a list of images"
            )
    loaded = iter(list(image_processor.load([image for (image,) in sources])))
    found = []
    for image in given:
        pixel_values, (cols, rows) = image if isinstance(image, tuple) else next(loaded)
        check_tiles("ChatSession.ask", pixel_values, config.vision_config.image_size[0])
        grid = (int(cols), int(rows))
        tokens = ops.image_tokens(grid, config.side, config.use_thumbnail)
        if tokens != len(pixel_values) * config.tokens_per_tile:
            raise ValueError(
                f"ChatSession.ask: an image of grid {grid} must have"
                f" {tokens // config.tokens_per_tile} tiles, got {len(pixel_values)}"
            )
        found.append(ShownImage(next(numbers), grid, tokens, turn, pixel_values))
    return tuple(found)
