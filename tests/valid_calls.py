"""Valid arguments of every public function."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import comemo_kernels as ops
from comemo_kernels import ImageGrids, ImageMemory, MemoryScales, QueryRotation

FLOAT8 = torch.float8_e4m3fn
Call = tuple[Callable[..., Any], dict[str, Any]]


def floats(*shape: int, **like: Any) -> Tensor:
    count = math.prod(shape)
    return (torch.arange(count, **like).reshape(shape) % 7 - 3).float() / 8


def table(device: str, rows: int = 16, half: int = 8) -> tuple[Tensor, Tensor]:
    cos, sin = ops.rotary_table(torch.arange(rows, device=device)[None], 2 * half)
    return cos[0].contiguous(), sin[0].contiguous()


@functools.cache
def _memory(device: str, stored: torch.dtype) -> ImageMemory:
    made = ImageMemory.allocate(16, [1, 3], 1, 16, table(device), stored, tile=4)
    ops.append_images(**appended(device, made))
    return made


def memory(device: str, stored: torch.dtype = torch.float32) -> ImageMemory:
    """Two images of four tokens, built for layers 1 and 3, in tiles of four."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, _memory(device, stored))


def appended(device: str, made: ImageMemory) -> dict[str, Any]:
    return {
        "memory": made,
        "media": floats(8, 4, device=device),
        "ids": torch.arange(8, device=device) % 4,
        "sizes": [4, 4],
        "kv_weights": [floats(32, 4, device=device)] * 2,
        "norm_weights": [floats(4, device=device)] * 2,
        "biases": [3, 9],
        "eps": 1e-5,
    }


def rotated(device: str) -> dict[str, Any]:
    cos, sin = table(device)
    return {
        "q": floats(1, 3, 2, 16, device=device),
        "k": floats(1, 3, 1, 16, device=device),
        "cos": cos,
        "sin": sin,
        "positions": torch.tensor([[0, 2, 5]], device=device),
        "inplace": True,
        "published": False,
        "validate": False,
    }


def rotated_by_grids(device: str) -> dict[str, Any]:
    grids = ImageGrids.pack([(1, 1)], offsets=[1], biases=[1], side=1, device=device)
    return rotated(device) | {"positions": grids}


def attended(device: str) -> dict[str, Any]:
    q, k = floats(1, 2, 2, 16, device=device), floats(8, 1, 16, device=device)
    return {
        "q": q,
        "k": k,
        "v": k + 1,
        "spans": torch.tensor([[[0, 8]]], device=device),
        "rotation": QueryRotation(
            *table(device),
            torch.tensor([[4, 5]], device=device),
            torch.tensor([0, 4], dtype=torch.int32, device=device),
            torch.tensor([[0, 2]], dtype=torch.int32, device=device),
        ),
        "scales": None,
        "return_lse": True,
        "validate": False,
        "workspace": ops.attention_workspace(q, k),
    }


def attended_in_float8(device: str) -> dict[str, Any]:
    scale = torch.ones(2, 1, device=device)
    right = attended(device)
    k = right["k"].to(FLOAT8)
    return right | {"k": k, "v": k, "scales": MemoryScales(scale, scale, 4), "workspace": None}


def weighed(device: str) -> dict[str, Any]:
    right = attended(device)
    names = {name: right[name] for name in ("q", "k", "spans", "rotation", "scales")}
    return names | {"lse": floats(1, 2, 2, device=device) + 3}


def attended_by_a_gate(device: str) -> dict[str, Any]:
    right = {n: x for n, x in attended(device).items() if n not in ("return_lse", "workspace")}
    leaf = floats(1, 2, 4, device=device).requires_grad_()
    return right | {
        "x": leaf,
        "weight": floats(4, 32, device=device),
        "gate": floats(1, device=device),
    }


def built(device: str) -> dict[str, Any]:
    cos, sin = table(device)
    return {
        "media": floats(4, 4, device=device),
        "kv_weights": [floats(32, 4, device=device)] * 2,
        "norm_weights": [floats(4, device=device)] * 2,
        "cos": cos,
        "sin": sin,
        "ids": torch.arange(4, dtype=torch.int32, device=device),
        "keys": [torch.zeros(8, 1, 16, device=device) for _ in range(2)],
        "values": [torch.zeros(8, 1, 16, device=device) for _ in range(2)],
        "scales": None,
        "row": 2,
        "eps": 1e-5,
    }


def built_anew(device: str) -> dict[str, Any]:
    right = built(device)
    names = ("media", "kv_weights", "norm_weights", "cos", "sin", "ids", "eps")
    return {name: right[name] for name in names} | {"heads": 1}


def built_in_float8(device: str) -> dict[str, Any]:
    right = built(device)
    held = {n: [t.to(FLOAT8) for t in right[n]] for n in ("keys", "values")}
    scales = [
        MemoryScales(torch.ones(2, 1, device=device), torch.ones(2, 1, device=device), 4)
        for _ in range(2)
    ]
    return right | held | {"scales": scales, "row": 4}


def projected(device: str) -> dict[str, Any]:
    return {
        "tokens": floats(1, 5, 4, device=device),
        "norm_weight": floats(16, device=device),
        "norm_bias": floats(16, device=device),
        "weight1": floats(8, 16, device=device),
        "bias1": floats(8, device=device),
        "weight2": floats(8, 8, device=device),
        "bias2": floats(8, device=device),
        "ratio": 0.5,
        "version": "v2",
        "eps": 1e-5,
        "activation": "gelu",
        "media": torch.zeros(1, 8, device=device),
        "embeds": torch.zeros(1, 3, 8, device=device),
        "rows": torch.tensor([1], device=device),
    }


def made(device: str) -> dict[str, Any]:
    return {
        "media": floats(8, 4, device=device),
        "position_ids": torch.arange(8, device=device),
        "lengths": [4, 4],
        "sizes": [4, 4],
        "table": table(device),
        "absolute": False,
    }


def allocated(device: str) -> dict[str, Any]:
    names = {"capacity": 8, "layers": [1, 3], "heads": 1, "head_dim": 16, "table": table(device)}
    return names | {"dtype": torch.float32, "tile": 4, "absolute": False}


def prompts(device: str) -> dict[str, Any]:
    mask = torch.tensor([[False, True, True, True, True, False]], device=device)
    options = {"side": 2, "tile_order": "row", "thumbnail": True, "validate": True}
    return {"image_mask": mask, "attention_mask": mask | True, "grids": [(1, 1)], **options}


def angles(device: str) -> dict[str, Any]:
    length = torch.tensor([9, 30], device=device)
    names = {"position_ids": torch.arange(6, device=device).view(2, 3), "dim": 8, "theta": 1e4}
    return names | {"factor": 2.0, "length": length, "max_length": 16}


GRID = {"side": 2, "tile_order": "row", "thumbnail": True}
CALLS: dict[str, Callable[[str], Call]] = {
    "apply_rotary": lambda d: (ops.apply_rotary, rotated(d)),
    "apply_rotary by grids": lambda d: (ops.apply_rotary, rotated_by_grids(d)),
    "attend_spans": lambda d: (ops.attend_spans, attended(d)),
    "attend_gated": lambda d: (ops.attend_gated, attended_by_a_gate(d)),
    "attend_spans in float8": lambda d: (ops.attend_spans, attended_in_float8(d)),
    "span_weights": lambda d: (ops.span_weights, weighed(d)),
    "attention_workspace": lambda d: (
        ops.attention_workspace,
        {"q": attended(d)["q"], "k": attended(d)["k"], "splits": 2},
    ),
    "build_memory": lambda d: (ops.build_memory, built(d)),
    "build_memory in float8": lambda d: (ops.build_memory, built_in_float8(d)),
    "project_memory": lambda d: (ops.project_memory, built_anew(d)),
    "append_images": lambda d: (ops.append_images, appended(d, memory(d))),
    "append_images in float8": lambda d: (ops.append_images, appended(d, memory(d, FLOAT8))),
    "norm_linear": lambda d: (
        ops.norm_linear,
        {"x": floats(2, 8, device=d), "norm_weight": floats(8, device=d)}
        | {"weight": floats(4, 8, device=d), "eps": 1e-5},
    ),
    "norm_swiglu": lambda d: (
        ops.norm_swiglu,
        {"x": floats(2, 8, device=d), "norm_weight": floats(8, device=d)}
        | {"gate_weight": floats(4, 8, device=d), "up_weight": floats(4, 8, device=d)}
        | {"eps": 1e-5},
    ),
    "gated_residual": lambda d: (
        ops.gated_residual,
        {"x": floats(2, 8, device=d), "a": floats(2, 4, device=d)}
        | {"weight": floats(8, 4, device=d), "gate": floats(1, device=d)},
    ),
    "gated_swiglu": lambda d: (
        ops.gated_swiglu,
        {"x": floats(2, 8, device=d), "norm_weight": floats(8, device=d)}
        | {"gate_weight": floats(4, 8, device=d), "up_weight": floats(4, 8, device=d)}
        | {"down_weight": floats(8, 4, device=d), "gate": floats(1, device=d)}
        | {"eps": 1e-5, "recompute": "projections"},
    ),
    "project_tiles": lambda d: (ops.project_tiles, projected(d)),
    "fold_tiles": lambda d: (
        ops.fold_tiles,
        {"tokens": floats(1, 2, 2, 4, device=d), "ratio": 0.5, "version": "v2"},
    ),
    "image_rows": lambda d: (
        ops.image_rows,
        {"image_mask": prompts(d)["image_mask"], "count": 4},
    ),
    "rope_dhr_positions": lambda d: (ops.rope_dhr_positions, prompts(d)),
    "image_position_ids": lambda d: (
        ops.image_position_ids,
        {"grid": (2, 1), "side": 2, "tile_order": "row", "bias": 3, "thumbnail": True},
    ),
    "image_tokens": lambda d: (ops.image_tokens, {"grid": (2, 1), "side": 2, "thumbnail": True}),
    "rotary_table": lambda d: (ops.rotary_table, angles(d)),
    "distance_table": lambda d: (
        ops.distance_table,
        {"head_dim": 16, "theta": 1e4, "length": 8, "device": torch.device(d)},
    ),
    "memory_buffers": lambda d: (
        ops.memory_buffers,
        {"layers": 2, "capacity": 8, "heads": 1, "head_dim": 16}
        | {"dtype": torch.float32, "device": d},
    ),
    "spans_from_cu_seqlens": lambda d: (
        ops.spans_from_cu_seqlens,
        {"cu_seqlens_q": torch.tensor([0, 2, 5], device=d)}
        | {"cu_seqlens_k": torch.tensor([0, 4, 8], device=d), "tokens": 6},
    ),
    "spans_from_images": lambda d: (
        ops.spans_from_images,
        {"last_tokens": torch.tensor([1, 4], device=d), "sizes": [4, 4], "tokens": 6}
        | {"latest": True},
    ),
    "split_images": lambda d: (ops.split_images, {"memory": memory(d, FLOAT8)}),
    "join_images": lambda d: (
        ops.join_images,
        {"images": ops.split_images(memory(d)), "spans": torch.tensor([[[0, 8]]], device=d)}
        | {"biases": torch.tensor([3, 9], device=d)},
    ),
    "ImageGrids.pack": lambda d: (
        ImageGrids.pack,
        {"grids": [(2, 1), (1, 1)], "offsets": [2, 20], "biases": [2, 9], **GRID, "device": d},
    ),
    "ImageGrids.position_ids": lambda d: (
        ImageGrids.pack([(2, 1)], side=2, device=d).position_ids,
        {"tokens": 14},
    ),
    "ImageMemory.from_media": lambda d: (ImageMemory.from_media, made(d)),
    "ImageMemory.allocate": lambda d: (ImageMemory.allocate, allocated(d)),
    "ImageMemory.update": lambda d: (
        memory(d).update,
        {"layer": 1, "key": floats(16, 1, 16, device=d), "value": floats(16, 1, 16, device=d)},
    ),
    "ImageMemory.reading": lambda d: (
        memory(d).reading,
        {"spans": torch.tensor([[[0, 8]]], device=d), "biases": torch.tensor([3, 9], device=d)},
    ),
    "ImageMemory.rotation": lambda d: (
        memory(d).rotation,
        {"positions": torch.tensor([[4]], device=d)},
    ),
    "ImageMemory.repeat_interleave": lambda d: (memory(d).repeat_interleave, {"times": 2}),
    "runs_ahead": lambda d: (ops.runs_ahead, {"device": d}),
    "capture": lambda d: (ops.capture, {"function": int, "device": "cpu", "warmups": 2}),
    "HostFlag": lambda d: (ops.HostFlag, {"like": torch.zeros(2, device=d)}),
    "HostFlag.post": lambda d: (
        ops.HostFlag(torch.zeros(2, device=d)).post,
        {"value": torch.ones(2, device=d)},
    ),
}
