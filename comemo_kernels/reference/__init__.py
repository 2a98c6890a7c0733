"""What each operation computes, in plain PyTorch: the specification, and the CPU path.

Names and signatures are those of the package. Each function computes in the dtype of its inputs
(rotations, angles and norms at least in float32). Tests run it in float64 for the true result, and
in the tested dtype for the error that is allowed.

Letters: B prompts, N tokens of a prompt, M tokens of the image memory, I images, H heads, G heads
of keys and values, D head dimension, P rows of a rotary table, T tiles, S tokens along a tile's
side, C channels of the vision tower, d width of the language model.
"""

from comemo_kernels.grids import image_tokens
from comemo_kernels.reference.attention import attend_spans, attention_workspace
from comemo_kernels.reference.attention_weights import span_weights
from comemo_kernels.reference.fused_linear import (
    gated_residual,
    gated_swiglu,
    norm_linear,
    norm_swiglu,
)
from comemo_kernels.reference.gated_attention import attend_gated
from comemo_kernels.reference.linear import linear
from comemo_kernels.reference.memory_build import build_memory
from comemo_kernels.reference.memory_projection import project_memory
from comemo_kernels.reference.positions import (
    image_position_ids,
    rope_dhr_positions,
    rotary_table,
)
from comemo_kernels.reference.rotary import apply_rotary
from comemo_kernels.reference.tiles import fold_tiles, image_rows, project_tiles

__all__ = [
    "apply_rotary",
    "attend_gated",
    "attend_spans",
    "attention_workspace",
    "build_memory",
    "fold_tiles",
    "gated_residual",
    "gated_swiglu",
    "image_position_ids",
    "image_rows",
    "image_tokens",
    "linear",
    "norm_linear",
    "norm_swiglu",
    "project_memory",
    "project_tiles",
    "rope_dhr_positions",
    "rotary_table",
    "span_weights",
]
