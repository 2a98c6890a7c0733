"""Directions in the embeddings of an untrained comemo-nano, which heads can ask for."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from comemo.conditional_generation import CoMemoForConditionalGeneration

SHARED = 4.0  # how much of the direction that all words and images share
LINES = 10  # five rows and five columns that name places
OWN = 0.9  # of the name of a place: what it shares with others; the rest is like no other word


@torch.no_grad()
def share_directions(
    model: CoMemoForConditionalGeneration, places: Mapping[int, Sequence[int]]
) -> None:
    """Give words and images directions that heads can ask for, and say what is seen.

    All words and images get the same part along one direction, which gives queries and keys that
    are the same everywhere before they are rotated. Images have a direction for themselves, and so
    have names of places, each row and column in them, and how much is seen of what a word names.
    Output weights become like the embeddings.

    Args:
        model: is changed.
        places: id of the name of a place -> its row and column, of `LINES`.
    """
    embeddings = model.get_input_embeddings().weight
    shared = F.normalize(torch.randn(embeddings.shape[1]), dim=0)
    embeddings += (SHARED - embeddings @ shared)[:, None] * shared
    shared, mark, name, seen, *lines = directions_of(model)
    own = F.normalize(without(embeddings, shared, mark, name, seen, *lines), dim=-1)
    for index, named in places.items():
        names = F.normalize(name + sum(lines[line] for line in named), dim=0)
        own[index] = OWN * names + math.sqrt(1 - OWN**2) * own[index]
    own *= loudness(embeddings, shared)  # no word is louder than others
    embeddings.copy_(own + SHARED * shared)
    model.lm_head.weight.copy_(own * 2 / math.sqrt(len(shared)))
    mark_images(model)


@torch.no_grad()
def mark_images(model: CoMemoForConditionalGeneration) -> None:
    """Give all image tokens their part of the directions, also after the projector was trained."""
    projector = model.model.multi_modal_projector[-1]
    for index, own in enumerate(directions_of(model)):
        part = SHARED if index < 2 else 0.0  # nothing seen is a place
        projector.weight -= own[:, None] * (own @ projector.weight)
        projector.bias += (part - projector.bias @ own) * own


def directions_of(model: CoMemoForConditionalGeneration) -> tuple[Tensor, ...]:
    """Unit vectors [width] at right angles: what heads can ask for.

    What all have, what images have, what names of places have, how much is seen of what a word
    names; then one for each row and column, of `LINES`.
    """
    shared = F.normalize(model.get_input_embeddings().weight.mean(0), dim=0)
    others = torch.randn(3 + LINES, len(shared), generator=torch.Generator().manual_seed(0))
    found, signs = torch.linalg.qr(torch.stack([shared, *others]).T)
    return tuple((found * signs.diagonal().sign()).T)


def loudness(embeddings: Tensor, shared: Tensor) -> Tensor:
    """How long what is own of a word [n, width] is: the mean."""
    return without(embeddings, shared).norm(dim=-1).mean()


def without(rows: Tensor, *directions: Tensor) -> Tensor:
    """Rows [n, width] that read nothing along directions that are at right angles."""
    for own in directions:
        rows = rows - (rows @ own)[:, None] * own / own.dot(own)
    return rows
