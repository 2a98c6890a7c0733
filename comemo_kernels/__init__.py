"""Operations of CoMemo, a model with image memory. `reference` defines what each computes."""

from comemo_kernels import reference
from comemo_kernels.memory import ImageMemory, spans_from_cu_seqlens
from comemo_kernels.reference import (
    apply_rotary,
    attend_images,
    fold_tiles,
    image_position_ids,
    image_tokens,
    project_tiles,
    rope_dhr_positions,
    rotary_table,
)

__version__ = "0.1.0"
__all__ = [
    "ImageMemory",
    "apply_rotary",
    "attend_images",
    "fold_tiles",
    "image_position_ids",
    "image_tokens",
    "project_tiles",
    "reference",
    "rope_dhr_positions",
    "rotary_table",
    "spans_from_cu_seqlens",
]
