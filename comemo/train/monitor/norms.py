"""Gradients and gates of a model as numbers: by part, by mixin layer, by layer."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from comemo.train.models.freezing import part_of
from comemo.train.parallel.gradients import is_divided, squares_by_name

_LAYER = re.compile(r"^(.*?\blayers?\.(\d+)(?:\.mixin)?)\.")
_MIXIN = re.compile(r"\blayers\.(\d+)\.mixin\.")


def layer_of(name: str) -> str:
    """The layer of a parameter, such as `model.language_model.layers.3.mixin`, else its module."""
    found = _LAYER.match(name)
    return found[1] if found else name.rpartition(".")[0]


def gradient_norms(model: nn.Module, total: float) -> dict[str, float]:
    """2-norms of the gradients before clipping.

    Args:
        model: with gradients, which may be clipped.
        total: the norm of all of them before clipping.

    Returns:
        `grad_norm`, `grad_norm/PART`, and `grad_norm/mixin.LAYER` for each mixin layer.
    """
    squares = _squares(model)
    whole = sum(squares.values()) ** 0.5
    scale = total / whole if whole > 0 else 1.0
    groups: dict[str, float] = {}
    for name, square in squares.items():
        keys = [part_of(name)]
        if found := _MIXIN.search(name):
            keys.append(f"mixin.{found[1]}")
        for key in keys:
            groups[key] = groups.get(key, 0.0) + square
    return {"grad_norm": total} | {
        f"grad_norm/{key}": scale * square**0.5 for key, square in groups.items()
    }


def largest_gradient(model: nn.Module) -> tuple[str, float]:
    """The layer with the largest gradient, and the share of its square in the whole."""
    layers: dict[str, float] = {}
    for name, square in _squares(model).items():
        key = layer_of(name)
        layers[key] = layers.get(key, 0.0) + square
    if not layers:
        return "none", 0.0
    name = max(layers, key=lambda key: layers[key])
    return name, layers[name] / (sum(layers.values()) or 1.0)


def gates(model: nn.Module) -> dict[str, float]:
    """The gates of every mixin layer: `gate/attn.LAYER`, `gate/mlp.LAYER` and their tanh.

    All ranks must call if weights are divided.
    """
    found: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        layer = _MIXIN.search(name)
        kind = re.search(r"\.(attn|mlp)_gate$", name)
        if layer and kind:
            gate: Any = parameter.detach()
            found.append(
                (f"{kind[1]}.{layer[1]}", gate.full_tensor() if is_divided(gate) else gate)
            )
    raw = _numbers(gate.float().reshape(()) for _, gate in found)
    values = {f"gate/{name}": value for (name, _), value in zip(found, raw, strict=True)}
    tanhs = torch.tensor(raw, dtype=torch.float64).tanh().tolist()
    return values | {
        f"gate_tanh/{name}": value for (name, _), value in zip(found, tanhs, strict=True)
    }


def _squares(model: nn.Module) -> dict[str, float]:
    """The square of each gradient's norm, with one sync. All ranks call if they are divided."""
    found = squares_by_name(model)
    return dict(zip(found, _numbers(found.values()), strict=True))


def _numbers(scalars: Iterable[Tensor]) -> list[float]:
    """Scalars of any device, copied to the CPU at once."""
    held = list(scalars)
    return torch.stack([scalar.to(held[0].device) for scalar in held]).tolist() if held else []
