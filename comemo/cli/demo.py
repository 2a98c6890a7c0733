"""`comemo demo`: make an untrained tiny model and run a conversation about an image, offline."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

import comemo_kernels as ops
from comemo import images, prompts
from comemo.chat.session import ChatSession
from comemo.cli.arguments import number
from comemo.cli.info import memory_numbers
from comemo.cli.progress import AnswerStreamer
from comemo.cli.terminal import plain, tell
from comemo.cli.tiny_checkpoint import make_checkpoint
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.device import default_device
from comemo.processing.new_tokenizer import RENAMED_TOKENS
from comemo.processor import CoMemoImageProcessor, CoMemoProcessor
from comemo.safety.regular import check_path
from comemo.tokenizer import ADDED_TOKENS, InternLM2Tokenizer

SUMMARY = "run a whole conversation, offline, on an untrained tiny model"
QUESTIONS = ("What is in this picture?", "Who is on the boat?")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.add_argument("--image", metavar="PATH", help="default: an image that is drawn")
    parser.add_argument("--tiles", type=number(int, 1, 40), default=12, metavar="N", help="at most")
    parser.add_argument("--tokens", type=number(int, 1, 1000), default=16, metavar="N")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 2**10), default=0, metavar="N")
    parser.add_argument("--keep", metavar="DIR", help="keep the checkpoint in this new directory")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status.

    Raises:
        ValueError, OSError: see `show`.
    """
    show(args.image, args.tiles, args.tokens, args.seed, args.keep)
    return 0


def draw_picture(width: int = 1024, height: int = 768) -> Image.Image:
    """Draw a harbour in the evening.

    Args:
        width, height: in pixels.

    Returns:
        An image of mode RGB, always the same.
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


def show(
    image: str | Path | None = None,
    tiles: int = 12,
    tokens: int = 16,
    seed: int = 0,
    keep: str | Path | None = None,
) -> None:
    """Make a checkpoint, ask it about an image, and print what happens.

    Args:
        image: path of an image; None for one that is drawn here.
        tiles: most tiles.
        tokens: length of each answer.
        seed: of the weights and the answers.
        keep: directory for the checkpoint and the image; None for a temporary one.

    Raises:
        ValueError: a bad image, or a limit out of range; `keep` holds other files or is not
            UTF-8.
        FileNotFoundError: there is no such image.
    """
    if keep is not None:
        check_path("demo", keep)
    picture = draw_picture() if image is None else images.open_image(image)
    pixel_values, grid = images.load_image(picture, max_num=tiles)
    if keep is not None and Path(keep).exists() and any(Path(keep).iterdir()):
        raise ValueError(f"demo: wanted an empty or new directory to keep, got {str(keep)!r}")
    tell(
        "CoMemo demo: a tiny model with random weights. It is not trained, so the answers are"
        " noise;\nall steps from the image to the answer are the real ones.\n\n1. Checkpoint"
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
    name = "an image drawn here" if image is None else plain(Path(image).name)
    _show_tiling(model.config, name, picture.size, grid)
    processor = CoMemoProcessor(CoMemoImageProcessor(), tokenizer)
    session = ChatSession(model, processor, **_options(tokenizer, tokens))
    _show_conversation(session, (pixel_values, grid), seed)


def _show_tiling(
    config: CoMemoConfig, name: str, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    cols, rows = grid
    spent, total = config.side**2, ops.image_tokens(grid, config.side)
    count = total // spent
    tell(
        f"\n2. Tiling\n   {name}, {size[0]} x {size[1]} px -> grid {cols} x {rows},"
        f" {count} {'tiles including the thumbnail' if count > 1 else 'tile'}"
        f"\n   {count} x {spent} = {total:,} image tokens\n\n3. Positions (RoPE-DHR)"
    )
    if count > 1:
        tell(
            f"   A tile's token has the id of the thumbnail cell at the same place. Below: the"
            f"\n   {config.side} x {config.side} cells, each with the letter of the tile that"
            " shares most of its ids;\n   tiles are lettered row by row.\n"
        )
        here, published = (cell_letters(grid, config.side, order) for order in ("row", "column"))
        width = 2 * config.side + 9
        tell(f"   {'tile_order row (new models)':{width}}tile_order column (as published)")
        for left, right in zip(here, published, strict=True):
            tell(f"   {left:{width}}{right}")
        tell()
    tell(f"   position ids used: {spent}; with plain numbering: {total:,}")


def cell_letters(grid: tuple[int, int], side: int, tile_order: str) -> list[str]:
    """Draw the token raster of the thumbnail in letters.

    Args:
        grid: (cols, rows) of more than one tile.
        side: tokens along the side of a tile.
        tile_order: "row" or "column".

    Returns:
        `side` lines; the letter of a cell names the tile with the most tokens of its id.
    """
    tiles = grid[0] * grid[1]
    ids = ops.image_position_ids(grid, side, tile_order, thumbnail=False).view(tiles, -1)
    shares = torch.stack([tile.bincount(minlength=side * side) for tile in ids])
    letters = [_LETTERS[t % len(_LETTERS)] for t in shares.argmax(0).tolist()]
    return [" ".join(letters[row * side : (row + 1) * side]) for row in range(side)]


def _options(tokenizer: InternLM2Tokenizer, tokens: int) -> dict[str, Any]:
    """Options of `generate` for answers of so many tokens, all of them words."""
    control = range(len(tokenizer) - len(ADDED_TOKENS), len(tokenizer))
    bytes_and_specials = range(3 + len(RENAMED_TOKENS) + 256)
    return {
        "max_new_tokens": tokens,
        "suppress_tokens": [*bytes_and_specials, *control],
        "do_sample": True,
    }


def _show_conversation(
    session: ChatSession, image: tuple[torch.Tensor, tuple[int, int]], seed: int
) -> None:
    """Ask both questions and print what each answer took."""
    config = session.model.config
    tokens = len(image[0]) * config.tokens_per_tile
    nbytes = memory_numbers(config, tokens) * session.model.dtype.itemsize
    tell(f"\n4. First question\n   Q: {QUESTIONS[0]}\n   A: ", end="")
    _ask(session, QUESTIONS[0], image, seed)
    tell(
        f"   The image memory, built once: keys and values of {tokens:,} image tokens in"
        f" {len(config.mixin_layers)} mixin layers,\n   {nbytes / 1e6:.1f} MB"
        f"\n\n5. Second question\n   Q: {QUESTIONS[1]}\n   A: ",
        end="",
    )
    _ask(session, QUESTIONS[1], None, seed + 1)
    tell(
        "   KV cache and image memory are reused: no vision tower, no projector, nothing built"
        " anew.\n\nHow much time that saves: `python -m bench decode` compares it with the"
        " published way."
    )


def _ask(session: ChatSession, question: str, image: Any, seed: int) -> None:
    """Print an answer as it comes, and its report."""
    torch.manual_seed(seed)
    stop = prompts.stop_text(session.model.config.template)
    session.ask(question, image, streamer=AnswerStreamer(session.tokenizer, stop))
    report = session.report
    assert report is not None
    tell(
        f"   {report.read_tokens:,} of {report.prompt_tokens:,} prompt tokens read, first token"
        f" after {report.first_s:.2f} s"
    )
