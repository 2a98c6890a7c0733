"""Which part of which weight a rank has under tensor parallelism.

| divided | by |
|---|---|
| self-attention, KV cache | key heads, with the query heads that read them |
| mixin layers, image memory | heads |
| feed-forward networks | columns of the inner width |
| output layer, for inference | words |
| tiles in vision tower and projector | tiles: each rank computes some of them, with all weights |

Dividing tiles needs one exchange for each image. Dividing the tower's weights would need two for
each of its layers, and the projector is less than 0.5 % of the weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from comemo.config import CoMemoConfig
from comemo.parallel.split import Split, SplitHead

ROWS, COLUMNS, BOTH = 0, 1, 2  # the divided dimension; BOTH: rows of keys and rows of values


@dataclass(frozen=True)
class Part:
    """A divided weight: the module and the name of its parameter, and what is divided."""

    module: nn.Module
    name: str
    kind: int


def check_divisible(function: str, config: CoMemoConfig, size: int) -> None:
    """Refuse a number of ranks that does not divide the layers.

    Args:
        function: the name that the error begins with.
        config: of the model.
        size: number of ranks.

    Raises:
        ValueError: heads or widths that are no multiple of `size`; biases in the self-attention.
    """
    text, mixin = config.text_config, config.mixin_config
    numbers = {
        "query heads": text.num_attention_heads,
        "key heads": text.num_key_value_heads,
        "heads of the mixin layers": mixin.num_heads,
        "feed-forward columns": text.intermediate_size,
        "feed-forward columns of the mixin layers": mixin.intermediate_size,
    }
    wrong = [f"{number} {name}" for name, number in numbers.items() if number % size]
    if wrong:
        fits = [n for n in range(1, size + 1) if not any(k % n for k in numbers.values())]
        raise ValueError(
            f"{function}: the number of ranks that divide a layer must be one of {fits}, got {size}"
            f" for {', '.join(wrong)}"
        )
    if size > 1 and text.attention_bias:
        raise ValueError(
            f"{function}: layers with biases in the self-attention cannot be divided among"
            f" {size} ranks"
        )


def parts_of(layer: Any) -> list[Part]:
    """The divided weights of a decoder layer and its mixin layer."""
    attention, mlp, mixin = layer.self_attn, layer.mlp, layer.mixin
    rows = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
    columns = [attention.o_proj, mlp.down_proj]
    both = []
    if mixin is not None:
        rows += [mixin.q_proj, mixin.mlp.gate_proj, mixin.mlp.up_proj]
        columns += [mixin.o_proj, mixin.mlp.down_proj]
        both = [mixin.kv_proj]
    kinds = ((ROWS, rows), (COLUMNS, columns), (BOTH, both))
    return [Part(linear, "weight", kind) for kind, found in kinds for linear in found]


def kinds_of(model: Any) -> dict[int, int]:
    """What is divided of each divided weight of a model, by the weight's id."""
    layers = [layer for layer in model.model.language_model.layers if hasattr(layer, "self_attn")]
    parts = [part for layer in layers for part in parts_of(layer)]
    return {id(part.module._parameters[part.name]): part.kind for part in parts}


def cut(weight: Tensor, kind: int, split: Split) -> Tensor:
    """This rank's part of a whole weight [O, I], a tensor of its own.

    Of keys and values [2 O, I] it is [2 O / ranks, I]: its keys, then its values.
    """
    weight = by_rank(weight, split.size) if kind == BOTH else weight
    part = weight.tensor_split(split.size, COLUMNS if kind == COLUMNS else ROWS)[split.rank]
    return part.contiguous() if part.is_meta else part.clone(memory_format=torch.contiguous_format)


def paste(parts: list[Tensor], kind: int) -> Tensor:
    """The whole weight of the parts of all ranks."""
    whole = torch.cat(parts, COLUMNS if kind == COLUMNS else ROWS)
    return by_kind(whole, len(parts)) if kind == BOTH else whole


def by_rank(weight: Tensor, size: int) -> Tensor:
    """Rows of keys and values [2 O, I], in the order (keys, values), as (rank, keys, values)."""
    return weight.unflatten(0, (2, size, -1)).transpose(0, 1).flatten(0, 2)


def by_kind(weight: Tensor, size: int) -> Tensor:
    """The inverse of `by_rank`."""
    return weight.unflatten(0, (size, 2, -1)).transpose(0, 1).flatten(0, 2)


def divide_layers(model: Any, split: Split) -> None:
    """Leave this rank's parts in the decoder layers of a model; their weights may be on meta.

    Args:
        model: a `CoMemoForConditionalGeneration`, not divided yet.
        split: the ranks, see `check_divisible`.
    """
    text = model.model.language_model
    for layer in text.layers:
        for part in parts_of(layer):
            weight = part.module._parameters[part.name]
            assert weight is not None
            local = cut(weight.detach(), part.kind, split)
            part.module._parameters[part.name] = nn.Parameter(local, weight.requires_grad)
        mark_layer(layer, split)
    model.model.split = split


def mark_layer(layer: Any, split: Split) -> None:
    """Tell a decoder layer and its mixin layer that their weights are parts, and how large."""
    mixin = layer.mixin
    for module in (layer, mixin):
        if module is not None:
            module.split = split
    if mixin is not None:
        mixin.num_heads //= split.size
    for part in parts_of(layer):
        linear: Any = part.module
        if part.kind == COLUMNS:
            linear.in_features //= split.size
        else:
            linear.out_features //= split.size


def divide_head(model: Any, split: Split) -> None:
    """Leave this rank's words in the output layer of a model, for inference."""
    words = model.lm_head.weight.shape[0]
    model.lm_head = SplitHead(split, head_part(model.lm_head.weight.detach(), split), words)


def head_part(weight: Tensor, split: Split) -> Tensor:
    """This rank's rows of an output layer [V, d], as many on each rank, filled with zeros."""
    most = -(-weight.shape[0] // split.size)
    part = weight[split.rank * most : (split.rank + 1) * most]
    return torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
