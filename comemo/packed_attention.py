"""Causal self-attention of packed samples, each alone, with samples of about one length together.

One call of SDPA a sample is slow where samples are short: the call costs as much as its work.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 0.8  # of a group, as a share of its longest sample: how much may be padding


class SampleGroups(NamedTuple):
    """Where each token is computed.

    Attributes:
        shapes: (samples, tokens of the longest one) of each group; their products are its slots.
        slot: int64 [tokens], the slot of each token.
        token: int64 [slots], the token of each slot; the number of tokens for padding.
    """

    shapes: list[tuple[int, int]]
    slot: Tensor
    token: Tensor


def group_samples(bounds: list[int], device: torch.device) -> SampleGroups:
    """Group samples of similar length.

    Args:
        bounds: [samples + 1], first and last tokens of samples over the tokens of all rows.
        device: of the tensors.
    """
    sizes = torch.tensor(bounds).diff()
    sizes, order = sizes.sort(descending=True, stable=True)
    lengths, owners = sizes[sizes > 0].tolist(), order.tolist()
    total = bounds[-1]
    shapes, slots, tokens = list[tuple[int, int]](), [], []
    first = 0
    while first < len(lengths):
        longest, last = lengths[first], first
        while last < len(lengths) and lengths[last] >= SHORTEST * longest:
            last += 1
        shapes.append((last - first, longest))
        for index in range(first, last):
            start, own = bounds[owners[index]], lengths[index]
            tokens.append(torch.arange(start, start + own))
            tokens.append(torch.full((longest - own,), total))
        first = last
    token = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.long)
    slots = torch.empty(total + 1, dtype=torch.long)
    slots[token] = torch.arange(len(token))
    return SampleGroups(shapes, slots[:total].to(device), token.to(device))


def attend_samples(
    q: Tensor, k: Tensor, v: Tensor, groups: SampleGroups, dropout: float, scale: float
) -> Tensor:
    """Causal SDPA of each packed sample alone: no pairs of samples, and no mask of all pairs.

    Args:
        q: [B, H, N, D].
        k, v: [B, G, N, D].
        groups: of the samples of all rows; no sample is in two rows.
        dropout, scale: of SDPA.

    Returns:
        [B, N, H, D].
    """
    B, H, N, D = q.shape
    attend = cast(Any, F.scaled_dot_product_attention)  # its stub knows no enable_gqa
    sizes = [samples * longest for samples, longest in groups.shapes]
    # By index_copy in both directions: its gradient is a gather, without sums and so exact.
    slots = [_place(t.transpose(1, 2).flatten(0, 1), groups.slot, sum(sizes)) for t in (q, k, v)]
    parts = []
    for shape, *own in zip(groups.shapes, *(t.split(sizes) for t in slots), strict=True):
        # Padding comes after its sample, where causal queries do not see it.
        x = (t.unflatten(0, shape).transpose(1, 2) for t in own)
        out = attend(*x, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return _place(torch.cat(parts), groups.token, B * N + 1)[: B * N].view(B, N, H, D)


def _place(x: Tensor, places: Tensor, size: int) -> Tensor:
    """The rows x [R, H, D] at `places` [R] of so many, the others 0."""
    return x.new_zeros(size, *x.shape[1:]).index_copy(0, places, x)
