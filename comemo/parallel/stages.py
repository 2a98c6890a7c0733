"""Layers on several ranks one after the other: pipeline stages, for inference.

All ranks run the same program. A rank has some of the decoder layers, and vision tower, projector
and embeddings as well, so that every rank makes prompts and media by itself. Hidden states go from
stage to stage, and the last one sends the logits to all.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from comemo.parallel.split import Split


class Elsewhere(nn.Module):
    """A decoder layer of another rank. The KV cache counts its tokens here, too.

    Args:
        layer_idx: of the layer.
        split: the stages.
        source: the stage that x is received from, if the next layer is here; else None.
        target: the stage that x is sent to, if the layer before is here; else None.
    """

    mixin = None  # there are no keys of an image memory for it

    def __init__(
        self, layer_idx: int, split: Split, source: int | None, target: int | None
    ) -> None:
        super().__init__()
        self.layer_idx, self.split = layer_idx, split
        self.source, self.target = source, target

    def forward(self, x: Tensor, media: Any = None, cache: Any = None, **kwargs: Any) -> Tensor:
        """x [B, N, d], or what the stage before sends."""
        cache = kwargs.get("past_key_values") if cache is None else cache
        if cache is not None:
            token = x.new_zeros(x.shape[0], 1, x.shape[1], 1)  # counted, and never read
            cache.update(token, token, self.layer_idx)
        group = self.split.group
        if self.target is not None:
            dist.send(x.contiguous(), dist.get_global_rank(group, self.target), group)
        if self.source is not None:
            x = torch.empty_like(x, memory_format=torch.contiguous_format)
            dist.recv(x, dist.get_global_rank(group, self.source), group)
        return x


class LastStage(nn.Module):
    """Gives all stages what a module computes on the last one.

    Args:
        split: the stages.
        module: the output layer, on the last stage; None on others.
        width: of its result.
    """

    def __init__(self, split: Split, module: nn.Module | None, width: int) -> None:
        super().__init__()
        self.split, self.module, self.out_features = split, module, width

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., V] of states [..., d]."""
        if self.module is None:
            found = x.new_empty(*x.shape[:-1], self.out_features)
        else:
            found = self.module(x).contiguous()
        group = self.split.group
        dist.broadcast(found, dist.get_global_rank(group, self.split.size - 1), group)
        return found


def stage_of(layer: int, layers: int, stages: int) -> int:
    """The stage of a layer: as equal numbers of layers as possible, the first stages more."""
    each, more = divmod(layers, stages)
    bound = more * (each + 1)
    return layer // (each + 1) if layer < bound else more + (layer - bound) // each


def divide_stages(function: str, model: Any, split: Split) -> None:
    """Leave this rank's decoder layers in a model, whose weights may be on meta.

    Args:
        function: the name that the error begins with.
        model: a `CoMemoForConditionalGeneration`.
        split: the stages.

    Raises:
        ValueError: more stages than layers.
    """
    text = model.model.language_model
    count = len(text.layers)
    if split.size > count:
        raise ValueError(
            f"{function}: pp_size must be at most the number of layers, {count}, got {split.size}"
        )
    places = [stage_of(i, count, split.size) for i in range(count)]
    own = split.rank
    for i, place in enumerate(places):
        if place == own:
            continue
        source = place if i + 1 < count and places[i + 1] == own else None
        target = place if i and places[i - 1] == own else None
        text.layers[i] = Elsewhere(i, split, source, target)
    model.model.stages = split
    last = own == split.size - 1
    if not last:
        text.norm = nn.Identity()
    head = model.lm_head
    model.lm_head = LastStage(split, head if last else None, head.out_features)
