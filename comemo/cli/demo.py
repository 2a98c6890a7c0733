"""`comemo demo`: ask nano about a picture that was never drawn before, and show what saves time."""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

import comemo_kernels as ops
from comemo import images
from comemo.chat.session import ChatSession
from comemo.cli.arguments import NANO, find_checkpoint, shipped_checkpoint
from comemo.cli.checkpoints import load_checkpoint
from comemo.cli.demo_savings import show_rebuilding, show_store
from comemo.cli.draw import choose_seed, save_picture
from comemo.cli.image_map import cell_letters
from comemo.cli.preview import show_preview
from comemo.cli.terminal import plain, tell
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.nano.drawing import draw
from comemo.nano.showing import one_of_each_kind, shown_questions, shown_scene
from comemo.nano.words import COLOURS, SHAPES, WORDS
from comemo.processor import CoMemoProcessor
from comemo.safety.regular import check_path

DESCRIBE = "Describe the picture."
TAUGHT = (
    f"It was taught drawn pictures alone: {len(SHAPES)} shapes in {len(COLOURS)} colours,"
    f" {len(WORDS)} words, letters, numbers of two\ndigits, signs, bar charts, forms and marks on"
    " grids. Photographs are beyond it. About one in\nten of its answers is wrong, see"
    " docs/nano.md."
)


@dataclass(frozen=True)
class Shown:
    """A picture and what to ask about it.

    Attributes:
        picture: an RGB image.
        name: for people.
        asked: (question, right answer) pairs; None for an answer that nobody knows.
    """

    picture: Image.Image
    name: str
    asked: list[tuple[str, str | None]]


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status.

    Raises:
        ValueError: a bad image, question or option; there is no checkpoint.
        OSError: there is no such image; a picture of `--keep` exists already.
    """
    if args.question is not None and not args.question.strip():
        raise ValueError("the question is empty")
    if args.image is not None and (args.seed is not None or args.keep is not None):
        raise ValueError("--seed and --keep are for a drawn picture, not for --image")
    if args.keep is not None:
        check_path("demo", args.keep)
    given = None if args.image is None else images.open_image(args.image)
    # A directory "nano" of somebody else must not break `make demo`.
    directory = shipped_checkpoint() if args.model == NANO else find_checkpoint(args.model)
    start = time.perf_counter()
    model, processor = load_checkpoint(directory)
    tell(
        f"comemo-nano: {model.num_parameters() / 1e6:.1f} million parameters, loaded in"
        f" {time.perf_counter() - start:.1f} s, on {model.device}.\n{TAUGHT}\n"
    )
    if given is not None:
        shown = Shown(given, plain(Path(args.image).name), [(args.question or DESCRIBE, None)])
        tell("1. Your picture")
    else:
        shown = _draw(choose_seed(args.seed), args.keep, args.question)
    show_preview(shown.picture)
    config = model.config
    most = args.tiles or config.max_dynamic_patch
    tiles = images.load_image(shown.picture, config.vision_config.image_size[0], most)
    tell(f"   {shown.name}\n   {_tiling(config, shown.picture, tiles[1])}")
    _show_all(model, processor, shown, tiles)
    return 0


def _draw(seed: int, keep: str | None, question: str | None) -> Shown:
    """A picture, written to a file, and its questions."""
    scene = shown_scene(seed)
    picture = draw(scene)
    # A new folder, which nobody else can have prepared. It stays, so that the picture can be
    # looked at after the demo; the system removes its temporary files by itself.
    folder = Path(tempfile.mkdtemp(prefix="comemo-") if keep is None else keep)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"picture-{seed}.png"
    save_picture(picture, path)
    tell(f"1. A picture that it has never seen (comemo demo --seed {seed} draws it again)")
    asked: list[tuple[str, str | None]] = [(question or "", None)]
    if question is None:
        asked = [(one.text, one.answer) for one in one_of_each_kind(shown_questions(scene))]
    return Shown(picture, plain(path), asked)


def _tiling(config: CoMemoConfig, picture: Image.Image, grid: tuple[int, int]) -> str:
    spent, total = config.side**2, ops.image_tokens(grid, config.side)
    count = total // spent
    kinds = f"{count} tiles, the thumbnail among them" if count > 1 else "1 tile"
    return (
        f"{picture.width} x {picture.height} px -> grid {grid[0]} x {grid[1]}, {kinds},"
        f" {count} x {spent} = {total:,} image tokens"
    )


def _show_all(
    model: CoMemoForConditionalGeneration,
    processor: CoMemoProcessor,
    shown: Shown,
    tiles: tuple[Tensor, tuple[int, int]],
) -> None:
    session = ChatSession(model, processor, max_new_tokens=64, do_sample=False)
    tell("\n2. Questions, in one conversation")
    reports, right = [], 0
    for index, (question, truth) in enumerate(shown.asked):
        start = time.perf_counter()
        answer = session.ask(question, tiles if index == 0 else None)
        seconds = time.perf_counter() - start
        reports.append(session.report)
        mark = ""
        if truth is not None:
            right += answer == truth
            mark = f"truth: {truth}, {'right' if answer == truth else 'WRONG'}, "
        tell(f"   Q: {plain(question)}\n   A: {plain(answer)}   ({mark}{seconds:.2f} s)")
    if shown.asked[0][1] is not None:
        tell(f"   {right} of {len(shown.asked)} right; comemo eval {NANO} counts it on 1,000")
    first, last = reports[0], reports[-1]
    assert first is not None
    assert last is not None
    tell(
        "\n3. A question reads its own tokens alone\n   The first question read"
        f" {first.read_tokens:,} of {first.prompt_tokens:,} prompt tokens"
        + (", the picture's among them" if len(reports) > 1 else "")
    )
    if len(reports) > 1:
        tell(
            f"   The last one read {last.read_tokens:,} of {last.prompt_tokens:,}: KV cache and"
            " image memory hold the others"
        )
    question = shown.asked[0][0]
    show_store(model, processor, question, tiles)
    show_rebuilding(model, processor, question, tiles)
    _show_positions(model.config, tiles[1])


def _show_positions(config: CoMemoConfig, grid: tuple[int, int]) -> None:
    spent, total = config.side**2, ops.image_tokens(grid, config.side)
    tell("\n6. Positions (RoPE-DHR)")
    if total > spent:
        tell(
            f"   A tile's token has the id of the thumbnail cell at the same place. Below: the"
            f"\n   {config.side} x {config.side} cells, each with the letter of the tile that"
            " shares most of its ids;\n   tiles are lettered row by row.\n"
        )
        here, published = (cell_letters(grid, config.side, order) for order in ("row", "column"))
        width = 2 * config.side + 22
        tell(f"   {'tile_order row (ours)':{width}}tile_order column (as published)")
        for left, right in zip(here, published, strict=True):
            tell(f"   {left:{width}}{right}")
        tell()
    tell(f"   position ids used: {spent}; with plain numbering: {total:,}")
