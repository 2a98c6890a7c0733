"""One decode step of the published model over static buffers, which a CUDA graph captures.

Of a layer it launches norm_linear, apply_rotary, two writes of keys and values, attend_spans,
gated_residual, and norm_swiglu and gated_residual; a gated block before it adds norm_linear,
attend_gated and gated_swiglu. It reads weights, so all modules must be plain.

Letters: B rows of a batch, C tokens that the buffers hold, H query heads, G key heads, g = H / G,
D head dimension, d width, V vocabulary, P rows of a table of angles.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comemo_kernels import operations as ops
from comemo_kernels.attention_types import QueryRotation
from comemo_kernels.patching import published_attention, published_block
from comemo_kernels.patching.plain import (
    has_plain_weights,
    is_plain,
    is_rms_norm,
    is_untouched,
)
from comemo_kernels.patching.published_block import Pair, Reading, is_known_network

# Columns of a step's counters; all but the start advance by one for each token.
QUERY, SLOT, START, END = range(4)


class Scaled(NamedTuple):
    """An RMSNorm and the linear layers behind it."""

    norm: Tensor  # [d]
    eps: float
    linear: tuple[Tensor, ...]


class Block(NamedTuple):
    """A gated block: its weights, and the memory that it reads."""

    query: Scaled
    heads: int
    out: Tensor  # [d, H * D]
    gates: Pair
    wide: Scaled  # w1, w3
    narrow: Tensor  # w2 [d, F]
    memory: Pair  # keys and values [M, H, D]
    table: Pair  # cos, sin [P, D/2]


class Layer(NamedTuple):
    """A decoder layer: its weights."""

    block: Block | None
    qkv: Scaled  # wqkv [G * (g + 2) * D, d]
    groups: int  # g
    head_dim: int
    table: Pair  # cos, sin [P, D/2]
    out: Tensor  # wo [d, H * D]
    wide: Scaled  # w1, w3
    narrow: Tensor  # w2 [d, F]


class Weights(NamedTuple):
    """All that a step reads of a language model, the image memory included."""

    embedding: Tensor  # [V, d]
    layers: list[Layer]
    head: Scaled  # [V, d]
    longest: int  # tokens whose angles all tables hold


def weights_of(language_model: Any, reading: Reading) -> Weights | None:
    """The weights of a language model, or None if some module must be called.

    Args:
        language_model: a view of the published `InternLM2ForCausalLM`.
        reading: of the call of `generate`, after its prefill.
    """
    model = language_model.model
    names = type(language_model).__name__, type(model).__name__
    if names != ("InternLM2ForCausalLM", "InternLM2Model") or not is_untouched(model):
        return None
    embedding, norm, output = model.tok_embeddings, model.norm, language_model.output
    if not (
        type(embedding) is nn.Embedding
        and embedding.max_norm is None
        and is_untouched(embedding)
        and has_plain_weights(embedding)
        and is_rms_norm(norm)
        and is_plain(output)
    ):
        return None
    layers = []
    for layer in model.layers:
        found = _layer_of(layer, reading)
        if found is None:
            return None
        layers.append(found)
    tables = [layer.table for layer in layers]
    tables += [layer.block.table for layer in layers if layer.block is not None]
    longest = min(len(cos) for cos, _ in tables)
    weights = Weights(_alias_of(embedding), layers, _scaled(norm, output), longest)
    kinds = {(t.device, t.dtype, t.stride(-1)) for t in _tensors(weights)}
    devices = {t.device for pair in tables for t in pair} | {embedding.weight.device}
    alike = len(kinds) == 1 and len(devices) == 1 and embedding.weight.stride(-1) == 1
    return weights if alike else None


def _tensors(weights: Weights) -> list[Tensor]:
    """All but the tables, whose dtype may be another."""
    found, scaled = [weights.embedding], [weights.head]
    for layer in weights.layers:
        found += [layer.out, layer.narrow]
        scaled += [layer.qkv, layer.wide]
        if layer.block is not None:
            block = layer.block
            found += [block.out, block.narrow, *block.gates, *block.memory]
            scaled += [block.query, block.wide]
    return found + [t for each in scaled for t in (each.norm, *each.linear)]


def _layer_of(layer: Any, reading: Reading) -> Layer | None:
    own = layer.decoder_layer
    attention, network = own.attention, getattr(own, "feed_forward", None)
    norms = getattr(own, "attention_norm", None), getattr(own, "ffn_norm", None)
    if not (
        type(own).__name__ == "InternLM2DecoderLayer"
        and published_attention.is_known(attention)
        and all(module is not None and is_rms_norm(module) for module in norms)
        and all(is_untouched(module) for module in (layer, own, attention))
        and is_plain(attention.wqkv, attention.wo)
        and network is not None
        and is_known_network(network)
        and is_untouched(attention.rotary_emb)
    ):
        return None
    block, given = None, layer.gated_cross_attn_layer
    if given is not None and not published_block.is_known(given):
        return None
    if given is not None and reading.vision_x is not None:
        block = _block_of(given, reading)
        if block is None:
            return None
    return Layer(
        block,
        _scaled(norms[0], attention.wqkv),
        attention.num_key_value_groups,
        attention.head_dim,
        _table_of(attention.rotary_emb),
        _alias_of(attention.wo),
        _scaled(norms[1], network.w1, network.w3),
        _alias_of(network.w2),
    )


def _block_of(block: Any, reading: Reading) -> Block | None:
    attention, network = block.cross_attn, block.ffn_2
    if not (
        block in reading.built
        and is_untouched(block)
        and has_plain_weights(block)
        and is_untouched(attention)
        and is_untouched(attention.rotary_emb)
        and is_rms_norm(block.cross_attention_norm)
        and is_rms_norm(block.ffn_norm_2)
        and is_plain(attention.to_q, attention.to_out)
        and is_known_network(network)
    ):
        return None
    return Block(
        _scaled(block.cross_attention_norm, attention.to_q),
        attention.heads,
        _alias_of(attention.to_out),
        (_alias(block.attn_gate), _alias(block.ff_gate)),
        _scaled(block.ffn_norm_2, network.w1, network.w3),
        _alias_of(network.w2),
        reading.built[block],
        _table_of(attention.rotary_emb),
    )


def _scaled(norm: Any, *linear: Any) -> Scaled:
    return Scaled(_alias_of(norm), norm.variance_epsilon, tuple(map(_alias_of, linear)))


def _alias_of(module: Any) -> Tensor:
    return _alias(module.weight)


def _alias(parameter: Tensor) -> Tensor:
    """What a graph reads stays in memory, even if the module gets another weight."""
    return parameter.detach()


def _table_of(rotary: Any) -> Pair:
    """cos, sin [P, D/2] without a copy."""
    half = rotary.cos_cached.shape[-1] // 2
    length = rotary.max_seq_len_cached
    return rotary.cos_cached[:length, :half], rotary.sin_cached[:length, :half]


class DecodeStep:
    """Static buffers and the step over them, which writes the same for the same inputs.

    Args:
        weights: of the language model.
        spans: [B, 1, 2] in the image memory; None without one.
        rows: B.
        capacity: C.

    Attributes:
        logits: [B, 1, V] of the last step, in the dtype of the model; the next one overwrites it.
        held: tokens in the buffers.
    """

    logits: Tensor

    def __init__(self, weights: Weights, spans: Tensor | None, rows: int, capacity: int) -> None:
        self.weights, self.memory_spans, self.capacity = weights, spans, capacity
        first, like = weights.layers[0], weights.embedding
        width, device = first.out.shape[1] // first.head_dim // first.groups, like.device
        # Zeros, because values outside a span are multiplied with zero where rows share a block.
        shape = (2, len(weights.layers), rows, capacity, width, first.head_dim)
        with torch.inference_mode(False):
            self.buffers = torch.zeros(shape, dtype=like.dtype, device=device)
            self.token, self.position = (
                torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in range(2)
            )
            self.counters = torch.zeros(rows, 4, dtype=torch.int64, device=device)
            self._advance = torch.ones(4, dtype=torch.int64, device=device)
            self._advance[START] = 0
            self._first = capacity * torch.arange(rows, device=device)
        self.held = 0
        flat = self.buffers.flatten(2, 3)  # [2, layers, B * C, G, D]
        self._rows = list(zip(flat[0].unbind(0), flat[1].unbind(0), strict=True))
        self._slot, self._spans = self.counters[:, SLOT], self.counters[:, None, START:]
        self._ids = self.position.expand(rows, width)
        query = self.counters[:, QUERY : QUERY + 1]
        self._rotations = [
            None if layer.block is None else QueryRotation(*layer.block.table, query)
            for layer in weights.layers
        ]

    def begin(self, past: Sequence[Pair], start: Tensor | None) -> None:
        """Copy the published cache in: pairs [B, G, M, D], `start` [B] tokens of padding."""
        self.held = past[0][0].shape[2]
        for i, pair in enumerate(past):
            for kind, old in enumerate(self._apart(*pair)):
                self.buffers[kind, i, :, : self.held] = old.transpose(1, 2)
        self.place(self._first if start is None else self._first + start)

    def _apart(self, k: Tensor, v: Tensor) -> Pair:
        """k and v to write, so that no row of the batch reaches another one.

        Rows share a block of attend_spans, which multiplies the values of all by weights that may
        be zero. So what is not finite is moved to the key, which only its own row reads.
        """
        if len(self.token) == 1:
            return k, v
        return torch.add(k, v, alpha=0), v.nan_to_num(0.0, 0.0, 0.0)

    def place(self, start: Tensor) -> None:
        """The counters of the token after those held; `start` [B] is each row's first."""
        self.counters[:, QUERY] = self.held
        self.counters[:, START] = start
        self.counters[:, SLOT] = self._first + self.held
        self.counters[:, END] = self._first + (self.held + 1)

    def adopt(self, other: "DecodeStep") -> None:
        """Continue from a step with smaller buffers."""
        self.held = other.held
        self.buffers[:, :, :, : self.held] = other.buffers[:, :, :, : self.held]
        self.place(other.counters[:, START] - other._first + self._first)

    def set(self, token: Tensor, position: Tensor | None) -> None:
        """The inputs [B, 1] of a step; without ids the token's is the number of tokens before."""
        self.token.copy_(token)
        self.position.copy_(self.counters[:, :1] if position is None else position)

    def advance(self) -> None:
        """After a step: its token is held."""
        self.counters.add_(self._advance)
        self.held += 1

    def past(self) -> tuple[Pair, ...]:
        """The published cache: views [B, G, M, D] of the buffers."""
        views = self.buffers[:, :, :, : self.held].transpose(3, 4)
        return tuple(zip(views[0].unbind(0), views[1].unbind(0), strict=True))

    def run(self) -> None:
        """Read token, position and counters; write keys, values and logits."""
        x = F.embedding(self.token, self.weights.embedding)
        for layer, rows, rotation in zip(
            self.weights.layers, self._rows, self._rotations, strict=True
        ):
            if layer.block is not None and rotation is not None:
                x = self._read_memory(layer.block, x, rotation)
            x = self._run_layer(layer, x, rows)
        self.logits = _norm_linear(x, self.weights.head)

    def _read_memory(self, block: Block, x: Tensor, rotation: QueryRotation) -> Tensor:
        assert self.memory_spans is not None
        q = _norm_linear(x, block.query).unflatten(-1, (block.heads, -1))
        x = ops.attend_gated(
            x, q, *block.memory, self.memory_spans, block.out, block.gates[0], rotation
        )
        return _feed_forward(x, block.wide, block.narrow, block.gates[1])

    def _run_layer(self, layer: Layer, x: Tensor, rows: Pair) -> Tensor:
        qkv = _norm_linear(x, layer.qkv).view(len(x), -1, layer.groups + 2, layer.head_dim)
        q, k = qkv[:, :, :-2], qkv[:, :, -2:-1]  # each key head is a token of its own
        q, k = ops.apply_rotary(q, k, *layer.table, self._ids, published=True)
        assert k is not None
        for buffer, new in zip(rows, self._apart(k[:, :, 0], qkv[:, :, -1]), strict=True):
            buffer.index_copy_(0, self._slot, new)
        q = q.view(len(x), 1, -1, layer.head_dim)  # [B, 1, H, D]
        read = ops.attend_spans(q, *rows, self._spans)
        assert isinstance(read, Tensor)
        x = ops.gated_residual(x, read.flatten(2), layer.out, None)
        return _feed_forward(x, layer.wide, layer.narrow, None)


def _norm_linear(x: Tensor, weights: Scaled) -> Tensor:
    return ops.norm_linear(x, weights.norm, *weights.linear, weights.eps)


def _feed_forward(x: Tensor, wide: Scaled, narrow: Tensor, gate: Tensor | None) -> Tensor:
    return ops.gated_swiglu(x, wide.norm, *wide.linear, narrow, gate, wide.eps)
