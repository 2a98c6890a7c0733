"""Arguments of public operations for several ranks, and how DTensors may hold them."""

import pytest
import torch

import comemo_kernels as ops
from comemo_kernels import ImageGrids, MemoryScales, QueryRotation

tensor = pytest.importorskip("torch.distributed.tensor")
DTensor, Shard = tensor.DTensor, tensor.Shard
WHOLE, SUM = tensor.Replicate(), tensor.Partial()
HALVES, QUARTERS = (tensor.placement_types._StridedShard(0, split_factor=n) for n in (2, 4))
ROWS, TOKENS, HEADS = Shard(0), Shard(1), Shard(2)
FLOAT8 = torch.float8_e4m3fn


# --- arguments ---


def table(rows=16):
    cos, sin = ops.rotary_table(torch.arange(rows)[None], 16)
    return cos[0], sin[0]


def rotary(prompts=2, **changes):
    q, k = torch.randn(prompts, 4, 4, 16), torch.randn(prompts, 4, 2, 16)
    cos, sin = table()
    positions = torch.arange(4 * prompts).view(prompts, 4)
    return {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions} | changes


def attended(key_heads=2, **changes):
    """Two images; the first prompt reads both, its tokens less and less."""
    q, k, v = torch.randn(2, 3, 4, 16), *torch.randn(2, 6, key_heads, 16)
    spans = torch.tensor([[[0, 6], [1, 6], [2, 6]], [[0, 2], [0, 2], [3, 3]]])
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    starts, biases = torch.tensor([0, 2]).int(), torch.tensor([[1, 2], [0, 3]]).int()
    rotation = QueryRotation(*table(), ids, starts, biases)
    return {"q": q, "k": k, "v": v, "spans": spans, "rotation": rotation} | changes


def gated(**changes):
    right = {"x": torch.randn(2, 3, 6)} | attended(**changes)
    return right | {"weight": torch.randn(6, 64) / 8, "gate": torch.tensor([0.7])}


def in_float8():
    k, v = (t.clamp(-2, 2).to(FLOAT8) for t in torch.randn(2, 6, 2, 16))
    scales = MemoryScales(torch.rand(2, 2) + 0.5, torch.rand(2, 2) + 0.5, 4)
    return attended(k=k, v=v, scales=scales)


def linear(rows=2):
    return {
        "x": torch.randn(rows, 3, 8),
        "norm_weight": torch.randn(8),
        "weight": torch.randn(6, 8),
    }


def swiglu():
    names = {"gate_weight": torch.randn(6, 8), "up_weight": torch.randn(6, 8)}
    return {"x": torch.randn(2, 3, 8), "norm_weight": torch.randn(8)} | names


def feed_forward(**changes):
    return swiglu() | {"down_weight": torch.randn(8, 6), "gate": torch.tensor([0.7])} | changes


def residual(**changes):
    right = {"x": torch.randn(2, 3, 8), "a": torch.randn(2, 3, 6), "weight": torch.randn(8, 6)}
    return right | {"gate": torch.tensor([0.7])} | changes


def projected(rows=6, norms=True):
    cos, sin = table()
    right = {"media": torch.randn(rows, 8), "kv_weights": list(torch.randn(2, 64, 8))}
    right |= {"norm_weights": list(torch.randn(2, 8)) if norms else None, "cos": cos, "sin": sin}
    return right | {"ids": torch.arange(rows).int(), "heads": 2}


def built():
    right = {name: x for name, x in projected().items() if name != "heads"}
    held = {name: list(torch.zeros(2, 7, 2, 16)) for name in ("keys", "values")}
    return right | held | {"row": 1}


def tiles():
    right = {"tokens": torch.randn(3, 5, 4), "norm_weight": torch.randn(16)}
    right |= {"norm_bias": torch.randn(16), "weight1": torch.randn(8, 16), "bias1": torch.randn(8)}
    return right | {"weight2": torch.randn(8, 8), "bias2": torch.randn(8)}


# --- cases: arguments, placements of arguments that are not whole, placements of results ---

SPANS = {"spans": ROWS, "rotation.positions": ROWS, "rotation.biases": ROWS}
PROMPTS = {"q": ROWS, **SPANS}
QUERIES = {"q": TOKENS, "spans": TOKENS, "rotation.positions": TOKENS}
MEMORY = {"q": HEADS, "k": TOKENS, "v": TOKENS}
INNER = {"gate_weight": ROWS, "up_weight": ROWS, "down_weight": TOKENS}
NO_IDS = {"positions": None, "cos": table()[0][None, :4], "sin": table()[1][None, :4]}
GRIDS = ImageGrids.pack([(1, 1)], offsets=[1], biases=[1], side=1)
CASES = {
    "apply_rotary by heads": (rotary, {"q": HEADS, "k": HEADS}, HEADS),
    "apply_rotary by prompts": (rotary, {"q": ROWS, "k": ROWS, "positions": ROWS}, ROWS),
    "apply_rotary by uneven prompts": (
        lambda: rotary(3),
        {"q": ROWS, "k": ROWS, "positions": ROWS},
        ROWS,
    ),
    "apply_rotary by prompts with the same ids": (
        lambda: rotary(positions=torch.arange(4)[None]),
        {"q": ROWS, "k": ROWS},
        ROWS,
    ),
    "apply_rotary by tokens": (
        lambda: rotary(**NO_IDS),
        {"q": TOKENS, "k": TOKENS, "cos": TOKENS, "sin": TOKENS},
        TOKENS,
    ),
    "apply_rotary of q alone": (lambda: rotary(k=None), {"q": HEADS}, HEADS),
    "apply_rotary by heads with grids": (
        lambda: rotary(positions=GRIDS),
        {"q": HEADS, "k": HEADS},
        HEADS,
    ),
    "apply_rotary whole": (rotary, {}, WHOLE),
    "attend_spans by heads": (lambda: attended(return_lse=True), MEMORY, HEADS),
    "attend_spans by heads of one key head": (lambda: attended(1), {"q": HEADS}, HEADS),
    "attend_spans by prompts": (lambda: attended(return_lse=True), PROMPTS, ROWS),
    "attend_spans by tokens": (attended, QUERIES, TOKENS),
    "attend_spans not rotated": (lambda: attended(rotation=None), MEMORY, HEADS),
    "attend_spans in float8": (
        in_float8,
        MEMORY | {"scales.keys": TOKENS, "scales.values": TOKENS},
        HEADS,
    ),
    "attend_gated by heads": (gated, MEMORY | {"weight": TOKENS}, SUM),
    "attend_gated by heads of a sum": (gated, MEMORY | {"weight": TOKENS, "x": SUM}, SUM),
    "attend_gated by prompts": (gated, PROMPTS | {"x": ROWS}, ROWS),
    "attend_gated by tokens": (gated, QUERIES | {"x": TOKENS}, TOKENS),
    "norm_linear by rows": (linear, {"x": ROWS}, ROWS),
    "norm_linear by uneven rows": (lambda: linear(3), {"x": ROWS}, ROWS),
    "norm_linear with a rank without rows": (lambda: linear(1), {"x": ROWS}, ROWS),
    "norm_linear by tokens": (linear, {"x": TOKENS}, TOKENS),
    "norm_linear by features": (linear, {"weight": ROWS}, HEADS),
    "norm_linear with a folded norm": (
        lambda: linear() | {"norm_weight": None},
        {"weight": ROWS},
        HEADS,
    ),
    "norm_swiglu by rows": (swiglu, {"x": ROWS}, ROWS),
    "norm_swiglu by features": (swiglu, {"gate_weight": ROWS, "up_weight": ROWS}, HEADS),
    "gated_residual by rows": (residual, {"x": ROWS, "a": ROWS}, ROWS),
    "gated_residual by features": (residual, {"x": HEADS, "weight": ROWS}, HEADS),
    "gated_residual by summed features": (residual, {"a": HEADS, "weight": TOKENS}, SUM),
    "gated_residual of a sum": (residual, {"x": SUM, "a": HEADS, "weight": TOKENS}, SUM),
    "gated_residual without a gate": (
        lambda: residual(gate=None),
        {"a": HEADS, "weight": TOKENS},
        SUM,
    ),
    "gated_swiglu by rows": (feed_forward, {"x": ROWS}, ROWS),
    "gated_swiglu that keeps x": (
        lambda: feed_forward(recompute="projections"),
        {"x": TOKENS},
        TOKENS,
    ),
    "gated_swiglu by inner features": (feed_forward, INNER, SUM),
    "project_memory by rows": (projected, {"media": ROWS, "ids": ROWS}, ROWS),
    "project_memory by uneven rows": (lambda: projected(5), {"media": ROWS, "ids": ROWS}, ROWS),
    "project_memory by heads": (projected, {"kv_weights": HALVES}, TOKENS),
    "project_memory with folded norms": (
        lambda: projected(norms=False),
        {"kv_weights": HALVES},
        TOKENS,
    ),
    "project_tiles by tiles": (tiles, {"tokens": ROWS}, ROWS),
}
# Placements for a mesh of prompts x heads.
GRID_CASES = {
    "apply_rotary": (
        rotary,
        {"q": (ROWS, HEADS), "k": (ROWS, HEADS), "positions": (ROWS, WHOLE)},
        (ROWS, HEADS),
    ),
    "attend_spans": (
        attended,
        dict.fromkeys(SPANS, (ROWS, WHOLE))
        | {"q": (ROWS, HEADS), "k": (WHOLE, TOKENS), "v": (WHOLE, TOKENS)},
        (ROWS, HEADS),
    ),
    "attend_gated": (
        gated,
        dict.fromkeys(("x", *SPANS), (ROWS, WHOLE))
        | {"q": (ROWS, HEADS), "k": (WHOLE, TOKENS), "v": (WHOLE, TOKENS)}
        | {"weight": (WHOLE, TOKENS)},
        (ROWS, SUM),
    ),
    "norm_linear": (linear, {"x": (ROWS, WHOLE), "weight": (WHOLE, ROWS)}, (ROWS, HEADS)),
    "norm_linear by rows twice": (lambda: linear(7), {"x": (ROWS, ROWS)}, (ROWS, ROWS)),
    "gated_swiglu": (
        feed_forward,
        {"x": (ROWS, WHOLE)} | {name: (WHOLE, place) for name, place in INNER.items()},
        (ROWS, SUM),
    ),
    "project_memory": (
        projected,
        {"media": (ROWS, WHOLE), "ids": (ROWS, WHOLE), "kv_weights": (WHOLE, HALVES)},
        (ROWS, TOKENS),
    ),
}


# --- placing ---


def place(t, mesh, places):
    """A tensor that all ranks have, as a DTensor, without communication."""
    local = t.detach()
    for placement, ranks, rank in zip(places, mesh.shape, mesh.get_coordinate(), strict=True):
        if type(placement) is type(HALVES):
            local = torch.cat(
                [half.chunk(ranks)[rank] for half in local.chunk(placement.split_factor)]
            )
        elif type(placement) is Shard:
            parts = local.chunk(ranks, placement.dim)
            empty = local.narrow(placement.dim, 0, 0)
            local = parts[rank] if rank < len(parts) else empty
        elif placement == SUM:
            local = local * (rank + 1) / sum(range(1, ranks + 1))
    stride = t.contiguous().stride()
    local = local.clone()
    made = DTensor.from_local(local, mesh, places, run_check=False, shape=t.shape, stride=stride)
    return made.requires_grad_(t.requires_grad)


def changed(name, value, change):
    if isinstance(value, torch.Tensor):
        return change(name, value)
    if isinstance(value, tuple):
        parts = (changed(f"{name}.{f}", getattr(value, f), change) for f in value._fields)
        return type(value)(*parts)
    return [changed(name, x, change) for x in value] if isinstance(value, list) else value
