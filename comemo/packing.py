"""Packed rows: several samples in one row of a batch, isolated from each other (varlen).

Letters: B rows, N tokens of a row, S samples of all rows.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

import comemo_kernels as ops
from comemo.images import Grid
from comemo_kernels import ImageMemory

# transformers' keyword arguments for the bounds of samples and their largest length.
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def take_bounds(
    cu_seqlens: Tensor | None, kwargs: dict[str, Any], rows: int, tokens: int
) -> Tensor | None:
    """The bounds of samples, by whichever of their names; removes `VARLEN` from `kwargs`.

    Args:
        cu_seqlens: integers [S + 1] or None.
        kwargs: arguments of a forward; `cu_seq_lens_q` and `cu_seq_lens_k` are the same bounds.
        rows, tokens: B and N.

    Returns:
        int64 [S + 1] over the tokens of all rows, row after row; None if none were given.

    Raises:
        ValueError: bounds that differ, or that do not run from 0 to B * N.
    """
    queries, keys = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("cu_seq_lens_k", None)
    for name in VARLEN[2:]:  # computed from the bounds
        kwargs.pop(name, None)
    named = {"cu_seqlens": cu_seqlens, "cu_seq_lens_q": queries, "cu_seq_lens_k": keys}
    given = {name: bounds for name, bounds in named.items() if bounds is not None}
    if not given:
        return None
    found = [torch.as_tensor(bounds).long() for bounds in given.values()]
    whole = rows * tokens
    for bounds in found:
        fits = bounds.ndim == 1 and bounds.shape == found[0].shape and len(bounds) > 1
        if not (fits and torch.equal(bounds, found[0].to(bounds.device))):
            raise ValueError(f"CoMemo: {', '.join(given)} must be the same bounds [samples + 1]")
    bounds = found[0]
    inner = set(bounds.tolist())
    if not (
        bounds[0] == 0
        and bounds[-1] == whole
        and bool((bounds.diff() >= 0).all())
        and set(range(0, whole, tokens)) <= inner
    ):
        raise ValueError(
            f"CoMemo: {next(iter(given))} must run from 0 to {whole}, over {rows} rows of {tokens}"
            f" tokens, with no sample in two rows, got {bounds.tolist()}"
        )
    return bounds


def find_begins(position_ids: Tensor, image_mask: Tensor | None) -> Tensor:
    """Where samples begin if position ids restart in each, as in transformers' packing collator.

    Ids of RoPE-DHR also decrease at each tile. So a sample begins where the first id of the row
    occurs again, except inside an image.

    Args:
        position_ids: [B, N].
        image_mask: bool [B, N], True at image tokens; None if there are none.

    Returns:
        bool [B, N], True at the first token of each sample.
    """
    begins = position_ids == position_ids[:, :1]
    if image_mask is not None:
        begins[:, 1:] &= ~(image_mask[:, 1:] & image_mask[:, :-1])
    begins[:, :1] = True
    return begins


def find_bounds(begins: Tensor) -> Tensor | None:
    """Bounds int64 [S + 1] over all rows' tokens; None if each row is one sample.

    Args:
        begins: bool [B, N], see `find_begins`.
    """
    starts = begins.flatten().nonzero().squeeze(1)
    if len(starts) == len(begins):
        return None
    return torch.cat([starts, starts.new_full((1,), begins.numel())])


def places_from_begins(begins: Tensor) -> Tensor:
    """int64 [B, N], the index of each token in its sample, without a sync."""
    place = torch.arange(begins.shape[1], device=begins.device).expand(begins.shape)
    return place - place.masked_fill(~begins, 0).cummax(1).values


def places_in_samples(bounds: Tensor, rows: int, tokens: int, device: Any) -> Tensor:
    """int64 [B, N], the index of each token in its sample, from bounds [S + 1]."""
    bounds = bounds.to(device)
    place = torch.arange(rows * tokens, device=device)
    sample = torch.searchsorted(bounds, place, right=True) - 1
    return (place - bounds[sample]).view(rows, tokens)


class NumbersPrompts(Protocol):
    """What `prompt_positions` needs of a `CoMemoModel`."""

    def prompt_position_ids(
        self, image_mask: Tensor, attention_mask: Tensor, tile_grid: Any
    ) -> Tensor: ...


def prompt_positions(
    core: NumbersPrompts,
    image_mask: Tensor,
    bounds: Tensor,
    tile_grid: Any,
    tokens_of: Callable[[Grid], int],
) -> Tensor:
    """Position ids [B, N] of packed samples, each numbered like a prompt of its own.

    Args:
        core: numbers one prompt.
        image_mask: bool [B, N].
        bounds: [S + 1].
        tile_grid: (cols, rows) of each image in reading order, or None.
        tokens_of: number of image tokens of a grid.
    """
    flat, ids = image_mask.flatten(), []
    grids: list[Any] = []
    if tile_grid is not None:
        grids = [tuple(map(int, grid)) for grid in tile_grid]
    edges = bounds.tolist()
    for start, end in itertools.pairwise(edges):
        mask = flat[None, start:end]
        wanted, own = int(mask.sum()), []
        while grids and wanted > 0:
            own.append(grids.pop(0))
            wanted -= tokens_of(own[-1])
        ones = torch.ones_like(mask, dtype=torch.long)
        ids.append(core.prompt_position_ids(mask, ones, None if tile_grid is None else own)[0])
    return torch.cat(ids).view(image_mask.shape)


def within_samples(
    memory: ImageMemory, image_mask: Tensor | None, bounds: Tensor, tokens: int
) -> ImageMemory:
    """The memory of whole rows with a span per token: it reads the images of its own sample.

    Args:
        memory: the images of all rows in reading order; returned as it is if its spans are per
            token already.
        image_mask: bool [B, N]; None for rows given as embeddings.
        bounds: [S + 1].
        tokens: N.

    Raises:
        ValueError: spans per row, and no mask that tells where the images are.
    """
    if memory.spans is not None and memory.spans.shape[1] == tokens > 1:
        return memory
    if image_mask is None:
        raise ValueError(
            "CoMemo: packed embeddings need an image_memory with a span for each token,"
            f" [B, {tokens}, 2], got {None if memory.spans is None else tuple(memory.spans.shape)}"
        )
    device = image_mask.device
    counted = torch.cat([image_mask.new_zeros(1).long(), image_mask.flatten().long().cumsum(0)])
    bounds = bounds.to(device)
    spans = ops.spans_from_cu_seqlens(bounds, counted[bounds], image_mask.numel())
    spans = spans.view(*image_mask.shape, 2)
    if memory.spans is not None:
        spans = spans.to(memory.spans.device)
    active = spans[..., 1:] > spans[..., :1]  # a sample without images passes unchanged
    return replace(memory, spans=spans, active=None if bool(active.all()) else active)
