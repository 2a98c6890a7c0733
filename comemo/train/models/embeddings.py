"""Rows of the vocabulary, and positions of the vision tower, for other sizes than they had."""

import copy
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comemo.conditional_generation import CoMemoForConditionalGeneration


@torch.no_grad()
def fit_vocabulary(
    model: CoMemoForConditionalGeneration, size: int, known: int, added: Collection[int]
) -> None:
    """Give the embeddings and the output layer a row for every token of a tokenizer.

    New rows are the mean of the rows of the tokens known before, in both layers. The published
    code does this to the output layer alone; with a mean embedding, too, a new token begins as an
    ordinary one. A vocabulary that is larger than the tokenizer stays.

    Args:
        model: its `config` is changed, too.
        size: one more than the highest id of the tokenizer.
        known: tokens of the tokenizer before tokens were added.
        added: ids of tokens that were added.
    """
    rows = model.config.text_config.vocab_size
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
    old = min(rows, known)
    new = sorted({*range(rows, size), *added})
    if not new:
        return
    for layer in (model.get_input_embeddings(), model.lm_head):
        before = [index for index in new if index < old]
        weight = layer.weight
        total = _sum(weight[:old]) - _sum(weight[before])
        weight[new] = (total / (old - len(before))).to(weight.dtype)


def _sum(rows: Tensor) -> Tensor:
    """Sum of rows [R, d] in float64, without a copy of all rows in it."""
    parts = [part.double().sum(0) for part in rows.split(4096)]
    return torch.stack(parts).sum(0) if parts else rows.new_zeros(rows.shape[1]).double()


@torch.no_grad()
def resize_tiles(model: CoMemoForConditionalGeneration, side: int) -> None:
    """Change the side of tiles; position embeddings are interpolated, as published bicubically.

    Args:
        model: its `config` is changed, too.
        side: in pixels.

    Raises:
        ValueError: a side that does not give a whole raster of image tokens. Nothing is changed
            then.
    """
    vision = model.config.vision_config
    if side == vision.image_size[0]:
        return
    patch = vision.patch_size[0]
    if side % patch:
        raise ValueError(
            f"start.model: force_image_size must be a multiple of the patch size {patch}, got"
            f" {side}"
        )
    trial = copy.deepcopy(model.config)
    trial.vision_config.image_size = (side, side)
    trial.check()
    embeddings = model.model.vision_tower.embeddings
    positions, n = embeddings.position_embeddings, side // patch  # [1, 1 + patches, C]
    resized = interpolate_positions(positions, n).to(positions.dtype)
    embeddings.position_embeddings = nn.Parameter(resized, positions.requires_grad)
    patches = embeddings.patch_embeddings
    patches.num_patches, patches.patch_shape = n * n, (n, n)
    kind = type(vision.image_size)
    embeddings.image_size = patches.image_size = vision.image_size = kind((side, side))
    model.config.force_image_size = side


def interpolate_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings for another number of patches.

    Args:
        positions: [1, 1 + n * n, C], that of the class token first.
        side: patches along a side.

    Returns:
        float32 [1, 1 + side * side, C].
    """
    cls, grid = positions[:, :1].float(), positions[:, 1:].float()
    old = round(grid.shape[1] ** 0.5)
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
