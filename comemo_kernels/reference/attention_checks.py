"""Argument checks of `attend_spans` and `attention_workspace`."""

import math

import torch
from torch import Tensor

from comemo_kernels._op import check_count, has_float8
from comemo_kernels.attention_types import AttentionWorkspace, MemoryScales, QueryRotation
from comemo_kernels.reference.dtypes import DTYPES, FLOAT8


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    rotation: QueryRotation | None,
    scales: MemoryScales | None,
    workspace: AttentionWorkspace | None,
) -> None:
    """Raise the errors of `attend_spans` that do not depend on the device."""
    if q.ndim != 4 or q.dtype not in DTYPES or not q.shape[3]:
        raise ValueError(
            "attend_spans: q must be [B, N, H, D], D not 0, of float16, bfloat16, float32 or"
            f" float64, got {q.dtype} {tuple(q.shape)}"
        )
    B, N, H, D = q.shape
    device = q.device
    if (
        k.ndim != 3
        or k.shape != v.shape
        or k.shape[2] != D
        or k.shape[1] == 0
        or H % k.shape[1]
        or k.dtype != v.dtype
        or k.device != device
        or v.device != device
    ):
        raise ValueError(
            f"attend_spans: k and v must be [M, G, {D}] with G dividing {H}, of one dtype, on"
            f" {device}, got {k.dtype} {tuple(k.shape)} on {k.device} and {v.dtype}"
            f" {tuple(v.shape)} on {v.device}"
        )
    if k.dtype != (FLOAT8 if scales is not None else q.dtype):
        raise ValueError(
            f"attend_spans: k and v must be {q.dtype} like q, or {FLOAT8} with scales, got"
            f" {k.dtype} with" + ("out scales" if scales is None else " scales")
        )
    if (
        tuple(spans.shape) not in ((B, N, 2), (B, 1, 2))
        or spans.dtype not in (torch.int32, torch.int64)
        or spans.device != device
    ):
        raise ValueError(
            f"attend_spans: spans must be int32 or int64 {(B, N, 2)} or {(B, 1, 2)} on {device},"
            f" got {spans.dtype} {tuple(spans.shape)} on {spans.device}"
        )
    M, G = k.shape[:2]
    if scales is not None:
        check_count("attend_spans", "scales.tile", scales.tile, 1)
        tiles = -(-M // scales.tile)
        for name, scale in (("keys", scales.keys), ("values", scales.values)):
            if scale.shape != (tiles, G) or scale.dtype != torch.float32 or scale.device != device:
                raise ValueError(
                    f"attend_spans: scales.{name} must be float32 {(tiles, G)} on {device}, for"
                    f" {M} rows in tiles of {scales.tile}, got {scale.dtype} {tuple(scale.shape)}"
                    f" on {scale.device}"
                )
    if rotation is not None:
        _check_rotation(rotation, q)
    if workspace is not None:
        out, lse, parts, part_lse, counts = workspace
        rows, splits = (G, B * N * H // G), parts.shape[0] if parts.ndim else 0
        needed = math.prod(rows) if splits > 1 else 0
        if (
            (out.shape, out.dtype) != (q.shape, q.dtype)
            or lse.shape != q.shape[:3]
            or splits == 0
            or parts.shape[1:] != (*rows, D)
            or part_lse.numel() < splits * needed
            or counts.numel() < needed
            or [t.dtype for t in workspace[1:]] != [torch.float32] * 3 + [torch.int32]
            or any(t.device != device for t in workspace)
        ):
            told = [f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in workspace]
            raise ValueError(
                f"attend_spans: the workspace must come from attention_workspace for {q.dtype}"
                f" {tuple(q.shape)} on {device} and {G} key heads, got {', '.join(told)}"
            )


def check_workspace(q: Tensor, k: Tensor, splits: int | None) -> None:
    """Raise the errors of `attention_workspace`."""
    if q.ndim != 4 or k.ndim != 3 or not k.shape[1] or q.shape[2] % k.shape[1]:
        raise ValueError(
            "attention_workspace: q must be [B, N, H, D] and k [M, G, D] with G dividing H, got"
            f" {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if splits is not None:
        check_count("attention_workspace", "splits", splits, 1, 2**16)


def _check_rotation(rotation: QueryRotation, q: Tensor) -> None:
    B, N, _, D = q.shape
    cos, sin, ids, starts, biases = rotation
    if (
        cos.ndim != 2
        or cos.shape != sin.shape
        or cos.dtype != sin.dtype
        or cos.dtype not in DTYPES
        or cos.device != q.device
        or sin.device != q.device
        or not cos.shape[0]
        or not 0 < 2 * cos.shape[1] <= D
    ):
        raise ValueError(
            "attend_spans: rotation.cos and .sin must be [P, R/2] of a floating dtype with R at"
            f" most {D}, on {q.device}, got {cos.dtype} {tuple(cos.shape)} on {cos.device} and"
            f" {sin.dtype} {tuple(sin.shape)} on {sin.device}"
        )
    if (
        ids.shape not in ((B, N), (1, N))
        or ids.dtype not in (torch.int32, torch.int64)
        or ids.device != q.device
    ):
        raise ValueError(
            f"attend_spans: rotation.positions must be int32 or int64 {(B, N)} on {q.device}, got"
            f" {ids.dtype} {tuple(ids.shape)} on {ids.device}"
        )
    if (starts is None) != (biases is None) or (
        starts is not None
        and biases is not None
        and (
            starts.ndim != 1
            or biases.shape not in ((B, len(starts)), (1, len(starts)))
            or {starts.dtype, biases.dtype} != {torch.int32}
            or {starts.device, biases.device} != {q.device}
        )
    ):
        told = [None if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (starts, biases)]
        raise ValueError(
            f"attend_spans: rotation.starts and .biases must be int32 [I] and [{B} or 1, I] on"
            f" {q.device}, or both None, got {told[0]} and {told[1]}"
        )


def check_read(M: int, spans: Tensor, starts: Tensor | None) -> None:
    """Raise the errors of `attend_spans` that depend on values; on a GPU this syncs."""
    if spans.numel() and not bool(((spans >= 0) & (spans <= M)).all()):
        low, high = (int(bound) for bound in spans.aminmax())
        raise ValueError(
            f"attend_spans: spans must be in [0, {M}], the memory, got {low} to {high}"
        )
    if starts is not None and len(starts):
        listed = starts.tolist()
        if listed[0] != 0 or listed != sorted(set(listed)):
            raise ValueError(f"attend_spans: rotation.starts must ascend from 0, got {listed}")


def check_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    rotation: QueryRotation | None,
    scales: MemoryScales | None,
    workspace: AttentionWorkspace | None,
    differentiable: bool,
) -> None:
    """Raise for what the reference supports and the kernel does not, with every reason."""
    reasons = []
    if differentiable and workspace is not None:
        reasons.append("a workspace excludes gradients")
    fixed = () if rotation is None else rotation[:2]
    fixed = fixed if scales is None else (*fixed, *scales[:2])
    if torch.is_grad_enabled() and any(t.requires_grad for t in fixed):
        reasons.append("cos, sin and scales get no gradients")
    if q.dtype == torch.float64:
        reasons.append("float64 has no kernel")
    if any(t.stride(-1) != 1 and t.shape[-1] > 1 for t in (q, k, v)):
        reasons.append(
            f"D must be contiguous, got strides {q.stride()} of q, {k.stride()} of k, {v.stride()}"
            " of v"
        )
    if k.stride() != v.stride():
        reasons.append(f"k and v must have the same strides, got {k.stride()} and {v.stride()}")
    if q.shape[-1] > 256:
        reasons.append(f"D must be at most 256, got {q.shape[-1]}")
    if rotation is not None and 2 * rotation.cos.shape[1] != q.shape[-1]:
        reasons.append(
            f"the whole head must be rotated, got {2 * rotation.cos.shape[1]} of {q.shape[-1]}"
        )
    if rotation is not None and (
        rotation.cos.stride() != rotation.sin.stride() or rotation.cos.stride(-1) != 1
    ):
        reasons.append(
            "cos and sin must have the same strides, R/2 contiguous, got"
            f" {rotation.cos.stride()} and {rotation.sin.stride()}"
        )
    if spans.stride(-1) != 1:
        reasons.append(f"start and end of a span must be adjacent, got strides {spans.stride()}")
    tight = [] if scales is None else [scales.keys, scales.values]
    if rotation is not None and rotation.starts is not None and rotation.biases is not None:
        tight += [rotation.starts, *rotation.biases[:1]]
    if any(not t.is_contiguous() for t in tight):
        reasons.append("scales, starts and rows of biases must be contiguous")
    if workspace is not None:
        used = workspace if workspace.parts.shape[0] > 1 else (*workspace[:2], workspace.counts)
        if any(not t.is_contiguous() for t in used):
            reasons.append(
                "the workspace must be contiguous, as attention_workspace returns it, got strides"
                f" {[t.stride() for t in used]}"
            )
    if scales is not None and q.is_cuda and not has_float8(q.get_device()):
        reasons.append("float8 needs a GPU of compute capability 8.9")
    if reasons:
        raise ValueError(
            f"attend_spans: on a GPU {'; '.join(reasons)}: or use"
            " comemo_kernels.reference.attend_spans"
        )
