"""Processor: pictures and messages to what `generate` takes, in transformers' terms."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

import comemo_kernels as ops
from comemo import images as pictures
from comemo import prompts
from comemo.checkpoint import HUB_OPTIONS
from comemo.config import CoMemoConfig


class CoMemoImageProcessor(BaseImageProcessor):
    """Pictures to normalised tiles and their grids.

    Args:
        input_size: side of a tile in pixels.
        min_num, max_num: tiles of one picture, the thumbnail not counted.
        use_thumbnail: whether a picture of more than one tile carries a thumbnail.
        published: exactly the published pixels (EXIF orientation ignored).
    """

    model_input_names = ["pixel_values", "tile_grid"]

    def __init__(
        self,
        input_size: int = 448,
        min_num: int = 1,
        max_num: int = 12,
        use_thumbnail: bool = True,
        published: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.input_size, self.min_num, self.max_num = input_size, min_num, max_num
        self.use_thumbnail, self.published = use_thumbnail, published

    def __call__(
        self, images: Any, return_tensors: str | None = "pt", **options: Any
    ) -> BatchFeature:
        """Tiles [T, 3, side, side] of all pictures and `tile_grid` [pictures, 2] (cols, rows).

        Args:
            images: a picture or a (nested) list: PIL image, path, bytes, file or uint8 array.
            options: `min_num`, `max_num`, `published` for this call.
        """
        settings = {
            name: options.get(name, getattr(self, name))
            for name in ("input_size", "min_num", "max_num", "use_thumbnail", "published")
        }
        loaded = [pictures.load_image(image, **settings) for image in flatten_images(images)]
        data = {
            "pixel_values": torch.cat([tiles for tiles, _ in loaded]),
            "tile_grid": torch.tensor([grid for _, grid in loaded]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    preprocess = __call__


class CoMemoProcessor(ProcessorMixin):
    """Image processor and tokenizer behind one call, and the chat template.

    Args:
        image_processor: a `CoMemoImageProcessor`.
        tokenizer: of the checkpoint.
        chat_template: Jinja source; of the config's template if None.
        tokens_per_tile: image tokens of one tile.
    """

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
        super().__init__(image_processor, tokenizer, chat_template=template)

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Prompts with `<image>` marks, and pictures in reading order, to model inputs.

        Args:
            images: a picture or a (nested) list of them, or None.
            text: one prompt or several, as `apply_chat_template` writes them; several are padded
                on the left.
            kwargs: `return_tensors` and the image processor's options.

        Returns:
            input_ids and attention_mask [B, N], and with pictures pixel_values, tile_grid.

        Raises:
            ValueError: `<image>` marks and pictures that differ in number; a bad picture.
        """
        if text is None:
            raise ValueError("CoMemoProcessor: text must be a string or a list of them, got None")
        tensors = kwargs.pop("return_tensors", None) or "pt"
        texts = [text] if isinstance(text, str) else list(text)
        data: dict[str, Any] = {}
        counts: list[int] = []
        options = {k: v for k, v in kwargs.items() if k in ("min_num", "max_num", "published")}
        if images is not None and len(flatten_images(images)):
            data = dict(self.image_processor(images, **options))
            counts = [
                ops.image_tokens(tuple(grid), 1, self.image_processor.use_thumbnail)
                * self.tokens_per_tile
                for grid in data["tile_grid"].tolist()
            ]
        marks = [one.count(prompts.IMAGE_MARK) for one in texts]
        if sum(marks) != len(counts):
            raise ValueError(
                f"CoMemoProcessor: {marks} {prompts.IMAGE_MARK} marks in the texts for"
                f" {len(counts)} images"
            )
        rows, start = [], 0
        for one, number in zip(texts, marks, strict=True):
            own = counts[start : start + number]
            rows.append(prompts.encode_with_images(self.tokenizer, one, own))
            start += number
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        data["input_ids"] = torch.tensor([[pad] * (longest - len(r)) + r for r in rows])
        data["attention_mask"] = torch.tensor(
            [[0] * (longest - len(r)) + [1] * len(r) for r in rows]
        )
        return BatchFeature(data, tensor_type=tensors)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As of transformers; what users typed stays text, control tokens' names included."""
        one = conversation and isinstance(conversation[0], dict)
        safe = [
            [{**message, "content": self._escape(message["content"])} for message in messages]
            for messages in ([conversation] if one else conversation)
        ]
        return super().apply_chat_template(safe[0] if one else safe, *args, **kwargs)

    def _escape(self, content: Any) -> Any:
        if isinstance(content, str):
            return prompts.escape(content, self.tokenizer)
        # Pictures are items of their own here: a typed mark is text.
        mark, inert = prompts.IMAGE_MARK, prompts.IMAGE_MARK.replace("<", "<" + prompts.MARKER)
        return [
            {**item, "text": prompts.escape(item["text"], self.tokenizer).replace(mark, inert)}
            if item.get("type") == "text"
            else item
            for item in content
        ]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "tile_grid"]

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Published checkpoints hold no processor files: the config says it all."""
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        config = CoMemoConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        settings = {
            "input_size": config.force_image_size,
            "min_num": config.min_dynamic_patch,
            "max_num": config.max_dynamic_patch,
            "use_thumbnail": config.use_thumbnail,
        }
        if processor_dict is not None:
            processor_dict.setdefault("chat_template", prompts.chat_template(config.template))
            processor_dict.setdefault("tokens_per_tile", config.tokens_per_tile)
            settings |= processor_dict.pop("image_processor", None) or {}
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub)
        return [CoMemoImageProcessor(**settings), tokenizer]


def flatten_images(images: Any) -> list[Any]:
    """All pictures of a picture or of a nested list of them."""
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flatten_images(part)]
    return [] if images is None else [images]
