"""Attention heads that an untrained comemo-nano begins with.

A language model learns such heads from long texts. Here it would have to learn them from the few
questions that need them, and for thousands of these it knows no use for them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from comemo.conditional_generation import CoMemoForConditionalGeneration

BACK = (1, 2)  # how many ids back heads of the first layer look, to copy the words before
SHARED = 4.0  # how much of the direction that all words and images share
FAST = range(4)  # angles that tell how many ids back
NEAR = range(3, 6)  # angles that tell what is a few ids back from what is many
# Heads that look for the same, each along other directions, and how much they prefer images. Else
# a word finds itself first. With less it finds itself if no image is about it.
IMAGES = {-1: 80.0, 0: 30.0}
LINES = 10  # five rows and five columns that name places
BOTH, COLUMN, ROW = range(LINES), range(LINES // 2, LINES), range(LINES // 2)
LOOKS = (BOTH, COLUMN, ROW)  # of the second layer and those after it
OWN = 0.9  # of the name of a place: what it shares with others; the rest is like no other word
NAMED = 0.5  # how much of the names of its place is added to an image token
PLACED = 9.0  # how clearly the name of a place asks for it
FOUND = 1.0  # how much more clearly what was found at a place asks for its row or column
COPIED = 0.5  # how much of what a head finds is added to a token, relative to the token


@torch.no_grad()
def share_directions(
    model: CoMemoForConditionalGeneration, places: Mapping[int, Sequence[int]]
) -> None:
    """Give words and images directions that heads can ask for, and say what is seen.

    All words and images get the same part along one direction, which gives queries and keys that
    are the same everywhere before they are rotated. Images have a direction for themselves, and so
    have names of places, and each row and column in them. Output weights become like the
    embeddings.

    Args:
        model: is changed.
        places: id of the name of a place -> its row and column, of `LINES`.
    """
    embeddings = model.get_input_embeddings().weight
    shared = F.normalize(torch.randn(embeddings.shape[1]), dim=0)
    embeddings += (SHARED - embeddings @ shared)[:, None] * shared
    shared, mark, name, *lines = _directions(model)
    own = F.normalize(_without(embeddings, shared, mark, name, *lines), dim=-1)
    for index, named in places.items():
        names = F.normalize(name + sum(lines[line] for line in named), dim=0)
        own[index] = OWN * names + math.sqrt(1 - OWN**2) * own[index]
    own *= _loud(embeddings, shared)  # no word is louder than others
    embeddings.copy_(own + SHARED * shared)
    model.lm_head.weight.copy_(own * 2 / math.sqrt(len(shared)))
    mark_images(model)


@torch.no_grad()
def mark_images(model: CoMemoForConditionalGeneration) -> None:
    """Give all image tokens their part of the directions, also after the projector was trained."""
    projector = model.model.multi_modal_projector[-1]
    for index, own in enumerate(_directions(model)):
        part = SHARED if index < 2 else 0.0  # nothing seen is a place
        projector.weight -= own[:, None] * (own @ projector.weight)
        projector.bias += (part - projector.bias @ own) * own


def _directions(model: CoMemoForConditionalGeneration) -> tuple[Tensor, ...]:
    """Unit vectors [width]: what all share, images have, names of places have; then `LINES`."""
    shared = F.normalize(model.get_input_embeddings().weight.mean(0), dim=0)
    others = torch.randn(2 + LINES, len(shared), generator=torch.Generator().manual_seed(0))
    found, signs = torch.linalg.qr(torch.stack([shared, *others]).T)
    return tuple((found * signs.diagonal().sign()).T)


def _loud(embeddings: Tensor, shared: Tensor) -> Tensor:
    """How long what is own of a word is."""
    return _without(embeddings, shared).norm(dim=-1).mean()


@torch.no_grad()
def add_heads(
    model: CoMemoForConditionalGeneration,
    places: Mapping[int, Mapping[int, Mapping[int, float]]],
    asked: int,
    end: int,
) -> None:
    """Make some heads do what questions about images need.

    In the first layer each image token gets the words that name its place, and each word copies
    those before it. In the layers after it, and in the mixin layers, a word copies from the image
    tokens that are about the same thing; and the end of a prompt copies the end of the question,
    with what was found for it. In the last two layers each word of an answer copies it from there.

    Args:
        model: of `share_directions`.
        places: so many ids back -> ids of words that are there before an image -> {line: weight},
            the rows and columns, of `LINES`, that name the place; {} if another head names it.
            Before an image there are always the same tokens, and with RoPE-DHR every tile has the
            ids of the thumbnail.
        asked: tokens from the last word of a question to the end of the prompt.
        end: the id of the last token of a prompt.
    """
    language = model.model.language_model
    asks = _asks(model, with_places=bool(places))
    theta = language.config.rope_parameters["rope_theta"]
    first, *others = language.layers
    _begin(first.self_attn, asks, places, model.get_input_embeddings().weight, theta)
    # What a layer finds, the next layer copies to the end of the prompt.
    parts = [_part(first.self_attn, *asks.directions) for _ in others[::2]]
    for index, layer in enumerate(others):
        attention, left, copied = layer.self_attn, len(others) - index, parts[index // 2]
        found = []
        if left > 1:
            # What names a place is for another head, until that has found something.
            asking = asks.shared - 2 * asks.name if index == 0 else asks.shared
            for head, more in IMAGES.items():
                weights = attention.q_proj.weight, attention.k_proj.weight
                rows = _look_for_the_same(attention, *weights, head, *asks.directions)
                slowest = rows.start + attention.head_dim // 2 - 1
                for weight, own in zip(weights, (asking, asks.mark), strict=True):
                    weight[slowest] = math.sqrt(more * math.sqrt(attention.head_dim)) * own
                found.append(rows)
        if index:
            back = asked + (index + 1) % 2
            found.append(_look_back(attention, -2, back, 10 * asks.shared, 10 * asks.word, theta))
        for rows in found:
            _copy(attention, rows, copied)
        if left > 2 and places:
            # First what is at a place; then what is in the column, or row, of what was found.
            lines, copied = LOOKS[index % len(LOOKS)], parts[(index + 1) // 2]
            rows = _look_for_places(attention, 1, asks, lines)
            _copy(attention, rows, copied if lines == BOTH else _seen(copied))
        if left <= 2:
            ended = _own(model.get_input_embeddings().weight[end], asks)
            rows = _look_at(attention, 1, 10 * asks.shared, 10 * ended, theta)
            _copy(attention, rows, parts[max(index - 2, 0) // 2])
    for index, layer in enumerate(others):
        if (mixin := layer.mixin) is not None:
            keys, values = mixin.kv_proj.weight.chunk(2)
            for head in IMAGES:
                weights = mixin.q_proj.weight, keys
                rows = _look_for_the_same(mixin, *weights, head, *asks.directions)
                values[rows] = parts[index // 2]
                mixin.o_proj.weight[:, rows] = COPIED * parts[index // 2].T


class _Asks(NamedTuple):
    """What queries and keys are made of: each [width] gives 1 for what has it.

    Attributes:
        directions: unit vectors of `_directions`; the first two alone if no place has a name.
        shared, mark: for all words and images; for images.
        word: for words, not for images.
        name: for names of places.
        placed: for names of places that have a line.
        scale: of the embeddings.
        loud: how long what is own of a word is.
    """

    directions: tuple[Tensor, ...]
    shared: Tensor
    mark: Tensor
    word: Tensor
    name: Tensor
    placed: list[Tensor]
    scale: Tensor
    loud: Tensor


def _asks(model: CoMemoForConditionalGeneration, with_places: bool) -> _Asks:
    embeddings = model.get_input_embeddings().weight
    scale = embeddings.pow(2).mean().sqrt()
    directions = _directions(model) if with_places else _directions(model)[:2]
    loud = _loud(embeddings, directions[0])
    shared, mark = (own * scale / SHARED for own in directions[:2])
    placed = [own * scale * math.sqrt(3) / (OWN * loud) for own in directions[2:]]
    name, *placed = placed or [torch.zeros_like(shared)]
    return _Asks(directions, shared, mark, shared - mark, name, placed, scale, loud)


def _own(word: Tensor, asks: _Asks) -> Tensor:
    """What gives 1 for this embedding [width] and about 0 for others."""
    (own,) = _without(word[None], asks.directions[0])
    return own * asks.scale / own.dot(own)


def _begin(
    attention: Any,
    asks: _Asks,
    places: Mapping[int, Mapping[int, Mapping[int, float]]],
    embeddings: Tensor,
    theta: float,
) -> None:
    """Make the heads of the first layer look back: images for their place, words for words."""
    shared, lines = asks.directions[0], asks.directions[3:]
    heads = attention.q_proj.weight.shape[0] // attention.head_dim
    for head, back in enumerate((*places, *BACK)[:heads]):
        if back in places:
            rows = _look_back(attention, head, back, 8 * asks.mark, 8 * asks.shared, theta)
            loud = [asks.loud * line for line in lines]
            read, written = _names(attention, embeddings, places[back], shared, loud)
        else:
            rows = _look_back(attention, head, back, 8 * asks.shared, 8 * asks.word, theta)
            read = _part(attention, *asks.directions)
            written = COPIED * read.T
        attention.v_proj.weight[rows] = read
        attention.o_proj.weight[:, rows] = written


def _copy(attention: Any, rows: slice, copied: Tensor) -> None:
    """Make a head add this part [head_dim, width] of what it finds."""
    attention.v_proj.weight[rows] = copied
    attention.o_proj.weight[:, rows] = COPIED * copied.T


def _names(
    attention: Any,
    embeddings: Tensor,
    named: Mapping[int, Mapping[int, float]],
    shared: Tensor,
    lines: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """What a head reads [head_dim, width] and writes [width, head_dim] to name places by words."""
    found = embeddings[list(named)]
    found = _without(found / found.pow(2).mean(-1, keepdim=True).sqrt(), shared)
    read = torch.zeros(attention.head_dim, embeddings.shape[1])
    read[: len(found)] = torch.linalg.pinv(found).T  # 1 for one of them, 0 for the others
    written = torch.zeros_like(read.T)
    for column, names in enumerate(named.values()):
        for line, weight in names.items():
            written[:, column] += weight / math.sqrt(2) * lines[line]
    return read, NAMED * written


def _look_for_places(attention: Any, head: int, asks: _Asks, lines: range) -> slice:
    """Make a head look for images at the place that a word names, or beside what it has found.

    Other words look at no image.

    Args:
        attention: of a layer.
        head: of it.
        asks: of the model.
        lines: `BOTH` for names of places; a row or column for words that have found something.

    Returns:
        The rows of the head.
    """
    rows, size = _rows(attention, attention.q_proj.weight, head), attention.head_dim
    slowest, half = rows.start + size // 2 - 1, LINES // 2
    wanted = PLACED * torch.stack(asks.placed)
    wanted[[line for line in BOTH if line not in lines]] = 0
    more = 1.0 if lines == BOTH else FOUND
    for weight, own in (
        (attention.q_proj.weight, more * wanted),
        (attention.k_proj.weight, wanted),
    ):
        weight[rows] = 0
        weight[slowest - half : slowest] = own[:half]
        weight[slowest - half + size // 2 : slowest + size // 2] = own[half:]
    # More than 0 for images, if a place is asked for: else it would find words that have it.
    asking = wanted.sum(0) * half / len(lines)
    if lines == BOTH:
        asking = 3 * asking - PLACED * asks.shared
    else:
        asking = FOUND * (2 * asking - 12 * PLACED * asks.name) - PLACED * asks.shared
    attention.q_proj.weight[slowest] = asking
    attention.k_proj.weight[slowest] = PLACED * asks.mark
    return rows


def _look_back(
    attention: Any, head: int, back: int, queries: Tensor, keys: Tensor, theta: float
) -> slice:
    """Make a head look so many ids back, along these directions; its rows."""
    # Slow angles hardly tell neighbours apart.
    return _look(attention, head, back, queries, keys, theta, FAST)


def _look_at(attention: Any, head: int, queries: Tensor, keys: Tensor, theta: float) -> slice:
    """Make a head look at the nearest token before it that has these keys; its rows."""
    return _look(attention, head, 0, queries, keys, theta, NEAR)


def _look(
    attention: Any,
    head: int,
    back: int,
    queries: Tensor,
    keys: Tensor,
    theta: float,
    turned: range,
) -> slice:
    """Make a head look so many ids back by these angles and no others; its rows."""
    rows, size = _rows(attention, attention.q_proj.weight, head), attention.head_dim
    first = rows.start + torch.tensor(turned)
    angles = theta ** (-torch.tensor(turned) / (size // 2))
    for weight, direction, cos, sin in (
        (attention.q_proj.weight, queries, torch.cos(back * angles), -torch.sin(back * angles)),
        (attention.k_proj.weight, keys, torch.ones(len(turned)), torch.zeros(len(turned))),
    ):
        weight[rows] = 0
        weight[first] = cos[:, None] * direction
        weight[first + size // 2] = sin[:, None] * direction
    return rows


def _look_for_the_same(
    attention: Any, queries: Tensor, keys: Tensor, head: int, *directions: Tensor
) -> slice:
    """Make a head look at what is about the same thing; its rows.

    Queries like keys: "star" finds the image tokens that the tower has named so. Only angles that
    are slow to turn take part, so it hardly matters how far away they are.
    """
    rows, size = _rows(attention, queries, head), attention.head_dim
    half, width = size // 2, queries.shape[1]
    slow = torch.cat([torch.arange(half // 2, half - 1), torch.arange(half + half // 2, size - 1)])
    read = torch.linalg.qr(torch.randn(width, width))[0][: len(slow)]
    for weight in (queries, keys):
        weight[rows] *= 0.3
        weight[rows.start + slow] = 3 * _without(read, *directions)
        weight[[rows.start + half - 1, rows.stop - 1]] = 0
    return rows


def _part(
    attention: Any, shared: Tensor, mark: Tensor, name: Tensor | None = None, *lines: Tensor
) -> Tensor:
    """A part [head_dim, width] of what is to be copied: lines, and others by chance."""
    rows = torch.linalg.qr(torch.randn(2 * shared.shape))[0][: attention.head_dim - len(lines)]
    names = () if name is None else (name,)
    return torch.stack([*lines, *_without(rows, shared, mark, *names, *lines)])


def _seen(part: Tensor) -> Tensor:
    """Of a part, what is not lines."""
    part = part.clone()
    part[:LINES] = 0
    return part


def _without(rows: Tensor, *directions: Tensor) -> Tensor:
    """Rows [n, width] that read nothing along directions that are at right angles."""
    for own in directions:
        rows = rows - (rows @ own)[:, None] * own / own.dot(own)
    return rows


def _rows(attention: Any, weight: Tensor, head: int) -> slice:
    """Of a head in a weight [heads * head_dim, width]; negative ones count from the last."""
    size = attention.head_dim
    first = head % (weight.shape[0] // size) * size
    return slice(first, first + size)
