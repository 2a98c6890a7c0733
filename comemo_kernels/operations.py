"""The operations: Triton kernels, or, where there is no Triton, the same functions in PyTorch."""

from importlib.util import find_spec

if find_spec("triton"):
    from comemo_kernels.attention import attend_spans, attention_workspace
    from comemo_kernels.fused_linear import (
        gated_residual,
        gated_swiglu,
        norm_linear,
        norm_swiglu,
    )
    from comemo_kernels.gated_attention import attend_gated
    from comemo_kernels.memory_build import build_memory
    from comemo_kernels.memory_projection import project_memory
    from comemo_kernels.positions import rope_dhr_positions
    from comemo_kernels.rotary import apply_rotary
    from comemo_kernels.tiles import project_tiles
else:  # macOS, Windows
    from comemo_kernels.reference import (
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

__all__ = [
    "apply_rotary",
    "attend_gated",
    "attend_spans",
    "attention_workspace",
    "build_memory",
    "gated_residual",
    "gated_swiglu",
    "norm_linear",
    "norm_swiglu",
    "project_memory",
    "project_tiles",
    "rope_dhr_positions",
]
