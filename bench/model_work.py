"""The least that an answer costs: bytes that a decode step reads, FLOPs of a step and of a prompt.

Divided by rates of `bench.limits` it is a time that no implementation falls below, as long as it
computes the same and keeps nothing in a cache between two steps.
"""

from collections.abc import Sequence
from typing import Any

import torch

from bench.vision import flops_of_tile
from bench.ways import Work
from comemo.mixin import MixinLayer


def step_work(model: Any, contexts: Sequence[int], keys: Sequence[int] = (), held: int = 0) -> Work:
    """A decode step: weights once, the KV cache, and the image memory, which rows may share.

    Args:
        model: with its head.
        contexts: tokens of each row in the KV cache.
        keys: image tokens that each row reads.
        held: image tokens of the memory; those that rows share count once.
    """
    text, rows = model.config.text_config, len(contexts)
    weights = _text_weights(model)
    heads, size = text.num_attention_heads * text.head_dim, model.dtype.itemsize
    groups = text.num_key_value_heads * text.head_dim
    mixin = _mixin_heads(model)
    attended = heads * sum(contexts) * text.num_hidden_layers + mixin * sum(keys)
    flops = 2 * rows * sum(t.numel() for t in weights if t.ndim == 2) + 4 * attended
    cached = groups * sum(contexts) * text.num_hidden_layers + mixin * held
    return Work(flops, sum(t.nbytes for t in weights) + 2 * cached * size)


def prompt_work(model: Any, tokens: int, past: int, keys: int, tiles: int) -> Work:
    """Reading a prompt up to its first new token, with the images of it that are new.

    Args:
        model: with its head.
        tokens: that are read; the head sees the last of them alone.
        past: tokens that are in the KV cache already.
        keys: image tokens of the memory.
        tiles: of images that are seen for the first time: tower, projector and keys and values.
    """
    text, config = model.config.text_config, model.config
    weights = _text_weights(model)
    matrices = sum(t.numel() for t in weights if t.ndim == 2) - model.lm_head.weight.numel()
    pairs = tokens * past + tokens * (tokens + 1) / 2  # causal
    heads = text.num_attention_heads * text.head_dim * text.num_hidden_layers
    flops = 2 * (tokens * matrices + model.lm_head.weight.numel())
    flops += 4 * (heads * pairs + _mixin_heads(model) * tokens * keys)
    moved = sum(t.nbytes for t in weights)
    if tiles:
        seen = tiles * config.tokens_per_tile
        flops += tiles * flops_of_tile(
            config.vision_config, text.hidden_size, config.tokens_per_tile
        )
        flops += 2 * seen * sum(m.kv_proj.weight.numel() for m in _mixins(model))
        moved += sum(m.kv_proj.weight.nbytes for m in _mixins(model))
    return Work(flops, moved)


def _text_weights(model: Any) -> list[torch.Tensor]:
    """What a decode step reads: all but the embeddings and the projection of images."""
    built = {id(layer.kv_proj.weight) for layer in _mixins(model)}
    held = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
    return [weight for weight in held if id(weight) not in built]


def _mixins(model: Any) -> list[MixinLayer]:
    return [module for module in model.modules() if isinstance(module, MixinLayer)]


def _mixin_heads(model: Any) -> int:
    """Heads times their dimension, of all mixin layers."""
    return sum(layer.num_heads * layer.head_dim for layer in _mixins(model))
