"""Teach the vision tower of comemo-nano to name what a tile shows, before it meets text.

CoMemo begins with a tower that was trained before, InternViT. Without one, a language model learns
to read a tile from all its tokens together, and then cannot find the tile that has a given thing:
no token by itself says what is in its tile. So here each image token alone must name it.
"""

from collections import Counter
from collections.abc import Callable
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.image_processor import CoMemoImageProcessor
from comemo.nano.dataset import ALBUM, album_item, reduce
from comemo.nano.drawing import GROUNDS_OF_ONE, draw_ground, draw_parts
from comemo.nano.heads import mark_images
from comemo.nano.parts import DIGITS, GRID, SIDE, words_of_tiles
from comemo.nano.scenes import Item, make_scene
from comemo.processor import CoMemoProcessor
from comemo_kernels import fold_tiles

EMPTY, MOSAIC = 0.08, 0.25  # shares of tiles that show nothing, and four small things
SHARP = 20.0  # logits are this times the cosine of image tokens and embeddings of words
LENGTH = 0.1  # weight of the loss for image tokens that are not as long as words
MOST = 24  # ids that name a thing, at most
SHARES = {"shape": 2, "word": 6, "letter": 2, "number": 3}  # how often things are shown
# How often tiles of pictures are shown: that say at most two words, of "objects", others.
LITTLE, OBJECTS, OTHERS = 0.1, 0.5, 2.0
TILES = 12  # of a picture, at most


def teach_tower(
    start: str | Path,
    data: str | Path,
    pictures: range,
    steps: int = 2200,
    batch: int = 128,
    lr: float = 1.5e-3,
    seed: int = 0,
    scenes: range = range(0),
    say: Callable[[str], None] = print,
) -> None:
    """Train the tower and the projector of a model in place.

    Args:
        start: of `make_start`.
        data: a folder with the albums of `write_albums`.
        pictures: seeds of their pictures.
        steps, batch, lr: of the training.
        seed: of the order.
        scenes: seeds of whole pictures. If there are any, half of a batch are tiles of them.
        say: told of the progress.
    """
    model = CoMemoForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    processor = CoMemoProcessor.from_pretrained(start)
    items = [album_item(own)[0] for own in pictures]
    counts = Counter(item.kind for item in items)
    shares = torch.tensor([SHARES[item.kind] / counts[item.kind] for item in items])
    empty = round(len(items) * EMPTY)
    shares = torch.cat([shares, torch.full((empty,), EMPTY * shares.sum() / empty)])
    tiles = _read(Path(data) / "albums", pictures, empty)
    vocabulary = Vocabulary(processor.tokenizer)
    said = [words for item in [*items, *[None] * empty] for words in _said(item)]
    names = vocabulary.number(said).view(len(tiles), GRID + 1, MOST)
    if scenes:
        batch //= 2
        cut, shown, often = _cut(scenes, vocabulary)
    named = torch.tensor(list(vocabulary.places))
    trained = [
        weight
        for name, weight in model.named_parameters()
        if "vision" in name or "projector" in name
    ]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    words = model.get_input_embeddings().weight.detach()
    losses = []
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # faster, as all steps have the same shapes
    try:
        with sdpa_kernel(SDPBackend.MATH):
            for step in range(1, steps + 1):
                pixels, ids = make_batch(tiles, names, shares, batch, generator)
                if scenes:
                    chosen = torch.multinomial(often, batch, batch > len(cut), generator=generator)
                    pixels = torch.cat([pixels, cut[chosen]])
                    ids = torch.cat([ids, shown[chosen]])
                loss = _loss(_image_tokens(model, processor, pixels), words, named, ids)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                if step % 50 == 0 or step == steps:
                    say(f"tower {step}/{steps}  loss {sum(losses) / len(losses):.3f}")
                    losses = []
    finally:
        torch.set_float32_matmul_precision(precision)
    mark_images(model)
    model.save_pretrained(start)


def _loss(seen: Tensor, words: Tensor, named: Tensor, ids: Tensor) -> Tensor:
    """What is between image tokens and the embeddings of the words that name what they show.

    Args:
        seen: image tokens [batch, tokens, width].
        words: embeddings [vocabulary, width].
        named: ids of words that name anything.
        ids: int64 [batch, tokens, most], in `named`: of those that name it; -1 fills.
    """
    shared = F.normalize(words.mean(0), dim=0)  # says nothing
    seen, words = (x - (x @ shared)[..., None] * shared for x in (seen, words[named]))
    found = SHARP * F.normalize(seen, dim=-1) @ F.normalize(words, dim=-1).T
    own = found.log_softmax(-1).gather(-1, ids.clamp(min=0)).where(ids >= 0, 0.0)
    count = (ids >= 0).sum(-1)
    unlike = -(own.sum(-1) / count + count.log())  # about 0 if nothing else is likely
    length = seen.norm(dim=-1) / words.norm(dim=-1).mean()
    return unlike.mean() + LENGTH * (length - 1).square().mean()


def make_batch(
    tiles: Tensor, names: Tensor, shares: Tensor, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tiles, some of them with four small things, and what each of their tokens shows.

    Args:
        tiles: uint8 [things, side, side, 3].
        names: int64 [things, grid + 1, most]: what names the thing in each column, and a small one.
        shares: float [things]: how often each is chosen, relative to others; at most once if there
            are enough.
        batch: tiles.
        generator: chooses.

    Returns:
        uint8 [batch, side, side, 3]; int64 [batch, tokens, most].
    """
    few = round(batch * MOSAIC)
    count = batch + 3 * few
    again = count > (shares > 0).sum()  # there are too few things
    chosen = torch.multinomial(shares, count, bool(again), generator=generator)
    one, four = chosen[: batch - few], chosen[batch - few :].view(few, 2, 2)
    small = tiles[four][..., ::2, ::2, :].float() + tiles[four][..., 1::2, 1::2, :]
    small = (small / 2).to(torch.uint8)  # [few, 2, 2, side / 2, side / 2, 3]
    small = small.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)
    whole = names[one, :GRID].repeat(1, GRID, 1)
    parts = names[four, GRID].repeat_interleave(GRID // 2, 1).repeat_interleave(GRID // 2, 2)
    return torch.cat([tiles[one], small]), torch.cat([whole, parts.flatten(1, 2)])


def _image_tokens(model: Any, processor: CoMemoProcessor, pixels: Tensor) -> Tensor:
    """uint8 [B, side, side, 3] -> [B, tokens, width]."""
    images = processor.image_processor
    mean, std = torch.tensor(images.image_mean), torch.tensor(images.image_std)
    x = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    x = model.get_image_features(x).last_hidden_state[:, 1:]
    x = x.unflatten(1, (round(x.shape[1] ** 0.5), -1))
    x = fold_tiles(x, model.config.downsample_ratio, model.config.ps_version)
    return model.model.multi_modal_projector(x.flatten(1, 2))


def _read(folder: Path, pictures: range, empty: int) -> Tensor:
    """uint8 [things, side, side, 3]: the pictures of albums, and tiles that show nothing."""
    with get_context("spawn").Pool() as pool:
        paths = [f"{folder}/{own // ALBUM}{'abcdefghijkl'[own % ALBUM]}.jpg" for own in pictures]
        found = pool.map(_read_one, paths, chunksize=256)
        found += pool.map(_draw_empty, [f"ground {index}" for index in range(empty)])
    tiles = torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8)
    return tiles.view(-1, SIDE, SIDE, 3)


def _read_one(path: str) -> bytes:
    with Image.open(path) as image:
        return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).tobytes()


def _draw_empty(name: str) -> bytes:
    random = Random(name)
    return draw_ground(random, random.choice(GROUNDS_OF_ONE), (SIDE, SIDE)).tobytes()


def _cut(scenes: range, vocabulary: "Vocabulary") -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of whole pictures.

    Returns:
        uint8 [tiles, side, side, 3]; what each token shows, int64 [tiles, tokens, most]; float
        [tiles]: how often each is chosen.
    """
    with get_context("spawn").Pool() as pool:
        found = pool.map(_cut_one, scenes, chunksize=32)
    pixels = bytearray(b"".join(own for own, _, _ in found))
    tiles = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, SIDE, SIDE, 3)
    said = [words for _, one, _ in found for tile in one for words in tile]
    often = [
        LITTLE if len({*chain(*tile)}) < 3 else OBJECTS if objects else OTHERS
        for _, one, objects in found
        for tile in one
    ]
    return tiles, vocabulary.number(said).view(len(tiles), GRID * GRID, MOST), torch.tensor(often)


def _cut_one(seed: int) -> tuple[bytes, list[list[list[str]]], bool]:
    torch.set_num_threads(1)
    scene = make_scene(seed)
    image, parts = draw_parts(scene)
    processor = CoMemoImageProcessor(input_size=SIDE, do_rescale=False, do_normalize=False)
    cut = processor(reduce(image), max_num=TILES)
    words = words_of_tiles(parts, image.size, tuple(cut["tile_grid"][0].tolist()))
    pixels = cut["pixel_values"].permute(0, 2, 3, 1).round().to(torch.uint8)
    return pixels.numpy().tobytes(), words, scene.layout == "objects"


class Vocabulary:
    """Numbers for the words that name anything, as they come.

    Args:
        tokenizer: of the model.

    Attributes:
        places: id of the tokenizer -> number.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._known = tokenizer, dict[str, list[int]]()
        self.places: dict[int, int] = {}

    def number(self, said: list[list[str]]) -> Tensor:
        """int64 [len(said), most] of numbers; -1 fills."""
        rows = []
        for words in said:
            row: list[int] = []
            for word in words:
                if word not in self._known:
                    ids = _ids(word, self._tokenizer)
                    self._known[word] = [self.places.setdefault(i, len(self.places)) for i in ids]
                row += self._known[word]
            rows.append((row + [-1] * MOST)[:MOST])
        return torch.tensor(rows)


def _said(item: Item | None) -> list[list[str]]:
    """The words that name a thing in each column of its tile, and a small one."""
    if item is None:
        return [["nothing"]] * (GRID + 1)
    if item.kind == "shape":
        return [[item.kind, item.colour, item.text]] * (GRID + 1)
    small = [item.kind, item.colour]  # too small to be read
    if item.kind == "letter":
        return [[*small, item.text]] * GRID + [small]
    if item.kind == "number":  # a digit on either side
        digits = [[*small, digit, at] for digit, at in zip(item.text, DIGITS, strict=True)]
        return [digits[column // (GRID // 2)] for column in range(GRID)] + [small]
    columns = []
    for column in range(GRID):
        # Text takes about three quarters of the width.
        middles = [0.5 + 0.77 * ((i + 0.5) / len(item.text) - 0.5) for i in range(len(item.text))]
        letters = [
            letter
            for letter, x in zip(item.text, middles, strict=True)
            if column / GRID - 0.06 < x < (column + 1) / GRID + 0.06
        ]
        # The word counts twice: it is what is asked for.
        columns.append([*small, item.text, item.text, *dict.fromkeys(letters)])
    return [*columns, small]


def _ids(word: str, tokenizer: Any) -> list[int]:
    """Two ids of a word: as an answer begins with it, and after a space; those that are one token.

    Two equal ones if there is one: each word counts alike.
    """
    spaced = tokenizer("a " + word, add_special_tokens=False)["input_ids"][1:]
    first = tokenizer(word, add_special_tokens=False)["input_ids"]
    ids = [own[0] for own in (first, spaced) if len(own) == 1]
    return ids * (2 // len(ids))
