"""Read a checkpoint into a model that ranks divide: its own parts, one weight at a time."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from comemo.parallel.split import Split, SplitHead
from comemo.parallel.stages import LastStage
from comemo.parallel.tensor import COLUMNS, cut, head_part, kinds_of

Place = tuple[Tensor, Callable[[Tensor], Tensor], tuple[int, ...]]  # to, of the whole, its shape


def places_of(model: Any, split: Split | None) -> dict[str, Place]:
    """Where weights go: the name in a whole model -> a parameter and what it takes of the weight.

    Args:
        model: a divided `CoMemoForConditionalGeneration`.
        split: the ranks that divide its layers.
    """
    kinds = {} if split is None else kinds_of(model)
    places: dict[str, Place] = {}
    for name, weight in model.named_parameters():
        name = name.replace("lm_head.module.", "lm_head.")
        kind = kinds.get(id(weight))
        shape = list(weight.shape)
        take: Callable[[Tensor], Tensor] = _whole
        if kind is not None and split is not None:
            shape[1 if kind == COLUMNS else 0] *= split.size

            def take(whole: Tensor, kind: int = kind) -> Tensor:
                return cut(whole, kind, split)

        elif name == "lm_head.weight" and (head := _head_of(model)) is not None:
            shape[0] = head.out_features
            take = functools.partial(head_part, split=head.split)

        places[name] = weight, take, tuple(shape)
    return places


def _whole(weight: Tensor) -> Tensor:
    return weight


def _head_of(model: Any) -> SplitHead | None:
    head = model.lm_head.module if isinstance(model.lm_head, LastStage) else model.lm_head
    return head if isinstance(head, SplitHead) else None


@torch.no_grad()
def read_into(
    places: dict[str, Place],
    files: Iterable[Path],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    elsewhere: set[str],
) -> list[str]:
    """Copy weights of files into the parameters of a divided model.

    Args:
        places: see `places_of`.
        files: safetensors files.
        convert: weights by their names in the file -> by their names here.
        elsewhere: names of weights that other ranks have.

    Returns:
        What is wrong, a text for each kind of fault; empty if all weights were read.
    """
    missing, unexpected, shapes = set(places), [], []
    for key, weight in _weights_in(files):
        for name, part in convert({key: weight}).items():
            if name in elsewhere:
                continue
            if name not in places:
                unexpected.append(key)
                continue
            target, take, shape = places[name]
            missing.discard(name)
            if tuple(part.shape) != shape:
                shapes.append(f"{name} {tuple(part.shape)} for {shape}")
            else:
                target.copy_(take(part))
    faults = {
        "missing_keys": sorted(missing),
        "unexpected_keys": sorted(set(unexpected)),
        "mismatched_keys": sorted(shapes),
    }
    return [f"{kind}: {names}" for kind, names in faults.items() if names]


def _weights_in(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, not a dictionary
                yield key, file.get_tensor(key)


def weight_files(find: Callable[[str], Path | None]) -> list[Path]:
    """The safetensors files of a checkpoint.

    Args:
        find: gives the path of a file of the checkpoint, None if there is none.
    """
    index = find("model.safetensors.index.json")
    if index is None:
        single = find("model.safetensors")
        return [] if single is None else [single]
    names = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [path for name in names if (path := find(name)) is not None]
