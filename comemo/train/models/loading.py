"""Weights of several files into one model: every one accounted for, each read once."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from comemo.checkpoint import from_published
from comemo.config import CoMemoConfig
from comemo.train.models.parts import Weight

DTYPES = ("F16", "BF16", "F32", "F64")  # of safetensors


def find_faults(
    config: CoMemoConfig, wanted: dict[str, torch.Size], weights: Sequence[Weight]
) -> list[str]:
    """What is wrong with the names, shapes and dtypes of weights. None of them is read.

    Args:
        config: of the model.
        wanted: name of a parameter -> its shape.
        weights: that should give exactly these.

    Returns:
        One text for each kind of fault.
    """
    unexpected, twice, shapes, dtypes = [], [], [], []
    found: set[str] = set()
    for weight, file in _opened(weights):
        view = file.get_slice(weight.key)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if dtype not in DTYPES:
            dtypes.append(f"{weight.key} {dtype}")
        for name, part in _convert(weight, torch.empty(shape, device="meta"), config).items():
            if name not in wanted:
                unexpected.append(weight.key)
            elif name in found:
                twice.append(weight.key)
            elif part.shape != wanted[name]:
                shapes.append(f"{weight.key} {shape}, for {name} {tuple(wanted[name])}")
            found.add(name)
    kinds = {
        "missing": sorted(wanted.keys() - found),
        "unexpected": sorted(set(unexpected)),
        "given twice": sorted(set(twice)),
        "of another shape": sorted(set(shapes)),
        f"of another dtype than {', '.join(DTYPES)}": sorted(set(dtypes)),
    }
    return [f"{kind}: {names}" for kind, names in kinds.items() if names]


@torch.no_grad()
def copy_weights(
    config: CoMemoConfig, parameters: dict[str, Tensor], weights: Sequence[Weight]
) -> None:
    """Copy weights into parameters, one at a time.

    Args:
        config: of the model.
        parameters: name -> where to; may have another dtype.
        weights: without faults, see `find_faults`.
    """
    for weight, file in _opened(weights):
        for name, part in _convert(weight, file.get_tensor(weight.key), config).items():
            parameters[name].copy_(part)


def _convert(weight: Weight, tensor: Tensor, config: CoMemoConfig) -> dict[str, Tensor]:
    return from_published({weight.name: tensor}, config)


def _opened(weights: Sequence[Weight]) -> Iterator[tuple[Weight, Any]]:
    """Each weight and its open file."""
    for path, group in groupby(weights, lambda weight: weight.file):
        with safe_open(path, framework="pt") as file:
            for weight in group:
                yield weight, file
