"""Operations of CoMemo, a model with an image memory. `reference` defines what each computes."""

from importlib import import_module
from typing import Any

import comemo_kernels.trees  # noqa: F401, registers the memory for torch.export
from comemo_kernels import reference
from comemo_kernels.append import append_images
from comemo_kernels.attention_types import AttentionWorkspace, MemoryScales, QueryRotation
from comemo_kernels.graphs import HostFlag, capture, runs_ahead
from comemo_kernels.grids import TEXT, ImageGrids
from comemo_kernels.memory import ImageMemory
from comemo_kernels.memory_split import join_images, split_images
from comemo_kernels.memory_tensors import distance_table, memory_buffers
from comemo_kernels.operations import (
    apply_rotary,
    attend_gated,
    attend_spans,
    attention_workspace,
    build_memory,
    gated_residual,
    gated_swiglu,
    norm_linear,
    norm_swiglu,
    project_memory,
    project_tiles,
    rope_dhr_positions,
)
from comemo_kernels.patching.patch import patch, patched, unpatch
from comemo_kernels.patching.plan import Report
from comemo_kernels.patching.replacement import PatchWarning
from comemo_kernels.plain import is_plain, is_untouched
from comemo_kernels.reference import (
    fold_tiles,
    image_position_ids,
    image_rows,
    image_tokens,
    linear,
    rotary_table,
    span_weights,
)
from comemo_kernels.spans import spans_from_cu_seqlens, spans_from_images

__version__ = "0.1.0"
__all__ = [
    "TEXT",
    "AttentionWorkspace",
    "HostFlag",
    "ImageGrids",
    "ImageMemory",
    "MemoryScales",
    "PatchWarning",
    "QueryRotation",
    "Report",
    "append_images",
    "apply_rotary",
    "attend_gated",
    "attend_spans",
    "attention_workspace",
    "build_memory",
    "capture",
    "distance_table",
    "fold_tiles",
    "gated_residual",
    "gated_swiglu",
    "hub",
    "image_position_ids",
    "image_rows",
    "image_tokens",
    "is_plain",
    "is_untouched",
    "join_images",
    "linear",
    "memory_buffers",
    "nn",
    "norm_linear",
    "norm_swiglu",
    "patch",
    "patched",
    "project_memory",
    "project_tiles",
    "reference",
    "rope_dhr_positions",
    "rotary_table",
    "runs_ahead",
    "span_weights",
    "spans_from_cu_seqlens",
    "spans_from_images",
    "split_images",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in ("hub", "nn"):  # imported when used, because they import this package
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
