"""A launch that `comemo_kernels.aot` compiles, and what its compiled kernel must hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from comemo_kernels._op import Config, Kernel

NVIDIA = ("sm_80", "sm_90", "sm_100")
FLOAT8 = ("sm_90", "sm_100")  # sm_80 has no instruction that converts it
HOPPER = ("sm_90",)
EVERY = (*NVIDIA, "gfx942")


@dataclass(frozen=True)
class Case:
    """A launch to compile: real shapes and dtypes, tensors without storage."""

    kernel: Kernel
    name: str
    launch: Callable[[], Any]
    configs: int = 1  # compiled in the first so many of its kernel's configurations
    dot: bool = False  # whether warp groups multiply matrices
    chips: tuple[str, ...] = EVERY
    spills: Mapping[str, int] = field(default_factory=dict)  # accepted bytes, by chip
    aligned: bool = True  # whether 128 bits divide all rows
    narrow: frozenset[str] = frozenset()  # pointers whose narrow accesses are accepted
    stage: Callable[[Config], int] | None = None  # bytes of shared memory of a pipeline stage
    blocks: int = 1  # a multiprocessor must hold, of the first configuration, on sm_90


# Pointers to small tensors: a number for a row, a column or an image, or the few rows of a decode
# step. Narrow accesses to these cost almost nothing.
SMALL: Mapping[str, frozenset[str]] = {
    name: frozenset(pointers.split())
    for name, pointers in {
        "_rotary_kernel": "ids_ptrs grids_ptr row",
        "_rope_dhr_kernel": "image_ptr attention_ptr grids_ptr ids_ptr torn_ptr",
        "_rows_kernel": "norm_ptr gate_ptr residual out_ptrs",
        "_attend_kernel": "span_ptrs ids_ptrs bias_ptrs starts_ptr k_scale_ptr v_scale_ptr lse_ptr"
        " part_lse_ptr count_ptr",
        "_combine_kernel": "part_lse_ptr out_ptr lse_ptr",
        "_tma_kernel": "spans_ptr lse_ptr part_lse_ptr",
        "_turn_kernel": "ids_ptr biases_ptr spans_ptr starts_ptr",
        "_gradient_rows_kernel": "ids_ptrs biases_ptr lse_ptr dlse_ptr lse2_ptr delta_ptr",
        "_gradient_rebase_kernel": "starts_ptr biases_ptr",
        "_gradient_bounds_kernel": "span bounds limits_ptr",
        "_gradient_runs_kernel": "bounds_ptr runs",
        "_gradient_queries_kernel": "span ids_ptrs biases_ptr lse2_ptr delta_ptr gate_ptr",
        "_gradient_keys_kernel": "lse2_ptr delta_ptr limits_ptr bounds_ptr runs gate_ptr starts_ptr"
        " biases_ptr",
        "_norm_kernel": "address_ptr weight_ptr rstd_ptr",
        "_project_kernel": "table rstd_ptr ids_ptr",
        "_project_tma_kernel": "address_ptr table rstd_ptr ids_ptr",
        "_scale_kernel": "address scale_ptr",
        "_turn_back_kernel": "ids_ptr",
        "_fold_norm_kernel": "stats_ptr",
        "_fold_norm_gradient_kernel": "stats_ptr",
        "_gelu_gradient_kernel": "",
        "_product_kernel": "bias_ptr rows_ptr",
        "_sum_kernel": "bias_ptr rows_ptr",
        "_rms_norm_gradient_kernel": "",
        "_swiglu_kernel": "",
        "_swiglu_gradient_kernel": "sums_ptr gate_ptr",
    }.items()
}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")
