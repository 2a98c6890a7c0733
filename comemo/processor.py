"""Processor of transformers' kind: images and messages to the inputs of `generate`."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData

import comemo_kernels as ops
from comemo import prompts
from comemo.image_processor import CoMemoImageProcessor, check_options, flatten_images
from comemo.images import choose_grid
from comemo.processing import messages
from comemo.processing.options import (
    CALL_NAMES,
    GENERATION_NAMES,
    TEMPLATE_NAMES,
    TEXT_OPTIONS,
    CoMemoProcessorKwargs,
    sort_options,
    without_generation,
)
from comemo.processing.processor_files import PUBLISHED_TEMPLATES, LoadsProcessor, scale_tokens

__all__ = ["CoMemoImageProcessor", "CoMemoProcessor", "CoMemoProcessorKwargs"]


class CoMemoProcessor(LoadsProcessor, ProcessorMixin):
    """Image processor and tokenizer in one call, and the chat template.

    Args:
        image_processor: a `CoMemoImageProcessor`.
        tokenizer: of the checkpoint.
        chat_template: Jinja source; None for the default template.
        tokens_per_tile: image tokens of one tile of the image processor's `input_size`.
    """

    valid_processor_kwargs = CoMemoProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        tokens_per_tile: int = 256,
        **kwargs: Any,
    ) -> None:
        self.tokens_per_tile = tokens_per_tile
        self.image_token = prompts.IMAGE_CONTEXT
        template = prompts.chat_template() if chat_template is None else chat_template
        super().__init__(image_processor, tokenizer, chat_template=template, **kwargs)

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Prompts with `<image>` marks, and images in reading order, to model inputs.

        Args:
            images: an image or a (nested) list, see `CoMemoImageProcessor`, or None. A list with
                one list per prompt assigns the images to the prompts.
            text: one prompt or several, as `apply_chat_template` writes them. `<IMG_CONTEXT>`
                alone is a mark too.
            kwargs: options, by name or in `text_kwargs`, `images_kwargs` or `common_kwargs`. For
                text: `padding` (True), `padding_side`, `max_length`, `pad_to_multiple_of`,
                `truncation` (never of image tokens), `add_special_tokens`,
                `return_attention_mask`, `return_mm_token_type_ids`. For images: those of the image
                processor. For both: `return_tensors` ("pt"; None for lists). Options of videos and
                audio have no effect.

        Returns:
            input_ids and attention_mask [B, N], and with images pixel_values, tile_grid.

        Raises:
            ValueError: numbers of marks and images that differ; a bad image; an option that is
                unknown, given twice or not supported; image tokens that truncation would cut.
        """
        if text is None:
            raise ValueError("CoMemoProcessor: text must be a string or a list of them, got None")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError("CoMemoProcessor: text must be a string or a list of strings")
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"CoMemoProcessor: the model takes only images, got {name}")
        texts = [one.replace(self.image_token, prompts.IMAGE_MARK) for one in texts]
        options = self._options(without_generation(kwargs))
        data, counts = self._read_images(images, options["images_kwargs"])
        marks = [one.count(prompts.IMAGE_MARK) for one in texts]
        _check_marks(marks, images, len(counts))
        rest = iter(counts)
        own = [[next(rest) for _ in range(number)] for number in marks]
        return self._encode(texts, own, options["text_kwargs"], data)

    def _options(self, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Options of text and of images: those given, then those of the parts, then defaults."""
        given = sort_options(kwargs)
        # Some releases of transformers want it among the text options, newer ones outside.
        token_types = given["text_kwargs"].pop("return_mm_token_type_ids", None)
        types = CoMemoProcessorKwargs.__annotations__["text_kwargs"]
        try:
            validate_typed_dict(types, given["text_kwargs"])
            merged = self._merge_kwargs(
                CoMemoProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **given
            )
        except StrictDataclassError as error:
            raise ValueError("CoMemoProcessor: " + " ".join(str(error).split())) from error
        text, images = merged["text_kwargs"], merged["images_kwargs"]
        check_options("CoMemoProcessor", images)
        for name, value in text.items():
            if name not in TEXT_OPTIONS and value not in (None, False):
                raise ValueError(f"CoMemoProcessor: {name} is not supported, got {value!r:.80}")
        images["return_tensors"] = text["return_tensors"]
        text["return_mm_token_type_ids"] = token_types
        # A max_length that is only in the tokenizer's files may be meant for another use.
        text["strict"] = given["text_kwargs"].get("max_length") is not None
        return {"text_kwargs": text, "images_kwargs": images}

    def _read_images(
        self, images: Any, options: dict[str, Any]
    ) -> tuple[dict[str, Any], list[int]]:
        """The output of the image processor, and the image tokens of each image."""
        if not flatten_images(images):
            return {}, []
        data = dict(self.image_processor(images, **options))
        chosen = self.image_processor.settings(options)
        tokens = self._tokens_per_tile(chosen["input_size"])
        grids = [(int(cols), int(rows)) for cols, rows in data["tile_grid"]]
        return data, [ops.image_tokens(grid, 1, chosen["use_thumbnail"]) * tokens for grid in grids]

    def _tokens_per_tile(self, input_size: int) -> int:
        """Image tokens of a tile of another size than the image processor's own."""
        return scale_tokens(self.tokens_per_tile, self.image_processor.input_size, input_size)

    def _encode(
        self,
        texts: list[str],
        counts: list[list[int]],
        options: dict[str, Any],
        data: dict[str, Any],
    ) -> BatchFeature:
        """Ids of prompts whose images have `counts` tokens, truncated and padded."""
        named = ("padding", "truncation", "max_length", "pad_to_multiple_of")
        try:
            padding, truncation, limit, _ = self.tokenizer._get_padding_truncation_strategies(
                **{name: options.get(name) for name in named}, verbose=False
            )
        except ValueError as error:  # it names neither the option nor this class
            raise ValueError(f"CoMemoProcessor: padding or truncation: {error}") from error
        if options["padding"] == "max_length" and limit is None:
            raise ValueError("CoMemoProcessor: padding='max_length' needs max_length, got None")
        special = options.get("add_special_tokens")
        special = True if special is None else special
        rows = [
            prompts.encode_with_images(self.tokenizer, one, own, special)
            for one, own in zip(texts, counts, strict=True)
        ]
        longest = max(map(len, rows))
        if limit is not None and longest > limit:
            if truncation != "do_not_truncate":
                rows = [self._cut(row, limit, truncation, special) for row in rows]
            elif options["strict"]:
                raise ValueError(
                    f"CoMemoProcessor: a prompt has {longest} tokens, more than max_length {limit}:"
                    " pass truncation=True to cut it"
                )
        encoded = self.tokenizer.pad(
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]},
            padding=padding,
            max_length=limit,
            pad_to_multiple_of=options.get("pad_to_multiple_of"),
            padding_side=options.get("padding_side"),
        )
        data = data | {"input_ids": encoded["input_ids"]}
        if options.get("return_attention_mask") is not False:
            data["attention_mask"] = encoded["attention_mask"]
        if options["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
        return BatchFeature(data, tensor_type=options["return_tensors"])

    def _cut(self, row: list[int], limit: int, truncation: str, special: bool) -> list[int]:
        """A prompt truncated to `limit` tokens, at the tokenizer's truncation side."""
        if truncation == "only_second":
            raise ValueError("CoMemoProcessor: truncation 'only_second' needs pairs of texts")
        if len(row) <= limit:
            return row
        before, after = prompts.ids_around(self.tokenizer, "a") if special else ([], [])
        start, end, room = len(before), len(row) - len(after), limit - len(before) - len(after)
        if room < 0:
            raise ValueError(f"CoMemoProcessor: max_length {limit} has no room for special tokens")
        left = self.tokenizer.truncation_side == "left"
        kept = slice(end - room, end) if left else slice(start, start + room)
        lost = row[start : kept.start] if left else row[kept.stop : end]
        names = (prompts.IMAGE_START, prompts.IMAGE_CONTEXT, prompts.IMAGE_END)
        if not set(self.tokenizer.convert_tokens_to_ids(list(names))).isdisjoint(lost):
            raise ValueError(
                f"CoMemoProcessor: truncation of {len(row)} tokens to max_length {limit} would cut"
                " image tokens: shorten the text, or pass a smaller max_num"
            )
        return before + row[kept] + after

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Any = None,
        documents: Any = None,
        *,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but text of users stays text, even the name of a control token.

        Args:
            conversation: messages, or a list of several conversations, in the forms that
                `comemo.processing.messages` reads.
            chat_template: instead of the processor's own.
            tools, documents: for a template that uses them; the published ones do not.
            processor_kwargs: options of a call; they may also be among `kwargs`.
            kwargs: as in transformers: `add_generation_prompt`, `continue_final_message`,
                `tokenize`, `return_dict`, variables of the template.

        Raises:
            ValueError: as `read_conversations` and a call; tools or documents for a published
                template.
        """
        published = self._template(chat_template) in PUBLISHED_TEMPLATES
        for name, value in (("tools", tools), ("documents", documents)):
            if value and published:
                raise ValueError(
                    f"apply_chat_template: the published chat templates know no {name}, got"
                    f" {len(value)}: pass a chat_template that does"
                )
        kwargs.pop("sanitize_control_tokens", None)  # the conversation below is already safe
        safe, several = messages.read_conversations(conversation, self._escape, published)
        options = dict(processor_kwargs or {})
        of_call = CALL_NAMES | GENERATION_NAMES
        for name in [name for name in kwargs if name in of_call]:
            if name in options:
                raise ValueError(f"CoMemoProcessor: {name} was passed twice")
            options[name] = kwargs.pop(name)
        for name in kwargs:
            if published and name not in TEMPLATE_NAMES:
                raise ValueError(f"apply_chat_template: there is no option {name}")
        return super().apply_chat_template(
            safe if several else safe[0],
            chat_template,
            tools=messages.escape_texts(tools, self._escape),
            documents=messages.escape_texts(documents, self._escape),
            processor_kwargs=options,
            **kwargs,
        )

    def _template(self, chosen: str | None) -> str | None:
        """The source of a template that is chosen by name, by source, or by default."""
        own = self.chat_template
        if isinstance(own, dict):
            return own.get("default" if chosen is None else chosen, chosen)
        return own if chosen is None else chosen

    def _escape(self, text: str) -> str:
        return prompts.escape(text, self.tokenizer)

    @property
    def image_token_id(self) -> int:
        """Id of `<IMG_CONTEXT>`."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """As in transformers: image tokens and tiles of images of (height, width) pixels."""
        chosen = self.image_processor.settings(kwargs)
        limits = (chosen["min_num"], chosen["max_num"], chosen["input_size"])
        grids = [choose_grid(width, height, *limits) for height, width in image_sizes or ()]
        tiles = [ops.image_tokens(grid, 1, chosen["use_thumbnail"]) for grid in grids]
        tokens = self._tokens_per_tile(chosen["input_size"])
        return MultiModalData(
            num_image_tokens=[number * tokens for number in tiles], num_image_patches=tiles
        )

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "tile_grid"]


def _check_marks(marks: list[int], images: Any, number: int) -> None:
    rows = isinstance(images, (list, tuple)) and len(images) == len(marks)
    rows = rows and all(isinstance(row, (list, tuple)) for row in images)
    shown = [len(flatten_images(row)) for row in images] if rows else None
    if sum(marks) != number or (shown is not None and shown != marks):
        found = f"{number} images" if shown is None or len(shown) == 1 else f"{shown} images"
        raise ValueError(
            f"CoMemoProcessor: {marks} {prompts.IMAGE_MARK} marks in the texts for {found}"
        )
