"""Types of the arguments of `attend_spans`: rotation of queries, scales, workspace."""

from typing import NamedTuple

from torch import Tensor


class QueryRotation(NamedTuple):
    """How queries are rotated on load: by their ids, minus the bias of the image that they read.

    Attributes:
        cos, sin: floating point [P, R/2], a row for each distance of ids from 0 to P - 1, exact in
            float32. A larger distance gives NaN.
        positions: int32 or int64 [B, N], ids of the queries, of any sign.
        starts: int32 [I], first row of each image in the memory, ascending; None if keys are
            rotated by the ids in their prompt, as in the published model.
        biases: int32 [B or 1, I], id of each image's first token, in each prompt; with `starts`.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor
    starts: Tensor | None = None
    biases: Tensor | None = None


class MemoryScales(NamedTuple):
    """Scales of a memory that is stored in float8.

    Attributes:
        keys, values: float32 [T, G], factor of the elements of each tile and head.
        tile: tokens that share a scale; row m of the memory belongs to tile m // `tile`.
    """

    keys: Tensor
    values: Tensor
    tile: int = 256


class AttentionWorkspace(NamedTuple):
    """Static buffers of `attend_spans`, for its output and intermediate results.

    It is for one shape of q; with it a call allocates nothing. `attention_workspace` creates it.

    Attributes:
        out: [B, N, H, D] in the dtype of q, which `attend_spans` returns.
        lse: float32 [B, N, H].
        parts: float32 [splits, G, R, D], R rows of a key head; splits may be 1.
        part_lse: float32 [splits, G, R].
        counts: int32, zeros between calls.
    """

    out: Tensor
    lse: Tensor
    parts: Tensor
    part_lse: Tensor
    counts: Tensor
