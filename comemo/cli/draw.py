"""`comemo draw`: a picture that comemo-nano was not taught with, and questions about it."""

import argparse
import io
import os
import secrets
import uuid
from pathlib import Path

from PIL import Image

from comemo.cli.preview import show_preview
from comemo.cli.terminal import plain, tell
from comemo.nano.drawing import draw
from comemo.nano.showing import shown_questions, shown_scene
from comemo.safety.regular import check_regular


def choose_seed(given: int | None) -> int:
    """The seed of `--seed`, or a new one that is short enough to be typed."""
    return secrets.randbelow(10**6) if given is None else given


def run(args: argparse.Namespace) -> int:
    """Write the picture, print its questions; returns the exit status.

    Raises:
        ValueError, OSError: see `save_picture`.
    """
    seed = choose_seed(args.seed)
    if os.path.lexists(args.path) and not args.force:
        raise ValueError(f"draw: {args.path!r} exists; --force replaces it")
    scene = shown_scene(seed, args.layout)
    image = draw(scene)
    save_picture(image, args.path, args.force)
    show_preview(image)
    layout = "" if args.layout is None else f" --layout {args.layout}"
    tell(f"{plain(args.path)}: {image.width} x {image.height} px, --seed {seed}{layout}")
    for question in shown_questions(scene):
        tell(f"  {question.text}  {question.answer}")
    return 0


def save_picture(image: Image.Image, path: str | Path, force: bool = False) -> None:
    """Write a picture as a PNG file.

    Args:
        image: to write.
        path: of the file, ending in .png.
        force: whether to replace a file that exists.

    Raises:
        ValueError: a path that does not end in .png, or is a pipe, a device or a directory.
        FileExistsError: there is a file, and no `force`.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"save_picture: path must be a file ending in .png, got {str(path)!r}")
    if force and path.exists():
        check_regular("save_picture", path)
    if not force:
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        with open(path, "xb") as file:  # fails if there is a file, even a new one
            file.write(encoded.getbuffer())
        return
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        image.save(part, "PNG")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
