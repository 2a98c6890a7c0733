"""Attention heads that an untrained comemo-nano begins with.

A language model learns such heads from long texts. Here it would have to learn them from the few
questions that need them, and for thousands of these it knows no use for them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.nano.directions import LINES, OWN, SHARED, directions_of, loudness, without

BACK = (1, 2)  # how many ids back heads of the first layer look, to copy the words before
BEFORE = (0, 2, 0, 1)  # words before the last of a question that the end of a prompt looks at
FAST = range(4)  # angles that tell how many ids back
NEAR = range(3, 6)  # angles that tell what is a few ids back from what is many
# Heads that look for the same, each along other directions, and how much they prefer images. Else
# a word finds itself first. With less it finds itself if no image is about it.
IMAGES = {-1: 80.0, 0: 30.0}
BOTH, COLUMN, ROW = range(LINES), range(LINES // 2, LINES), range(LINES // 2)
LOOKS = (BOTH, COLUMN, ROW)  # of the second layer and those after it
NAMED = 0.5  # how much of the names of its place is added to an image token
PLACED = 9.0  # how clearly the name of a place asks for it
FOUND = 1.0  # how much more clearly what was found at a place asks for its row or column
COUNTED = 8.0  # how clearly a noun asks for images of it
COPIED = 0.5  # how much of what a head finds is added to a token, relative to the token


@torch.no_grad()
def add_heads(
    model: CoMemoForConditionalGeneration,
    places: Mapping[int, Mapping[int, Mapping[int, float]]],
    asked: int,
    end: int,
    nouns: Sequence[int] = (),
) -> None:
    """Make some heads do what questions about images need.

    In the first layer each image token gets the words that name its place, and each word copies
    those before it. In the layers after it, and in the mixin layers, a word copies from the image
    tokens that are about the same thing; and the end of a prompt copies the end of the question,
    with what was found for it. In the last two layers each word of an answer copies it from there.

    Args:
        model: of `directions.share_directions`.
        places: so many ids back -> ids of words that are there before an image -> {line: weight},
            the rows and columns, of `LINES`, that name the place; {} if another head names it.
            Before an image there are always the same tokens, and with RoPE-DHR every tile has the
            ids of the thumbnail.
        asked: tokens from the last word of a question to the end of the prompt.
        end: the id of the last token of a prompt.
        nouns: ids of words for what is counted, at most 14.
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
            back = asked + BEFORE[(index - 1) % len(BEFORE)]
            found.append(_look_back(attention, -2, back, 10 * asks.shared, 10 * asks.word, theta))
        for rows in found:
            _copy(attention, rows, copied)
        if index == 0 and nouns:
            _count(attention, 0, asks, model.get_input_embeddings().weight[list(nouns)], copied)
        if left > 2 and places:
            # First what is at a place; then what is in the column, or row, of what was found.
            lines, copied = LOOKS[index % len(LOOKS)], parts[(index + 1) // 2]
            rows = _look_for_places(attention, 1, asks, lines)
            _copy(attention, rows, copied if lines == BOTH else _unplaced(copied))
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
        directions: unit vectors of `directions_of`; the first two alone if no place has a name.
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
    directions = directions_of(model) if with_places else directions_of(model)[:2]
    loud = loudness(embeddings, directions[0])
    shared, mark = (own * scale / SHARED for own in directions[:2])
    placed = [own * scale * math.sqrt(3) / (OWN * loud) for own in directions[2:]]
    name, _, *placed = placed or [torch.zeros_like(shared)] * 2
    return _Asks(directions, shared, mark, shared - mark, name, placed, scale, loud)


def _own(word: Tensor, asks: _Asks) -> Tensor:
    """What gives 1 for this embedding [width] and about 0 for others."""
    (own,) = without(word[None], asks.directions[0])
    return own * asks.scale / own.dot(own)


def _begin(
    attention: Any,
    asks: _Asks,
    places: Mapping[int, Mapping[int, Mapping[int, float]]],
    embeddings: Tensor,
    theta: float,
) -> None:
    """Make the heads of the first layer look back: images for their place, words for words."""
    shared, lines = asks.directions[0], asks.directions[4:]
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
    found = without(found / found.pow(2).mean(-1, keepdim=True).sqrt(), shared)
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


def _count(attention: Any, head: int, asks: _Asks, nouns: Tensor, copied: Tensor) -> None:
    """Make a head of a noun look at images of it, the more the more there are, and at itself.

    The share of images becomes the part along `seen`. Other words look at no image.

    Args:
        attention: of a layer.
        head: of it.
        asks: of the model.
        nouns: their embeddings [n, width].
        copied: the part of what is found that is copied.
    """
    rows, size = _rows(attention, attention.q_proj.weight, head), attention.head_dim
    read = torch.linalg.pinv(without(nouns / asks.scale, asks.directions[0])).T
    slowest, half = rows.start + size // 2 - 1, (len(nouns) + 1) // 2
    for weight in (attention.q_proj.weight, attention.k_proj.weight):
        weight[rows] = 0
        weight[slowest - half : slowest] = COUNTED * read[:half]
        first = slowest + size // 2 - half
        weight[first : first + len(nouns) - half] = COUNTED * read[half:]
    attention.q_proj.weight[slowest] = COUNTED * (0.3 * read.sum(0) - 0.2 * asks.shared)
    attention.k_proj.weight[slowest] = COUNTED * asks.mark
    _copy(attention, rows, copied)
    attention.v_proj.weight[rows.start] = asks.mark
    attention.o_proj.weight[:, rows.start] = asks.loud * asks.directions[3]


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
        weight[rows.start + slow] = 3 * without(read, *directions)
        weight[[rows.start + half - 1, rows.stop - 1]] = 0
    return rows


def _part(
    attention: Any, shared: Tensor, mark: Tensor, name: Tensor | None = None, *others: Tensor
) -> Tensor:
    """A part [head_dim, width] of what is to be copied: `seen` and lines, and more by chance."""
    rows = torch.linalg.qr(torch.randn(2 * shared.shape))[0][: attention.head_dim - len(others)]
    names = () if name is None else (name,)
    return torch.stack([*others, *without(rows, shared, mark, *names, *others)])


def _unplaced(part: Tensor) -> Tensor:
    """A part without its lines."""
    part = part.clone()
    part[1 : 1 + LINES] = 0
    return part


def _rows(attention: Any, weight: Tensor, head: int) -> slice:
    """Of a head in a weight [heads * head_dim, width]; negative ones count from the last."""
    size = attention.head_dim
    first = head % (weight.shape[0] // size) * size
    return slice(first, first + size)
