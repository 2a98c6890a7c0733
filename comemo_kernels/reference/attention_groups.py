"""Queries that read the same span of the image memory, the images in it, and rotations by them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from comemo_kernels.attention_types import QueryRotation
from comemo_kernels.reference.rotary import rotate_halves


class Piece(NamedTuple):
    """Keys [start, end) of one image, or of all, and how far away the queries [R] are."""

    start: int
    end: int
    distance: Tensor | None  # int64 [R], rows of the rotary table; None: q is rotated already


class Group(NamedTuple):
    """Queries with one span, and with one bias of each image."""

    rows: Tensor | None  # int64 [R] of all B * N; None for all of them
    start: int
    end: int
    pieces: list[Piece]


def span_groups(
    q: Tensor, memory: int, spans: Tensor, rotation: QueryRotation | None
) -> Iterator[Group]:
    """The groups whose span is not empty, of queries [B, N, H, D] on a memory of so many rows."""
    (B, N), each = q.shape[:2], spans.shape[1]  # 1: spans of prompts, N: of tokens
    biases, starts, size = None, [0], memory + 1
    kind = spans.reshape(-1, 2).long()
    # One number for each, because PyTorch finds distinct rows of a matrix slowly.
    kind = kind[:, 0] * size + kind[:, 1]
    if rotation is not None and rotation.starts is not None and rotation.biases is not None:
        starts = rotation.starts.tolist() or [0]
        biases = rotation.biases.expand(B, -1)
        if len(rotation.biases) > 1:  # each prompt may have the images at other ids
            row = torch.arange(B, device=q.device).repeat_interleave(each)
            kind = kind + row * size**2
    distinct, owner = kind, None
    if B * each > 1:
        distinct, owner = torch.unique(kind, return_inverse=True)
    ids = None
    if rotation is not None:
        ids = rotation.positions.expand(B, N).reshape(-1).long()
    prompts = torch.arange(B, device=q.device)
    if B > 1:  # the prompt of each query
        prompts = prompts.repeat_interleave(N)
    for index, number in enumerate(distinct.tolist()):
        start, end = number // size % size, number % size
        if start >= end or not q.numel():
            continue
        rows = None  # all rows, without a gather
        if owner is not None and len(distinct) > 1:
            rows = (owner == index).repeat_interleave(N // each).nonzero().squeeze(1)
        pieces = []
        for i, (first, last) in enumerate(zip(starts, [*starts[1:], memory], strict=True)):
            if first >= end or last <= start:
                continue
            distance = None
            if ids is not None:
                distance = ids if rows is None else ids[rows]
                if biases is not None and biases.shape[1]:
                    owners = prompts if rows is None or B == 1 else prompts[rows]
                    distance = distance - biases[owners, i]
            pieces.append(Piece(max(first, start), min(last, end), distance))
        yield Group(rows, start, end, pieces)


def rotate_by_distance(x: Tensor, distance: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [..., H, D] by `distance` [...] rows of the table, of either sign; NaN beyond it."""
    exact = torch.promote_types(x.dtype, torch.float32)
    row = distance.long().abs()
    known = ((row >= 0) & (row < cos.shape[0]))[..., None]  # the smallest integer has no abs
    row = row.clamp(0, cos.shape[0] - 1)
    c = torch.where(known, cos[row].to(exact), float("nan")).unsqueeze(-2)  # [..., 1, R/2]
    s = (sin[row].to(exact) * distance.sign()[..., None].to(exact)).unsqueeze(-2)
    return rotate_halves(x, c, s)
