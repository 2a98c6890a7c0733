"""Layers of peft in a model: which layers get an adapter, with what rank, and how they come off."""

import math
import re
from typing import Any

from torch import nn

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.train.models.freezing import is_adapter
from comemo.train.settings import LoraSettings

PREFIX = "base_model.model."  # of names in peft's files
PARTS = ("vision", "language", "mixin")


def replace_layer(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module where a layer is.

    Args:
        model: is changed.
        name: of the layer in the model.
        module: instead.
    """
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def remove_adapters(model: Any, trained: dict[str, bool]) -> None:
    """Undo `add_adapters`, also if it was interrupted.

    Args:
        model: is changed.
        trained: `requires_grad` of every parameter before, by name.
    """
    for name, layer in adapted_layers(model):
        replace_layer(model, name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers of peft in a model, by name.

    Args:
        model: any.
    """
    return [
        (n, m)
        for n, m in model.named_modules()
        if hasattr(m, "lora_A") and hasattr(m, "get_base_layer")
    ]


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters.

    Args:
        model: any.
    """
    return any(is_adapter(name) for name, _ in model.named_parameters())


def name_patterns(model: CoMemoForConditionalGeneration) -> dict[str, str]:
    """Part -> pattern of the names of its adapted layers.

    Args:
        model: whose config says which vision layers run.
    """
    run = "|".join(str(index) for index in range(len(model.model.vision_layers())))
    network = r"mlp\.(gate|up|down)_proj"
    decoder = r"model\.language_model\.layers\.\d+"
    return {
        "vision": rf"model\.vision_tower\.encoder\.layer\.({run})\."
        r"(attention\.([qkv]_proj|projection_layer)|mlp\.fc[12])",
        "language": rf"{decoder}\.(self_attn\.[qkvo]_proj|{network})",
        "mixin": rf"{decoder}\.mixin\.((q|kv|o)_proj|{network})",
    }


def ranks_of(lora: LoraSettings) -> dict[str, int]:
    """Part -> rank, of the parts that get adapters.

    Args:
        lora: the settings.
    """
    return {part: rank for part in PARTS if (rank := getattr(lora, part))}


def make_peft_config(model: CoMemoForConditionalGeneration, lora: LoraSettings) -> Any:
    """peft's `LoraConfig`: one adapter for all parts, with a rank and an alpha for each.

    Args:
        model: see `name_patterns`.
        lora: the settings, checked.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("lora: adapters need the package peft, which is not installed") from error
    patterns, ranks = name_patterns(model), ranks_of(lora)
    alphas: dict[str, Any] = {
        part: 2 * rank if lora.alpha is None else lora.alpha for part, rank in ranks.items()
    }
    return LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(alphas.values()),
        target_modules="|".join(f"({patterns[part]})" for part in ranks),
        rank_pattern={patterns[part]: rank for part, rank in ranks.items()},
        alpha_pattern={patterns[part]: alpha for part, alpha in alphas.items()},
        lora_dropout=lora.dropout,
    )


def check_lora(lora: LoraSettings) -> None:
    """Refuse settings that give no adapters.

    Args:
        lora: the settings.

    Raises:
        ValueError: names the first wrong setting.
    """
    for part in PARTS:
        rank = getattr(lora, part)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(f"lora.{part}: must be a rank from 0 on, got {rank!r}")
    if not ranks_of(lora):
        raise ValueError("lora: must have a rank above 0, got none")
    if lora.alpha is not None and not (_is_number(lora.alpha) and 0 < lora.alpha < math.inf):
        raise ValueError(f"lora.alpha: must be null or a number above 0, got {lora.alpha!r}")
    if not (_is_number(lora.dropout) and 0 <= lora.dropout < 1):
        raise ValueError(f"lora.dropout: must be a number from 0 to below 1, got {lora.dropout!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def base_name(name: str) -> str:
    """The name that a parameter has in a model without adapters.

    Args:
        name: in a model with or without adapters.
    """
    return name.replace(".base_layer.", ".")


def adapter_shapes(
    model: CoMemoForConditionalGeneration, lora: LoraSettings
) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of the adapters.

    Args:
        model: with or without adapters.
        lora: the settings, checked.

    Returns:
        Name in peft's file -> shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    patterns = name_patterns(model)
    for name, module in model.named_modules():
        for part, rank in ranks_of(lora).items():
            if re.fullmatch(patterns[part], name):
                linear: Any = module
                shapes[f"{PREFIX}{name}.lora_A.weight"] = (rank, linear.in_features)
                shapes[f"{PREFIX}{name}.lora_B.weight"] = (linear.out_features, rank)
    return shapes
