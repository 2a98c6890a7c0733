"""Weights of files in which several are fused, each read alone, when it is asked for.

transformers quantises a weight as soon as it is read, which fused weights do not survive.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from comemo.parallel.loading import weight_files
from comemo.parallel.pretrained import dtype_of
from comemo.safety.files import find_file, read_json
from comemo.weights.quantising import check_torchao

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # names of a file -> names here


class Part:
    """One weight of a file: `part[...]` reads it.

    Args:
        whole: the slice of the file that it is in.
        key: the slice's name.
        convert: see `read_parts`.
        name: of the weight.

    Attributes:
        is_whole: whether the slice holds this weight alone, under its name here.
    """

    def __init__(self, whole: Any, key: str, convert: Convert, name: str) -> None:
        self._whole, self._key, self._convert, self._name = whole, key, convert, name
        self.is_whole = key == name

    def __getitem__(self, index: Any) -> Tensor:
        return self._convert({self._key: self._whole[...]})[self._name][index]


def read_parts(files: Iterable[Path], convert: Convert) -> dict[str, Part]:
    """The weights of files, by their names here; nothing is read except headers.

    Args:
        files: safetensors files; they stay open as long as a part exists.
        convert: weights by their names in the file -> by their names here.
    """
    found: dict[str, Part] = {}
    for path in files:
        file = safe_open(path, framework="pt")
        for key in file.keys():  # noqa: SIM118, not a dictionary
            whole = file.get_slice(key)
            shape = torch.empty(whole.get_shape(), device="meta")
            found |= {name: Part(whole, key, convert, name) for name in convert({key: shape})}
    return found


def quantises(cls: Any, path: Any, options: dict[str, Any], hub: dict[str, Any]) -> bool:
    """Whether a call of `from_pretrained` quantises weights that are not quantised yet.

    Args:
        cls: a class of models.
        path: directory or repository.
        options: of the call.
        hub: where to look for files.

    Raises:
        ValueError: weights that torchao quantised, and it is not installed, or they are those of a
            model with a language modelling head, which `cls` has not.
    """
    known = read_json(path, "config.json", **hub).get("quantization_config")
    if isinstance(known, dict) and known.get("quant_method") == "torchao":
        function = f"{cls.__name__}.from_pretrained({path})"
        check_torchao(function)
        files = weight_files(lambda name: find_file(path, name, **hub))
        if not hasattr(cls, "generate") and any(map(_is_with_head, files)):
            raise ValueError(
                f"{function}: quantised weights load into the class that saved them, got those of a"
                " model with a language modelling head: load that, and take its `model`"
            )
    return known is None and options.get("quantization_config") is not None


def _is_with_head(path: Path) -> bool:
    with safe_open(path, framework="pt") as file:
        return any(key.startswith("model.") for key in file.keys())  # noqa: SIM118


def split_fused(
    cls: Any, path: Any, options: dict[str, Any], convert: Any, hub: dict[str, Any]
) -> Any:
    """Options of `from_pretrained` with which fused weights are quantised after they are split.

    Args:
        cls: a class of models.
        path: directory or repository.
        options: of the call. If weights are fused, they get the weights, `config` and `dtype`.
        convert: weights by their names in files, and the config -> by their names here.
        hub: where to look for files.

    Returns:
        What to load: `path`, or None if the options say all.
    """
    files = weight_files(lambda name: find_file(path, name, **hub))
    config = options.get("config")
    if not isinstance(config, cls.config_class):
        config = cls.config_class.from_pretrained(path if config is None else config, **hub)
    parts = read_parts(files, lambda weights: convert(weights, config))
    if all(part.is_whole for part in parts.values()):
        return path
    dtype = options.pop("torch_dtype", None)
    dtype = options.get("dtype") or dtype or "auto"
    dtype = dtype_of(config, files) if dtype == "auto" else dtype
    options |= {"state_dict": parts, "config": config, "dtype": dtype}
    return None


def name_source(model: Any, path: Any, hub: dict[str, Any]) -> None:
    """Complete a model of `split_fused` by what comes from other files than the weights.

    Args:
        model: any model.
        path, hub: see `split_fused`.
    """
    model.name_or_path = model.config.name_or_path = str(path)
    if model.can_generate() and find_file(path, "generation_config.json", **hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)
