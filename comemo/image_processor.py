"""Image processor of transformers' kind: images to normalised tiles and their grids."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from comemo.config import CoMemoConfig
from comemo.images import IMAGENET_MEAN, IMAGENET_STD, Grid, load_images
from comemo.safety.files import HUB_OPTIONS, hub_options, is_published

TILING = ("input_size", "min_num", "max_num", "use_thumbnail", "published")
PIXELS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
SETTINGS = (*TILING, *PIXELS, "do_convert_rgb")
# What the tiling always does: no other value is accepted.
FIXED = {"do_resize": True, "do_center_crop": False, "do_pad": False}
# What only a call takes, and what changes no pixel.
FREE = ("return_tensors", "device", "data_format", "input_data_format", "disable_grouping")
# What loading takes besides settings: where to find files, and options of AutoImageProcessor.
OF_FILES = (*HUB_OPTIONS, "force_download", "proxies", "image_processor_filename")
OF_AUTO = ("config", "code_revision", "use_fast", "backend", "trust_remote_code")
LOADING = (*OF_FILES, *OF_AUTO)
SERVICE = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")


class CoMemoImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options of a call, in addition to those of every image processor.

    Attributes:
        input_size: side of a tile in pixels.
        min_num, max_num: tiles of one image, the thumbnail not counted.
        use_thumbnail: whether an image of more than one tile has a thumbnail.
        published: exactly the published pixels (EXIF orientation ignored).
    """

    input_size: Any  # any integer, also of NumPy: checked where it is used
    min_num: Any
    max_num: Any
    use_thumbnail: bool | None
    published: bool | None


# Names of all options of image processors, including this one's.
IMAGE_NAMES = frozenset(ImagesKwargs.__annotations__) | frozenset(
    CoMemoImageProcessorKwargs.__annotations__
)


class CoMemoImageProcessor(BaseImageProcessor):
    """Images to normalised tiles and their grids.

    Args:
        input_size: side of a tile in pixels.
        min_num, max_num: tiles of one image, the thumbnail not counted.
        use_thumbnail: whether an image of more than one tile has a thumbnail.
        published: exactly the published pixels (EXIF orientation ignored).
        do_rescale, rescale_factor: whether to multiply the values 0 to 255, and by what.
        do_normalize, image_mean, image_std: whether to normalise them then, and how. The model
            needs the defaults of all five.
        do_convert_rgb: False refuses images of another mode than RGB.

    Raises:
        ValueError: an unknown option, or one that is not supported here (`size`,
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
        image_mean: float | Iterable[float] = IMAGENET_MEAN,
        image_std: float | Iterable[float] = IMAGENET_STD,
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
        """Tiles [T, 3, side, side] of all images and `tile_grid` [images, 2] (cols, rows).

        Args:
            images: an image or a (nested) list: PIL image, path, bytes, file, uint8 array or tensor
                (with four axes: several images), `data:` URL or base64.
            return_tensors: "pt", "np", or None for lists (of arrays for the tiles).
            options: those of the class, for this call; `data_format` of the tiles and
                `input_data_format` of arrays and tensors, "channels_first" or "channels_last";
                `device` of the result.

        Raises:
            ValueError: an unknown or unsupported option; no image, or one that cannot be read.
        """
        check_options("CoMemoImageProcessor", options)
        loaded = list(self.load(flatten_images(images), options))
        if not loaded:
            raise ValueError("CoMemoImageProcessor: wanted at least one image, got none")
        tiles = loaded[0][0] if len(loaded) == 1 else torch.cat([tiles for tiles, _ in loaded])
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

    def load(
        self, images: Sequence[Any], options: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[Tensor, Grid]]:
        """Tiles [t, 3, side, side] and grid (cols, rows) of each image, see `load_images`.

        Args:
            images: a flat list, see `flatten_images`.
            options: of a call.
        """
        chosen = self.settings(options or {})
        order = (options or {}).get("input_data_format")
        rescales, normalises = chosen["do_rescale"], chosen["do_normalize"]
        return load_images(
            [_channels_last(image, order) for image in images],
            **{name: chosen[name] for name in TILING},
            convert_rgb=chosen["do_convert_rgb"],
            scale=chosen["rescale_factor"] if rescales else None,
            mean=chosen["image_mean"] if normalises else None,
            std=chosen["image_std"] if normalises else None,
        )

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a call: its options, and those of the class for the others.

        Args:
            options: of a call; None means the setting of the class.
        """
        given = {name: options.get(name) for name in SETTINGS}
        return {n: getattr(self, n) if value is None else value for n, value in given.items()}

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; without a file for this class the settings are in the config."""
        path, hub = pretrained_model_name_or_path, hub_options(kwargs)
        from_pipeline = "_from_pipeline" in kwargs  # a pipeline also passes options of the model
        found: dict[str, Any] | None = None
        try:
            found, _ = super().get_image_processor_dict(path, **dict(kwargs))
            kind = found.get("image_processor_type") or found.get("feature_extractor_type")
        except OSError:
            kind = None
            if not is_published(path, **hub):
                raise
        own = {n: v for n, v in kwargs.items() if n not in LOADING and not n.startswith("_")}
        own = {n: v for n, v in own.items() if not from_pipeline or n in IMAGE_NAMES}
        if is_published(path, **hub):
            settings = settings_of(CoMemoConfig.from_pretrained(path, **hub))
            return settings | (found if found and kind in (None, cls.__name__) else {}), own
        if kind not in (None, cls.__name__):
            raise ValueError(f"{cls.__name__}: {path} holds another image processor, {kind}")
        return found or {}, own

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but unknown options are refused.

        Args:
            image_processor_dict: of a file; unknown entries become attributes.
            kwargs: settings that override the file; `return_unused_kwargs` returns unknown ones.

        Raises:
            ValueError: as the class.
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
        """As in transformers."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))


def settings_of(config: CoMemoConfig) -> dict[str, Any]:
    """The settings that a model's config holds for its images.

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
    """Refuse options that would have no effect.

    Args:
        caller: the name that the error begins with.
        options: by name; None means the default.
        free: names that are accepted besides the settings.

    Raises:
        ValueError: an unknown name, or an unsupported value.
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
    """A flat list of the images in an image or a nested list of images.

    Args:
        images: see `CoMemoImageProcessor`; None is no image.
    """
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flatten_images(part)]
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images)
    return [] if images is None else [images]


def _channels_last(image: Any, order: str | ChannelDimension | None) -> Any:
    """An array or tensor of a known axis order as an array with its channels last."""
    if order is None or not isinstance(image, (np.ndarray, Tensor)) or image.ndim != 3:
        return image
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else image
    return (
        pixels.transpose(1, 2, 0) if ChannelDimension(order) == ChannelDimension.FIRST else pixels
    )


def _numbers(values: float | Iterable[float]) -> float | list[float]:
    """A number, or a list as JSON would give it."""
    return list(values) if isinstance(values, Iterable) else values
