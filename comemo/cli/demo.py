"""`comemo demo`: everything but a trained model, made on the spot and shown at work."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import comemo_kernels as ops
from bench.counting import count_calls
from comemo import images, prompts
from comemo.chat.streamers import TokenClock
from comemo.cli.device import default_device
from comemo.cli.progress import AnswerStreamer
from comemo.cli.terminal import plain, tell
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.safety.regular import check_path
from comemo.tiny_checkpoint import ADDED_TOKENS, RENAMED_TOKENS, make_checkpoint
from comemo.tokenizer import InternLM2Tokenizer
from comemo_kernels import ImageMemory

QUESTIONS = ("What is in this picture?", "Who is on the boat?")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class RecomputedMemory(ImageMemory):
    """An image memory that keeps no keys and values.

    Each mixin layer then projects the whole memory again for every token, as the published code
    does: to compare with.
    """

    keeps = False

    @classmethod
    def of(cls, memory: ImageMemory) -> "RecomputedMemory":
        """The same images, nothing built.

        Args:
            memory: one that has its media.

        Returns:
            A memory over the same tensors.

        Raises:
            ValueError: it has none.
        """
        if memory.media is None:
            raise ValueError("RecomputedMemory.of: wanted a memory with its media, got None")
        held = {f.name: getattr(memory, f.name) for f in fields(ImageMemory)}
        return cls(**{**held, "keys": {}, "values": {}})

    def update(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Forget them."""


def draw_picture(width: int = 1024, height: int = 768) -> Image.Image:
    """Paint a harbour in the evening.

    Args:
        width, height: in pixels.

    Returns:
        A picture of mode RGB, always the same.
    """
    image = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(image)
    horizon = round(0.6 * height)
    for y in range(horizon):
        t = y / horizon
        pen.line((0, y, width, y), (round(60 + 190 * t), round(70 + 90 * t), round(140 - 60 * t)))
    sun = (0.63 * width, 0.36 * height, 0.77 * width, 0.54 * height)
    pen.ellipse(sun, (255, 220, 130))
    for y in range(horizon, height):
        t = (y - horizon) / (height - horizon)
        pen.line((0, y, width, y), (round(120 - 90 * t), round(90 - 50 * t), round(120 - 40 * t)))
    hill = [(0.0, 0.6), (0.0, 0.5), (0.15, 0.42), (0.3, 0.52), (0.45, 0.6)]
    hull = [(0.22, 0.78), (0.5, 0.78), (0.45, 0.85), (0.27, 0.85)]
    sail = [(0.35, 0.4), (0.35, 0.76), (0.5, 0.76)]
    for shape, colour in ((hill, (40, 60, 50)), (hull, (70, 40, 30)), (sail, (200, 50, 50))):
        pen.polygon([(u * width, v * height) for u, v in shape], colour)
    return image


def run(
    image: str | Path | None = None,
    tiles: int = 12,
    tokens: int = 16,
    seed: int = 0,
    keep: str | Path | None = None,
) -> None:
    """Make a checkpoint, ask it about a picture, and print what happens.

    Args:
        image: path of a picture; None for one that is drawn here.
        tiles: most tiles.
        tokens: length of each answer.
        seed: of the weights and the answers.
        keep: directory for the checkpoint and the drawn picture; None for a temporary one.

    Raises:
        ValueError: a bad picture, or a limit out of range; `keep` holds other files or is not
            UTF-8.
        FileNotFoundError: there is no such picture.
    """
    if keep is not None:
        check_path("run", keep)
    picture = draw_picture() if image is None else images.open_image(image)
    pixel_values, grid = images.load_image(picture, max_num=tiles)
    if keep is not None and Path(keep).exists() and any(Path(keep).iterdir()):
        raise ValueError(f"run: wanted an empty or new directory to keep, got {str(keep)!r}")
    tell(
        "CoMemo demo: a tiny model with random weights. Nothing is trained, so the words are noise;"
        "\nthe way from the picture to the words is the real one.\n\n1. Checkpoint"
    )
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary if keep is None else keep)
        start = time.perf_counter()
        make_checkpoint(directory, seed)
        tokenizer = InternLM2Tokenizer.from_pretrained(directory)
        model = CoMemoForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        model = model.to(default_device())
        seconds = time.perf_counter() - start
    tell(
        f"   {model.num_parameters() / 1e6:.1f} million parameters in the published layout, made"
        f" and loaded in {seconds:.1f} s"
    )
    if keep is not None:
        kept = plain(keep)
        picture.save(directory / "picture.png")
        tell(
            f'   kept: try  comemo chat {kept} "{QUESTIONS[0]}" --sample --max-new-tokens 20 \\'
            f"\n              --image {kept}/picture.png"
        )
    name = "a picture drawn here" if image is None else plain(Path(image).name)
    _show_tiling(model.config, name, picture.size, grid)
    _show_conversation(model, tokenizer, pixel_values, grid, tokens, seed)


def _show_tiling(config: Any, name: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    cols, rows = grid
    spent, total = config.side**2, ops.image_tokens(grid, config.side)
    count = total // spent
    tell(
        f"\n2. Tiling\n   {name}, {size[0]} x {size[1]} px -> grid {cols} x {rows},"
        f" {count} {'tiles, the thumbnail included' if count > 1 else 'tile'}"
        f"\n   {count} x {spent} = {total:,} image tokens\n\n3. Positions (RoPE-DHR)"
    )
    if count > 1:
        tell(
            f"   A tile's token has the id of the thumbnail cell over the same place. These are the"
            f"\n   {config.side} x {config.side} cells with the letter of the tile that shares most"
            " of their ids; tiles are\n   lettered row by row.\n"
        )
        here, published = (cell_letters(grid, config.side, order) for order in ("row", "column"))
        width = 2 * config.side + 9
        tell(f"   {'tile_order row (new models)':{width}}tile_order column (as published)")
        for left, right in zip(here, published, strict=True):
            tell(f"   {left:{width}}{right}")
        tell()
    tell(f"   position ids spent: {spent}; with plain numbering: {total:,}")


def cell_letters(grid: tuple[int, int], side: int, tile_order: str) -> list[str]:
    """Draw the thumbnail's raster in letters.

    Args:
        grid: (cols, rows) of more than one tile.
        side: tokens along the side of a tile.
        tile_order: "row" or "column".

    Returns:
        `side` lines; a cell shows which tile has the most tokens with its id.
    """
    tiles = grid[0] * grid[1]
    ids = ops.image_position_ids(grid, side, tile_order, thumbnail=False).view(tiles, -1)
    shares = torch.stack([tile.bincount(minlength=side * side) for tile in ids])
    letters = [_LETTERS[t % len(_LETTERS)] for t in shares.argmax(0).tolist()]
    return [" ".join(letters[row * side : (row + 1) * side]) for row in range(side)]


def _show_conversation(
    model: Any, tokenizer: Any, pixel_values: Tensor, grid: tuple[int, int], tokens: int, seed: int
) -> None:
    mixins = [layer.mixin for layer in model.model.language_model.layers if layer.mixin is not None]
    # Words only: neither control tokens nor single bytes.
    first, last = len(tokenizer) - len(ADDED_TOKENS), len(tokenizer)
    wordless = [*range(3 + len(RENAMED_TOKENS) + 256), *range(first, last)]
    options = {"max_new_tokens": tokens, "suppress_tokens": wordless, "do_sample": True}

    def ask(turns: Sequence[prompts.Turn], memory: ImageMemory | None, clock: Any) -> Any:
        """The answer's ids, and the memory that it was read from."""
        input_ids, mask = _encode(model, tokenizer, turns, pixel_values.shape[0])
        if memory is None:
            ids = model.model.prompt_position_ids(mask, torch.ones_like(input_ids), [grid])
            memory = model.model.build_image_memory(pixel_values, mask, ids, [grid])
        torch.manual_seed(seed + len(turns))
        output = model.generate(
            input_ids, tile_grid=[grid], image_memory=memory, streamer=clock, **options
        )
        return output[0, input_ids.shape[1] :].tolist(), memory

    first_turn: list[prompts.Turn] = [(prompts.with_image_mark(QUESTIONS[0]), None)]
    tell(f"\n4. Answer\n   Q: {QUESTIONS[0]}\n   A: ", end="")
    with (
        torch.no_grad(),
        count_calls([ops], "build_memory") as whole,  # all layers at once
        count_calls(mixins, "build") as built,
    ):
        kept = TokenClock(_answer_streamer(model, tokenizer))
        answer, memory = ask(first_turn, None, kept)
        builds_kept = built[0] + len(mixins) * whole[0]
        rebuilt = TokenClock()
        again, _ = ask(first_turn, RecomputedMemory.of(memory), rebuilt)
        builds_rebuilt = built[0] + len(mixins) * whole[0] - builds_kept
    tell(
        f"   first token after {kept.first:.2f} s\n\n5. Image memory\n   keys and values of"
        f" {len(memory):,} image tokens in {len(mixins)} mixin layers: {memory.nbytes / 1e6:.1f} MB"
        f"\n\n   {'':28}times built   ms per token"
    )
    for name, builds, clock in (
        ("kept in the memory", builds_kept, kept),
        ("built anew, as published", builds_rebuilt, rebuilt),
    ):
        tell(f"   {name:28}{builds:11}   {1000 * clock.per_token:12.1f}")
    tell(
        f"\n   both ways give the same {tokens} tokens: {'yes' if answer == again else 'NO'}"
        f"\n\n6. Second question, same memory\n   Q: {QUESTIONS[1]}\n   A: ",
        end="",
    )
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    turns = [(first_turn[0][0], prompts.escape(text, tokenizer)), (QUESTIONS[1], None)]
    with (
        torch.no_grad(),
        count_calls([ops], "build_memory") as whole,
        count_calls(mixins, "build") as built,
        count_calls([model.model], "project_images") as seen,
    ):
        second = TokenClock(_answer_streamer(model, tokenizer))
        ask(turns, memory, second)
    tell(
        f"   first token after {second.first:.2f} s: vision tower run {seen[0]} times, keys and"
        f" values built {built[0] + len(mixins) * whole[0]} times"
    )


def _encode(
    model: Any, tokenizer: Any, turns: Sequence[prompts.Turn], tiles: int
) -> tuple[Tensor, Tensor]:
    """Ids [1, N] of a conversation about one picture, and where its image tokens are."""
    prompt = prompts.build_prompt(turns, model.config.template)
    prompt = prompts.expand_images(prompt, [tiles * model.config.tokens_per_tile])
    input_ids = torch.tensor([prompts.encode_prompt(tokenizer, prompt)], device=model.device)
    return input_ids, model.model.find_image_tokens(input_ids)


def _answer_streamer(model: Any, tokenizer: Any) -> AnswerStreamer:
    return AnswerStreamer(tokenizer, prompts.stop_text(model.config.template))
