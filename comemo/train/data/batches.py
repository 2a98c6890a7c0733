"""The batch of a pack."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from comemo.loss import IGNORED
from comemo.train.data.packs import Pack
from comemo.train.data.streams import Entry


def make_batch(pack: Pack[Entry]) -> dict[str, Any]:
    """A batch of one pack.

    Args:
        pack: of samples that were read.

    Returns:
        What `PackLoader` describes.
    """
    samples = [entry.sample for entry in pack.items if entry.sample is not None]
    labels = [sample.labels for sample in samples]
    weights = [
        np.where(sample.labels != IGNORED, np.float32(sample.weight), np.float32(0))
        for sample in samples
    ]
    bounds = np.cumsum([0, *(len(sample.ids) for sample in samples)])
    batch: dict[str, Any] = {
        "input_ids": _row([sample.ids for sample in samples]),
        "labels": _row(labels),
        "loss_weights": _row(weights),
        "position_ids": _row([sample.positions for sample in samples]),
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int64)),
    }
    tiles = [sample.tiles for sample in samples if sample.tiles is not None]
    if tiles:
        batch["pixel_values"] = torch.from_numpy(np.concatenate(tiles))
        batch["tile_grid"] = [grid for sample in samples for grid in sample.grids]
    return batch | {"samples": [entry.place for entry in pack.items]}


def make_filler(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Two tokens without labels, for a stream that has ended.

    Args:
        tokenizer: of the model; the tokens are its end of text.
    """
    index = tokenizer.eos_token_id
    return {
        "input_ids": torch.full((1, 2), 0 if index is None else index),
        "labels": torch.full((1, 2), IGNORED),
        "loss_weights": torch.zeros(1, 2),
        "position_ids": torch.arange(2)[None],
        "cu_seqlens": torch.tensor([0, 2]),
        "samples": [],
    }


def _row(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))[None]
