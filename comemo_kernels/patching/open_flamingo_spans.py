"""Which image features each token of a Flamingo reads, as spans. Computed on the device, no sync.

Letters: B batch, N tokens, T images of a sample, n features of an image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from comemo_kernels.patching.media import keep_while_alive


class Seen(NamedTuple):
    """What tokens read of features [B, T, n, d], or [1, T, n, d] where samples share them."""

    spans: Tensor  # int64 [B, N, 2], or [B, 1, 2] if all tokens of a sample read the same
    blind: Tensor | None  # bool [B, N, 1, 1] or [B, 1, 1, 1]: weighs all features of its sample
    # alike, as a softmax does over scores that are all masked by the same number


def find_spans(
    x: Tensor,
    media: Tensor,
    locations: Tensor | None,
    latest: bool,
    cached: bool,
) -> Seen:
    """Spans of the tokens of x; kept for as long as `locations` lives, for all layers.

    Args:
        x: [B, N, d].
        media: [B or 1, T, n, d].
        locations: [B or 1, any or N], True at the places of images; None: all tokens read all.
        latest: whether a token reads only the latest image.
        cached: whether all tokens follow all images.
    """
    B = x.shape[0]
    samples, T, n = media.shape[:3]
    if locations is None:
        return Seen(_shift(_whole(B, T * n, x.device), samples, T * n), None)
    asked = (B, samples, T, n, latest, cached)

    def compute() -> tuple[tuple[object, ...], Seen]:
        return asked, _compute(locations, *asked)

    found, seen = keep_while_alive(locations, find_spans, (), compute)
    return seen if found == asked else compute()[1]


def _compute(
    locations: Tensor, B: int, samples: int, T: int, n: int, latest: bool, cached: bool
) -> Seen:
    images = locations.count_nonzero(1)[:, None] if cached else locations.cumsum(1)
    images = images.expand(B, -1)  # how many begin at or before each token
    end = images.clamp(max=T) * n
    start = (images - 1).clamp(min=0) * n if latest else torch.zeros_like(end)
    blind = images > T if latest else images == 0
    start, end = start.masked_fill(blind, 0), end.masked_fill(blind, T * n)
    spans = torch.stack([start, end], dim=-1)
    return Seen(_shift(spans, samples, T * n), blind[..., None, None])


def _whole(B: int, M: int, device: torch.device) -> Tensor:
    spans = torch.zeros(B, 1, 2, dtype=torch.int64, device=device)
    spans[..., 1] = M
    return spans


def _shift(spans: Tensor, samples: int, M: int) -> Tensor:
    """Into the features of all samples, one after the other."""
    if samples == 1:
        return spans
    return spans + torch.arange(samples, device=spans.device)[:, None, None] * M
