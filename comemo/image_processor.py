"""Image processor: pictures to normalised tiles and their grids, in transformers' terms."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType

from comemo import images as pictures
from comemo.config import CoMemoConfig
from comemo.safety.files import HUB_OPTIONS, hub_options, is_published

TILING = ("input_size", "min_num", "max_num", "use_thumbnail", "published")
PIXELS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
SETTINGS = (*TILING, *PIXELS, "do_convert_rgb")
# What the tiling does anyway: nothing else can be had.
FIXED = {"do_resize": True, "do_center_crop": False, "do_pad": False}
# What only a call takes, and what changes no value.
FREE = ("return_tensors", "device", "data_format", "input_data_format", "disable_grouping")
# What loading takes beside settings; the last line is AutoImageProcessor's.
LOADING = (
    *(*HUB_OPTIONS, "force_download", "proxies", "image_processor_filename"),
    *("config", "code_revision", "use_fast", "backend", "trust_remote_code"),
)
SERVICE = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")


class CoMemoImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options of a call, beside those of every image processor.

    Attributes:
        input_size: side of a tile in pixels.
        min_num, max_num: tiles of one picture, the thumbnail not counted.
        use_thumbnail: whether a picture of more than one tile carries a thumbnail.
        published: exactly the published pixels (EXIF orientation ignored).
    """

    input_size: Any  # any integer, numpy's too: checked where it is used
    min_num: Any
    max_num: Any
    use_thumbnail: bool | None
    published: bool | None


# Of all options that image processors have, ours among them.
IMAGE_NAMES = frozenset(ImagesKwargs.__annotations__) | frozenset(
    CoMemoImageProcessorKwargs.__annotations__
)


class CoMemoImageProcessor(BaseImageProcessor):
    """Pictures to normalised tiles and their grids.

    Args:
        input_size: side of a tile in pixels.
        min_num, max_num: tiles of one picture, the thumbnail not counted.
        use_thumbnail: whether a picture of more than one tile carries a thumbnail.
        published: exactly the published pixels (EXIF orientation ignored).
        do_rescale, rescale_factor: whether the values 0 to 255 are multiplied, and with what.
        do_normalize, image_mean, image_std: whether they are normalised then, and with what. The
            model wants the defaults of all five.
        do_convert_rgb: False refuses pictures of another mode than RGB.

    Raises:
        ValueError: an option that there is not, or that cannot be honoured here (`size`,
            `do_resize=False`, ...).
    """

    model_input_names = ["pixel_values", "tile_grid"]
    valid_kwargs = CoMemoImageProcessorKwargs
    do_resize, do_center_crop, do_pad = True, False, False

    def __init__(
        self,
        input_size: int = 448,
        min_num: int = 1,
        max_num: int = 12,
        use_thumbnail: bool = True,
        published: bool = False,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Iterable[float] = pictures.IMAGENET_MEAN,
        image_std: float | Iterable[float] = pictures.IMAGENET_STD,
        do_convert_rgb: bool = True,
        **kwargs: Any,
    ) -> None:
        given = {name: value for name, value in kwargs.items() if name not in SERVICE}
        check_options("CoMemoImageProcessor", given, free=())
        super().__init__()
        self.input_size, self.min_num, self.max_num = input_size, min_num, max_num
        self.use_thumbnail, self.published = use_thumbnail, published
        self.do_rescale, self.rescale_factor = do_rescale, rescale_factor
        self.do_normalize, self.do_convert_rgb = do_normalize, do_convert_rgb
        self.image_mean, self.image_std = _numbers(image_mean), _numbers(image_std)

    def __call__(
        self, images: Any, return_tensors: str | TensorType | None = "pt", **options: Any
    ) -> BatchFeature:
        """Tiles [T, 3, side, side] of all pictures and `tile_grid` [pictures, 2] (cols, rows).

        Args:
            images: a picture or a (nested) list: PIL image, path, bytes, file, uint8 array or
                tensor (with four axes: several), `data:` URL or base64.
            return_tensors: "pt", "np", or None for lists (of arrays, the tiles).
            options: those of the class for this call; `data_format` of the tiles and
                `input_data_format` of arrays and tensors, "channels_first" or "channels_last";
                `device` of what is returned.

        Raises:
            ValueError: an option that there is not or that cannot be honoured; no picture, or one
                that cannot be read.
        """
        check_options("CoMemoImageProcessor", options)
        chosen = self.settings(options)
        order = options.get("input_data_format")
        found = [_channels_last(image, order) for image in flatten_images(images)]
        loaded = [_load(image, chosen) for image in found]
        if not loaded:
            raise ValueError("CoMemoImageProcessor: wanted at least one picture, got none")
        tiles = torch.cat([tiles for tiles, _ in loaded])
        if (
            ChannelDimension(options.get("data_format") or "channels_first")
            == ChannelDimension.LAST
        ):
            tiles = tiles.permute(0, 2, 3, 1).contiguous()
        grids = torch.tensor([grid for _, grid in loaded])
        kind = None if return_tensors is None else TensorType(return_tensors)
        if kind == TensorType.PYTORCH:
            device = options.get("device")
            data = {"pixel_values": tiles.to(device), "tile_grid": grids.to(device)}
            return BatchFeature(data)
        if options.get("device") is not None:
            raise ValueError("CoMemoImageProcessor: device needs return_tensors='pt'")
        if kind is None:
            return BatchFeature({"pixel_values": list(tiles.numpy()), "tile_grid": grids.tolist()})
        return BatchFeature(
            {"pixel_values": tiles.numpy(), "tile_grid": grids.numpy()}, tensor_type=kind
        )

    preprocess = __call__

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the class, with those of a call before them.

        Args:
            options: of a call; None means the setting of the class.
        """
        given = {name: options.get(name) for name in SETTINGS}
        return {n: getattr(self, n) if value is None else value for n, value in given.items()}

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As of transformers; the model's config says it all where no file is for this class."""
        path, hub = pretrained_model_name_or_path, hub_options(kwargs)
        from_pipeline = "_from_pipeline" in kwargs  # which hands on what is for the model
        found: dict[str, Any] | None = None
        try:
            found, _ = super().get_image_processor_dict(path, **dict(kwargs))
            of = found.get("image_processor_type") or found.get("feature_extractor_type")
        except OSError:
            of = None
            if not is_published(path, **hub):
                raise
        own = {n: v for n, v in kwargs.items() if n not in LOADING and not n.startswith("_")}
        own = {n: v for n, v in own.items() if not from_pipeline or n in IMAGE_NAMES}
        if is_published(path, **hub):
            told = settings_of(CoMemoConfig.from_pretrained(path, **hub))
            return told | (found if found and of in (None, cls.__name__) else {}), own
        if of not in (None, cls.__name__):
            raise ValueError(f"{cls.__name__}: {path} holds another image processor, {of}")
        return found or {}, own

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of transformers; options that there are not are refused.

        Args:
            image_processor_dict: of a file: what is not known in it becomes an attribute.
            kwargs: settings before those of the file; `return_unused_kwargs` to get back what is
                none.

        Raises:
            ValueError: as of the class.
        """
        given = {n: v for n, v in kwargs.items() if v is not None and not n.startswith("_")}
        wants_rest = given.pop("return_unused_kwargs", False)
        rest = {n: given.pop(n) for n in list(given) if wants_rest and n not in IMAGE_NAMES}
        check_options(f"{cls.__name__}.from_pretrained", given, free=())
        file = {n: value for n, value in image_processor_dict.items() if n not in SERVICE}
        extra = {name: file.pop(name) for name in list(file) if name not in IMAGE_NAMES}
        processor = cls(**file | given)
        for name, value in extra.items():
            setattr(processor, name, value)
        return (processor, rest) if wants_rest else processor

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """As of transformers."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))


def settings_of(config: CoMemoConfig) -> dict[str, Any]:
    """What a model's config says of its pictures.

    Args:
        config: of the checkpoint.
    """
    return {
        "input_size": config.force_image_size,
        "min_num": config.min_dynamic_patch,
        "max_num": config.max_dynamic_patch,
        "use_thumbnail": config.use_thumbnail,
    }


def check_options(caller: str, options: Mapping[str, Any], free: Iterable[str] = FREE) -> None:
    """Refuse what would change nothing.

    Args:
        caller: whose name the error begins with.
        options: by name; None stands for the default.
        free: names that are honoured beside the settings.

    Raises:
        ValueError: an unknown name, or a value that is not honoured.
    """
    unknown = sorted(set(options) - IMAGE_NAMES)
    if unknown:
        raise ValueError(f"{caller}: wanted an option of {sorted(SETTINGS)}, got {unknown[0]}")
    for name, value in options.items():
        if value is None or name in SETTINGS or name in free:
            continue
        if name in FIXED and value is FIXED[name]:
            continue
        wanted = f"must be {FIXED[name]}" if name in FIXED else "is not supported"
        hint = ", input_size is the side of a tile" if name == "size" else ""
        raise ValueError(f"{caller}: {name} {wanted}{hint}, got {value!r:.80}")


def flatten_images(images: Any) -> list[Any]:
    """All pictures of a picture or of a nested list of them.

    Args:
        images: as of `CoMemoImageProcessor`; None is no picture.
    """
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flatten_images(part)]
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images)
    return [] if images is None else [images]


def _channels_last(image: Any, order: str | ChannelDimension | None) -> Any:
    """An array or tensor of a known order as an array that is read so; else what it is."""
    if order is None or not isinstance(image, (np.ndarray, Tensor)) or image.ndim != 3:
        return image
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else image
    return (
        pixels.transpose(1, 2, 0) if ChannelDimension(order) == ChannelDimension.FIRST else pixels
    )


def _load(image: Any, chosen: Mapping[str, Any]) -> tuple[Tensor, tuple[int, int]]:
    rescales, normalises = chosen["do_rescale"], chosen["do_normalize"]
    return pictures.load_image(
        image,
        **{name: chosen[name] for name in TILING},
        convert_rgb=chosen["do_convert_rgb"],
        scale=chosen["rescale_factor"] if rescales else None,
        mean=chosen["image_mean"] if normalises else None,
        std=chosen["image_std"] if normalises else None,
    )


def _numbers(values: float | Iterable[float]) -> float | list[float]:
    """As they come back from a file."""
    return list(values) if isinstance(values, Iterable) else values
