"""Who reads what of the image memory: packed samples, and tokens that stand behind images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._checks_memory import INTEGERS, at_hand, check_sizes
from comemo_kernels._op import check, check_count, to_device


@public
def spans_from_cu_seqlens(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, tokens: int) -> Tensor:
    """Spans of a packed row in which sample i holds tokens [q_i, q_i+1) and memory [k_i, k_i+1).

    Args:
        cu_seqlens_q, cu_seqlens_k: [samples + 1] cumulative lengths, starting at 0.
        tokens: N, the row's length; tokens past the last sample read nothing.

    Returns:
        int64 [1, N, 2].

    Raises:
        ValueError: lengths of different sample counts, dtypes or devices; lengths on a CPU that do
            not ascend from 0, or samples of more than `tokens`: of a GPU nobody waits for them.
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
        listed = at_hand(bounds)
        check(
            not listed or (listed[0] == 0 and listed == sorted(listed)),
            f"spans_from_cu_seqlens: {name} must ascend from 0, got {listed}",
        )
        check(
            not listed or bounds is cu_seqlens_k or listed[-1] <= tokens,
            f"spans_from_cu_seqlens: the samples of {name} must lie in {tokens} tokens, got"
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
    """Spans of one prompt whose tokens see only images that stand before them.

    Args:
        last_tokens: integers [I], index of each image's last token in the prompt, ascending. A
            token sees an image from that token on.
        sizes: tokens of each image in the memory, where they lie one after the other.
        tokens: N, the prompt's length.
        latest: see the latest image alone instead of all so far (both are modes of Flamingo's).

    Returns:
        int64 [1, N, 2], empty ahead of the first image.

    Raises:
        ValueError: another number of sizes than of images, sizes below 0; on a CPU also places that
            do not ascend from 0 or later: of a GPU nobody waits for them.
    """
    check_count("spans_from_images", "tokens", tokens)
    check_sizes("spans_from_images", "sizes", sizes, 0)
    check(
        last_tokens.ndim == 1 and len(sizes) == len(last_tokens) and last_tokens.dtype in INTEGERS,
        f"spans_from_images: last_tokens must be [I] for {len(sizes)} sizes, int32 or int64, got"
        f" {last_tokens.dtype} {tuple(last_tokens.shape)}",
    )
    listed = at_hand(last_tokens)
    check(
        not listed or (listed[0] >= 0 and listed == sorted(listed)),
        f"spans_from_images: last_tokens must ascend from 0 or later, got {listed}",
    )
    borders = to_device(torch.tensor((0, *sizes)).cumsum(0), last_tokens.device)
    place = torch.arange(tokens, device=last_tokens.device)
    seen = torch.searchsorted(last_tokens.contiguous(), place, right=True)  # images so far
    end = borders[seen]
    start = borders[(seen - 1).clamp(min=0)] if latest else torch.zeros_like(end)
    return torch.stack([start, end], dim=-1)[None]
