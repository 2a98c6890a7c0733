"""Keys and values of image tokens for every mixin layer, with gradients: `project_memory`.

The forward pass is that of `build_memory`, on new tensors. `reference.memory_projection` has the
algebra of the gradient, which PyTorch and the kernels share. Its steps on a GPU are here: the media
are normalised as in the forward pass, `_memory_build_gradient` rotates the gradients of the keys
back, and the products are PyTorch's GEMMs.
FLOPs of the gradient: 8 * M * d * G * D for each layer, half of them for the media.

Letters: M image tokens, d their width, L layers, G heads, D head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels import memory_build, reference
from comemo_kernels._memory_build_gradient import turn_back_op
from comemo_kernels._memory_build_rows import norm_media
from comemo_kernels._op import documented, on_triton, register, to_device
from comemo_kernels._rms_norm_gradient import rms_norm_gradient_op
from comemo_kernels.reference.memory_build_checks import check_projection, check_projection_kernel
from comemo_kernels.reference.memory_projection import (
    Layers,
    Steps,
    autocast,
    project,
)

# --- operators ---


def _launch(
    media: Tensor,
    kv_weights: list[Tensor],
    norm_weights: list[Tensor],  # empty: folded into kv_weights
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    heads: int,
    eps: float,
) -> list[Tensor]:
    inputs, L = (media, kv_weights, norm_weights, cos, sin, ids), len(kv_weights)
    found = _fake(*inputs, heads, eps)
    memory_build._launch(*inputs, found[:L], found[L:], [], [], 1, 0, eps)
    return found


def _fake(
    media: Tensor,
    kv_weights: list[Tensor],
    norm_weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    heads: int,
    eps: float,
) -> list[Tensor]:
    """Keys of all layers, then values."""
    shape, like = (media.shape[0], heads, 2 * cos.shape[1]), {"dtype": media.dtype}
    return [torch.empty(shape, **like, device=media.device) for _ in range(2 * len(kv_weights))]


def _launch_normalise(media: Tensor, eps: float) -> Tensor:
    """Media as they are written for a layer whose norm weight is one."""
    (M, d), config = media.shape, norm_media.config
    out, one = _fake_normalise(media, eps), torch.ones(d, dtype=media.dtype, device=media.device)
    address = to_device(torch.tensor([[0, one.data_ptr(), 0, 0]]), media.device)
    aligned = d % 8 == 0 and media.stride(0) % 8 == 0 and one.data_ptr() % 16 == 0
    numbers = (media.stride(0), M, d, 1, eps)
    programs = -(-M // config["BLOCK_M"])
    even = d % config["BLOCK_K"] == 0
    rstd = torch.empty(0, dtype=torch.float32, device=media.device)  # not written
    norm_media.launch(programs, rstd, out, media, address, *numbers, True, aligned, even)
    return out


def _fake_normalise(media: Tensor, eps: float) -> Tensor:
    return torch.empty(media.shape, dtype=media.dtype, device=media.device)


_project = register(
    "project_memory(Tensor media, Tensor[] kv_weights, Tensor[] norm_weights, Tensor cos,"
    " Tensor sin, Tensor ids, int heads, float eps) -> Tensor[]",
    _launch,
    _fake,
)
_normalise = register(
    "normalise_media(Tensor media, float eps) -> Tensor", _launch_normalise, _fake_normalise
)


def _forward(
    media: Tensor, kv_weights: list[Tensor], norm_weights: list[Tensor] | None, *rest: object
) -> list[Tensor]:
    return _project(media, kv_weights, norm_weights or [], *rest)


def _turn_back(
    cos: Tensor, sin: Tensor, ids: Tensor, dk: Tensor | None, dv: Tensor | None
) -> Tensor:
    given = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (dk, dv))
    return turn_back_op(cos, sin, ids, *given)


STEPS = Steps(_forward, _normalise, _turn_back, rms_norm_gradient_op)

# --- public ---


@documented(reference.project_memory)
def project_memory(
    media: Tensor,
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    heads: int,
    eps: float = 1e-5,
) -> tuple[Layers, Layers]:
    if not on_triton(media):
        return reference.project_memory(media, kv_weights, norm_weights, cos, sin, ids, heads, eps)
    inputs = autocast(media, kv_weights, norm_weights)
    check_projection(*inputs, cos, sin, ids, heads)
    check_projection_kernel(*inputs, cos, sin)
    return project(STEPS, *inputs, cos, sin, ids.contiguous(), heads, eps)
