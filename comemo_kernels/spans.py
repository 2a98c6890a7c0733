"""Spans of the image memory: of packed samples (varlen), and of tokens that follow images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._op import check, check_count, to_device
from comemo_kernels.reference.dtypes import INTEGERS
from comemo_kernels.reference.memory_checks import check_sizes, known_values


@public
def spans_from_cu_seqlens(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, tokens: int) -> Tensor:
    """Spans of a packed row in which sample i holds tokens [q_i, q_i+1) and memory [k_i, k_i+1).

    Args:
        cu_seqlens_q, cu_seqlens_k: [samples + 1] cumulative lengths, starting at 0.
        tokens: N, length of the row; tokens past the last sample read nothing.

    Returns:
        int64 [1, N, 2].

    Raises:
        ValueError: different sample counts, dtypes or devices; lengths that do not ascend from 0,
            or samples of more than `tokens`, which are checked only on a CPU, without a sync.
    """
    check_count("spans_from_cu_seqlens", "tokens", tokens)
    check(
        cu_seqlens_q.ndim == 1
        and len(cu_seqlens_q) > 0
        and cu_seqlens_q.shape == cu_seqlens_k.shape
        and {cu_seqlens_q.dtype, cu_seqlens_k.dtype} <= INTEGERS
        and cu_seqlens_q.device == cu_seqlens_k.device,
        "spans_from_cu_seqlens: cu_seqlens_q and cu_seqlens_k must be [samples + 1], int32 or int64"
        f" on one device, got {cu_seqlens_q.dtype} {tuple(cu_seqlens_q.shape)} on"
        f" {cu_seqlens_q.device} and {cu_seqlens_k.dtype} {tuple(cu_seqlens_k.shape)} on"
        f" {cu_seqlens_k.device}",
    )
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        listed = known_values(bounds)
        check(
            not listed or (listed[0] == 0 and listed == sorted(listed)),
            f"spans_from_cu_seqlens: {name} must ascend from 0, got {listed}",
        )
        check(
            not listed or bounds is cu_seqlens_k or listed[-1] <= tokens,
            f"spans_from_cu_seqlens: the samples of {name} must fit in {tokens} tokens, got"
            f" {listed}",
        )
    sample = torch.searchsorted(
        cu_seqlens_q.contiguous(), torch.arange(tokens, device=cu_seqlens_q.device), right=True
    )
    bounds = torch.cat([cu_seqlens_k, cu_seqlens_k[-1:]]).long()
    return torch.stack([bounds[sample - 1], bounds[sample]], dim=-1)[None]


@public
def spans_from_images(
    last_tokens: Tensor, sizes: Sequence[int], tokens: int, latest: bool = False
) -> Tensor:
    """Spans of one prompt whose tokens see only the images before them.

    Args:
        last_tokens: integers [I], index of each image's last token in the prompt, ascending. A
            token sees an image from that index on.
        sizes: tokens of each image in the memory, which concatenates them.
        tokens: N, length of the prompt.
        latest: see only the latest image instead of all so far (both are modes of Flamingo).

    Returns:
        int64 [1, N, 2], empty before the first image.

    Raises:
        ValueError: different numbers of sizes and images, negative sizes, or indices that do not
            ascend from 0 or more, which are checked only on a CPU, without a sync.
    """
    check_count("spans_from_images", "tokens", tokens)
    check_sizes("spans_from_images", "sizes", sizes, 0)
    check(
        last_tokens.ndim == 1 and len(sizes) == len(last_tokens) and last_tokens.dtype in INTEGERS,
        f"spans_from_images: last_tokens must be [I] for {len(sizes)} sizes, int32 or int64, got"
        f" {last_tokens.dtype} {tuple(last_tokens.shape)}",
    )
    listed = known_values(last_tokens)
    check(
        not listed or (listed[0] >= 0 and listed == sorted(listed)),
        f"spans_from_images: last_tokens must ascend from 0 or more, got {listed}",
    )
    borders = to_device(torch.tensor((0, *sizes)).cumsum(0), last_tokens.device)
    place = torch.arange(tokens, device=last_tokens.device)
    seen = torch.searchsorted(last_tokens.contiguous(), place, right=True)  # images so far
    end = borders[seen]
    start = borders[(seen - 1).clamp(min=0)] if latest else torch.zeros_like(end)
    return torch.stack([start, end], dim=-1)[None]
