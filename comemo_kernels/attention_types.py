"""What a read of the image memory needs beside queries, keys, values and spans."""

from typing import NamedTuple

from torch import Tensor


class QueryRotation(NamedTuple):
    """How queries are rotated as they are loaded: by their ids, minus the bias of what they read.

    Attributes:
        cos, sin: floating point [P, R/2], a row for each distance of ids, from 0 on; float32 is
            exact. A distance of P or more gives NaN.
        positions: int32 or int64 [B, N], ids of the queries, of any sign.
        starts: int32 [I], first row of each image in the memory, ascending; None if keys are
            rotated by the ids in their prompt, as the published model does.
        biases: int32 [B or 1, I], id of each image's first token, in each prompt; with `starts`.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor
    starts: Tensor | None = None
    biases: Tensor | None = None


class MemoryScales(NamedTuple):
    """Factors of a memory that is stored as float8.

    Attributes:
        keys, values: float32 [T, G], what each tile's and head's elements are multiplied with.
        tile: tokens that share a factor; row m of the memory belongs to tile m // `tile`.
    """

    keys: Tensor
    values: Tensor
    tile: int = 256


class AttentionWorkspace(NamedTuple):
    """Where `attend_spans` puts its output and its intermediate results, if it is handed one.

    It fits one shape of q; with it a call allocates nothing. `attention_workspace` makes it.

    Attributes:
        out: [B, N, H, D] in the dtype of q, what `attend_spans` returns.
        lse: float32 [B, N, H].
        parts: float32 [splits, G, R, D] of R rows a key head; splits may be 1.
        part_lse: float32 [splits, G, R].
        counts: int32, zeros between calls.
    """

    out: Tensor
    lse: Tensor
    parts: Tensor
    part_lse: Tensor
    counts: Tensor
