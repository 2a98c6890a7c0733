"""What tokens read of the image memory: attention weights of the mixin layers.

Letters: N tokens of a prompt, M tokens of the image memory, L mixin layers, d width of the
language model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import comemo_kernels as ops
from comemo.memory.inputs import queries_at_count
from comemo.mixin import MixinLayer, on_device
from comemo.model import CoMemoModel
from comemo.parallel.split import refuse_divided
from comemo.weights.fusable import is_fusable
from comemo_kernels import ImageMemory


class AnswerTokens(NamedTuple):
    """The tokens whose outputs are an answer: the last of the prompt, and all of it but its last.

    Attributes:
        input_ids: int64 [1, N], to be read again after the tokens before them.
        position_ids: int64 [1, N].
        query_position_ids: int64 [1, N], positions of their mixin queries while decoding.
    """

    input_ids: Tensor
    position_ids: Tensor
    query_position_ids: Tensor


@torch.no_grad()
def memory_weights(
    model: Any,
    hidden_states: Sequence[Tensor],
    memory: ImageMemory,
    query_position_ids: Tensor,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """How much tokens of one prompt read of each row of the image memory, by mixin layer.

    Queries and the log-sum-exp of their scores are computed again, which costs a small part of the
    pass that gave the hidden states; then the row of each token.

    Args:
        model: a `CoMemoForConditionalGeneration` or `CoMemoModel`, folded or not.
        hidden_states: [1, N, d] each, as `output_hidden_states=True` returns them for these
            tokens: entry i is the input of decoder layer i and of its mixin layer.
        memory: as these tokens read it, with the keys of the layers: that of a pass with
            `use_cache=True`.
        query_position_ids: integers [1, N], positions of their mixin queries.
        layers: indices of decoder layers in `config.mixin_layers`; None for all.

    Returns:
        float32 [L, N, M], the mean over heads, in the order of `layers`. A row sums to 1, or to 0
        where a token reads no image.

    Raises:
        ValueError: unknown layers, hidden states that do not fit, more than one prompt, a memory
            without keys, spans or table, or a model that ranks divide.
    """
    base: CoMemoModel = getattr(model, "model", model)
    refuse_divided("memory_weights", base)
    mixins = _chosen("memory_weights", base, layers)
    shape = tuple(query_position_ids.shape)
    if len(hidden_states) != len(base.language_model.layers) + 1 or any(
        state.ndim != 3 or state.shape[:2] != shape or len(state) != 1 for state in hidden_states
    ):
        raise ValueError(
            f"memory_weights: hidden_states must be {len(base.language_model.layers) + 1} tensors"
            f" [1, N, d] and query_position_ids [1, N], got"
            f" {[tuple(state.shape) for state in hidden_states]} and {shape}"
        )
    if memory.spans is None or not mixins.keys() <= memory.keys.keys():
        raise ValueError(
            f"memory_weights: the memory must have spans, and keys of the layers {list(mixins)} as"
            f" after a forward with use_cache=True, got keys of {list(memory.keys)} and"
            f" {'no ' if memory.spans is None else ''}spans"
        )
    found = [
        _weights_of(mixin, hidden_states[i], memory, query_position_ids, i)
        for i, mixin in mixins.items()
    ]
    return torch.stack([weights[0].to(found[0].device).float() for weights in found])


def _weights_of(
    mixin: MixinLayer, x: Tensor, memory: ImageMemory, positions: Tensor, layer: int
) -> Tensor:
    """[1, N, M] of one mixin layer, whose input is x [1, N, d]."""
    key, value, scales = memory.keys[layer], memory.values[layer], memory.scales.get(layer)
    x, norm = x.to(key.device), mixin.attn_norm
    if is_fusable(norm, mixin.q_proj):
        weight: Any = None if mixin.folded else norm.weight
        q = ops.norm_linear(x, weight, mixin.q_proj.weight, norm.variance_epsilon)
    else:
        q = mixin.q_proj(norm(x))
    q = q.unflatten(-1, (mixin.num_heads, mixin.head_dim))
    spans, rotation = on_device(q.device, memory.spans, memory.rotation(positions))
    _, lse = ops.attend_spans(q, key, value, spans, rotation, scales, return_lse=True)
    weights = ops.span_weights(q, key, lse, spans, rotation, scales)
    return weights[..., : len(memory) or len(key)]


@torch.no_grad()
def look_at_answer(
    model: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    query_position_ids: Tensor,
    cache: Any,
    memory: ImageMemory,
    *,
    token_counts: Tensor | None = None,
    rope_lengths: Tensor | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Read tokens of one prompt again, in one pass, and return what they read of the memory.

    `answer_tokens` gives the tokens of an answer and their positions. Beyond the trained range,
    where dynamic scaling changes angles with every token, the pass takes those of its last token.

    Args:
        model: a `CoMemoForConditionalGeneration` or `CoMemoModel`.
        input_ids: int64 [1, N], the tokens.
        position_ids: int64 [1, N].
        query_position_ids: int64 [1, N], positions of their mixin queries.
        cache: KV cache of all tokens before these, and of no other; `RoomyCache` or transformers'
            `DynamicCache`. It has the same tokens afterwards, also after an exception.
        memory: as these tokens read it. Keys and values that it lacks are built and kept.
        token_counts, rope_lengths: [1], for dynamic scaling; see the model's forward.
        layers: see `memory_weights`.

    Returns:
        float32 [L, N, M], see `memory_weights`.

    Raises:
        ValueError: see `memory_weights`; shapes that differ.
    """
    base: CoMemoModel = getattr(model, "model", model)
    refuse_divided("look_at_answer", base)
    check_layers("look_at_answer", base, layers)
    shapes = [tuple(t.shape) for t in (input_ids, position_ids, query_position_ids)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] != 1 or not shapes[0][1]:
        raise ValueError(
            "look_at_answer: input_ids, position_ids and query_position_ids must be [1, N], N not"
            f" 0, got {shapes}"
        )
    held = cache.get_seq_length()
    try:
        output = base(
            input_ids=input_ids,
            position_ids=position_ids,
            query_position_ids=query_position_ids,
            cache=cache,
            image_memory=memory,
            token_counts=token_counts,
            rope_lengths=rope_lengths,
            use_cache=True,
            output_hidden_states=True,
        )
    finally:
        # Layers may hold different numbers of tokens after an interrupt.
        getattr(cache, "crop_to", cache.crop)(held)
    return memory_weights(base, output.hidden_states, memory, query_position_ids, layers)


def answer_tokens(
    model: Any, input_ids: Tensor, position_ids: Tensor, tokens: Tensor, has_images: bool = True
) -> AnswerTokens:
    """The tokens to read again for an answer, at the positions that decoding gave them.

    Args:
        model: whose `config.decode_positions` says where mixin queries of generated tokens are.
        input_ids: int64 [1, P], the prompt.
        position_ids: int64 [1, P].
        tokens: int64 [n], generated after it; not none.
        has_images: whether the prompt has images.

    Returns:
        n tokens: the output of the i-th is token i of the answer. The KV cache must hold the
        first P - 1 tokens of the prompt.

    Raises:
        ValueError: no tokens, or a prompt that is not [1, P].
    """
    if tokens.ndim != 1 or not len(tokens) or input_ids.shape != position_ids.shape:
        raise ValueError(
            "answer_tokens: tokens must be [n], n not 0, and input_ids and position_ids [1, P],"
            f" got {tuple(tokens.shape)}, {tuple(input_ids.shape)}, {tuple(position_ids.shape)}"
        )
    step = torch.arange(len(tokens), device=position_ids.device)
    places = position_ids[0, -1] + step
    queries = places
    if queries_at_count(model.config, has_images):  # the first one is still of the prompt
        queries = torch.where(step > 0, position_ids.shape[1] - 1 + step, places)
    ids = torch.cat([input_ids[0, -1:], tokens[:-1].to(input_ids.device)])
    return AnswerTokens(ids[None], places[None], queries[None])


def gate_sizes(model: Any, layers: Sequence[int] | None = None) -> list[float]:
    """|tanh(gate)| of the attention of mixin layers: how strongly what they read is added.

    Args:
        model: a `CoMemoForConditionalGeneration` or `CoMemoModel`. In a folded one the gates are
            in the projections, and all sizes are 1.
        layers: see `memory_weights`.

    Raises:
        ValueError: unknown layers.
    """
    mixins = _chosen("gate_sizes", getattr(model, "model", model), layers)
    return [float(mixin.attn_gate.detach().float().tanh().abs()) for mixin in mixins.values()]


def over_layers(weights: Tensor, gates: Sequence[float]) -> Tensor:
    """The mean over layers, each counted by the size of its gate.

    What a layer with gate 0 reads reaches no later layer, so it does not count. If all are 0, the
    layers count alike.

    Args:
        weights: [L, ...], of `memory_weights`.
        gates: L numbers of at least 0, of `gate_sizes`.

    Returns:
        [...], sums as in `weights`.

    Raises:
        ValueError: another number of gates than layers, or a negative one.
    """
    if len(gates) != len(weights) or not gates or min(gates) < 0:
        raise ValueError(
            f"over_layers: gates must be {len(weights)} numbers of at least 0, got {list(gates)}"
        )
    factors = torch.tensor(gates, dtype=weights.dtype, device=weights.device)
    factors = factors / factors.sum() if factors.sum() > 0 else factors + 1 / len(gates)
    return torch.tensordot(factors, weights, 1)


def check_layers(verb: str, model: Any, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Indices of decoder layers with a mixin layer before them, all for None.

    Args:
        verb: the function that the error names.
        model: a `CoMemoForConditionalGeneration` or `CoMemoModel`.
        layers: wanted ones.

    Raises:
        ValueError: unknown layers, one of them twice, or none.
    """
    mixins = getattr(model, "model", model).language_model.mixin_layers
    wanted = tuple(mixins if layers is None else layers)
    if not wanted or len(set(wanted)) != len(wanted) or not {*wanted} <= {*mixins}:
        raise ValueError(
            f"{verb}: layers must be of the mixin layers {list(mixins)}, each once, got"
            f" {list(wanted)}"
        )
    return wanted


def _chosen(verb: str, model: CoMemoModel, layers: Sequence[int] | None) -> dict[int, MixinLayer]:
    """The mixin layers of some indices, in that order."""
    mixins = model.language_model.mixin_layers
    return {i: mixins[i] for i in check_layers(verb, model, layers)}
