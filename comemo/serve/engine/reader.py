"""From messages and pictures to a prompt, and to a transcript that finds what is held of it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import comemo_kernels as ops
from comemo import prompts
from comemo.chat.conversation import CHOICES, transcribe_prompt, visible_images
from comemo.chat.driver import Prompt, check_tokenizer
from comemo.chat.transcript import NO_IMAGES, Transcript
from comemo.decode.interface import GeneratingModel
from comemo.generation_inputs import check_range
from comemo.processing.messages import read_conversations
from comemo.processor import CoMemoProcessor
from comemo.serve.work import Picture


@dataclass(frozen=True)
class OpenedPicture:
    """A picture whose size is known.

    Attributes:
        key: see `Picture`.
        grid: (cols, rows) of its tiles.
        load: reads its tiles [t, 3, side, side].
    """

    key: str
    grid: tuple[int, int]
    load: Callable[[], Tensor] = field(repr=False)


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt with what belongs to it, see `Work`."""

    prompt: Prompt
    transcript: Transcript
    pictures: tuple[Picture, ...]


class PromptReader:
    """Reads prompts, in any number of threads.

    Args:
        model: whose config determines template and positions.
        processor: of its checkpoint.
        rope: "dhr" or "original".
        visibility: "causal" or "all", see `ChatSession`.

    Attributes:
        config: of the model.
        rope, visibility: as given.
        stop_id: token that ends every answer.

    Raises:
        ValueError: an unknown choice, or a tokenizer without CoMemo's control tokens.
    """

    def __init__(
        self,
        model: GeneratingModel,
        processor: CoMemoProcessor,
        rope: str = "dhr",
        visibility: str = "causal",
    ) -> None:
        for name, value in (("rope", rope), ("visibility", visibility)):
            if value not in CHOICES[name]:
                raise ValueError(f"PromptReader: {name} must be of {CHOICES[name]}, got {value!r}")
        self._model, self._processor, self.config = model, processor, model.config
        self._tokenizer, self.rope, self.visibility = processor.tokenizer, rope, visibility
        stop = prompts.stop_text(model.config.template)
        check_tokenizer(self._tokenizer, stop)
        self.stop_id = self._tokenizer.convert_tokens_to_ids(stop)
        self._context = self._tokenizer.convert_tokens_to_ids(prompts.IMAGE_CONTEXT)
        self._template = prompts.chat_template(model.config.template)

    def read(
        self, messages: Sequence[dict[str, Any]], opened: Sequence[OpenedPicture]
    ) -> ReadPrompt:
        """Write, encode and number a prompt.

        Args:
            messages: in a form of `apply_chat_template`; the last one is of the user.
            opened: the pictures of all image parts and `<image>` marks, in reading order.

        Raises:
            ValueError: messages of unknown form, pictures that are not as many, a prompt beyond the
                position range.
        """
        config = self._model.config
        text = self._processor.apply_chat_template(
            list(messages),
            chat_template=self._template,
            add_generation_prompt=True,
            tokenize=False,
        )
        counts = [ops.image_tokens(one.grid, config.side, config.use_thumbnail) for one in opened]
        ids = torch.tensor([prompts.encode_with_images(self._tokenizer, text, counts)])
        image_mask, ones = ids == self._context, torch.ones_like(ids)
        grids = [one.grid for one in opened] if self.rope == "dhr" and opened else None
        positions = self._model.model.prompt_position_ids(image_mask, ones, grids)
        check_range(config, positions, ones, bool(opened))
        prompt = Prompt(text, ids, image_mask, positions)
        visible = self._visible(messages, ids[0] == self.stop_id, len(opened))
        numbers = [_number(one.key) for one in opened]
        transcript = transcribe_prompt(prompt, numbers, counts, visible, self._model)
        parts = positions[image_mask].split(counts) if counts else ()
        pictures = tuple(
            Picture(
                one.key, one.grid, count // config.tokens_per_tile, count, one.load, part - part[0]
            )
            for one, count, part in zip(opened, counts, parts, strict=True)
        )
        return ReadPrompt(prompt, transcript, pictures)

    def _visible(
        self, messages: Sequence[dict[str, Any]], separators: Tensor, images: int
    ) -> Tensor:
        """[N] or one number: how many images each token reads."""
        if not images or self.visibility == "all":
            return torch.tensor(images or NO_IMAGES)
        (read,), _ = read_conversations([list(messages)], lambda text: text)
        if read[0]["role"] == "system":
            read = read[1:]
        first: list[int] = []
        ended = 1  # the system message, which every prompt has
        seen_user = False
        for message in read:
            # As published, the system message reads images of the first question too.
            begin = ended if seen_user else 0
            first += [begin] * _count_images(message["content"])
            ended += _is_shown(message["content"])
            seen_user |= message["role"] == "user"
        return visible_images(separators, first)


def _count_images(content: str | list[dict[str, Any]]) -> int:
    if isinstance(content, str):
        return content.count(prompts.IMAGE_MARK)
    return sum(part["type"] == "image" for part in content)


def _is_shown(content: str | list[dict[str, Any]]) -> bool:
    """Whether a message is not empty, and so ends with a separator."""
    if isinstance(content, str):
        return bool(content)
    return any(part["type"] == "image" or part.get("text") for part in content)


def _number(key: str) -> int:
    """A number for a picture, the same for the same key: 62 bits of a digest."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 2
