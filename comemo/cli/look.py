"""`comemo look`: where the memory path looks for each word of an answer, over the picture."""

import argparse
import os
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from comemo import images, prompts
from comemo.cli.arguments import find_checkpoint
from comemo.cli.chat import check_text
from comemo.cli.checkpoints import load_tokenizer
from comemo.cli.draw import save_picture
from comemo.cli.info import read_config
from comemo.cli.progress import AnswerStreamer, reading_bar
from comemo.cli.terminal import plain, tell
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.device import parse_device, parse_dtype
from comemo.look.asking import ask_and_look
from comemo.look.sheet import draw_look
from comemo.safety.regular import check_regular
from comemo.safety.settings import GENERATION, check_settings
from comemo.weights.quantising import chosen_weights


def run(args: argparse.Namespace) -> int:
    """Print the answer, write the sheet, print its path; returns the exit status.

    Raises:
        ValueError, OSError: a checkpoint, image, question, path or option that is wrong.
    """
    if not args.question.strip():
        raise ValueError("the question is empty")
    check_text("question", args.question)
    check_output(args.output, args.image)
    name = find_checkpoint(args.model)
    config = read_config(name)
    if args.layers is not None and not {*args.layers} <= {*config.mixin_layers}:
        raise ValueError(f"--layers must be of {[*config.mixin_layers]}, got {args.layers}")
    picture = images.open_image(args.image, published=args.published_pixels)
    pixel_values, grid = _tiles_of(picture, args, config)
    try:
        model, tokenizer = _load(name, config, args)
    except (AttributeError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        # raised by transformers for files with contents that it does not expect
        raise ValueError(f"{name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    with reading_bar(model, len(pixel_values)) as bar:
        stop = prompts.stop_text(config.template)
        look = ask_and_look(
            model,
            tokenizer,
            args.question,
            pixel_values,
            grid,
            rope=args.rope,
            layers=args.layers,
            streamer=AnswerStreamer(tokenizer, stop, before=bar.close),
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
        )
    save_picture(draw_look(picture, look), args.output, force=True)
    tell(plain(args.output))
    return 0


def check_output(path: str, image: str) -> None:
    """Refuse a path that cannot be written, before anything is computed.

    Args:
        path: of the sheet, ending in .png.
        image: of the picture, which must be another file.

    Raises:
        ValueError: another ending, a directory, a pipe or a device, a file in a directory that
            does not exist, or the picture itself.
    """
    wanted = Path(path)
    if wanted.suffix.lower() != ".png" or wanted.is_dir():
        raise ValueError(f"check_output: wanted a file ending in .png, got {path!r}")
    if not wanted.parent.is_dir():
        raise ValueError(f"check_output: wanted an existing directory, got {path!r}")
    if wanted.exists():
        check_regular("check_output", wanted)
        if os.path.exists(image) and os.path.samefile(image, wanted):
            raise ValueError(f"check_output: the sheet would overwrite its picture {path!r}")


def _tiles_of(
    picture: Image.Image, args: argparse.Namespace, config: CoMemoConfig
) -> tuple[Tensor, images.Grid]:
    most = args.max_tiles or config.max_dynamic_patch
    return images.load_image(
        picture,
        config.vision_config.image_size[0],
        most,
        min_num=min(config.min_dynamic_patch, most),
        use_thumbnail=config.use_thumbnail,
        published=args.published_pixels,
    )


def _load(name: str, config: CoMemoConfig, args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    tokenizer = load_tokenizer(name, config)
    dtype = parse_dtype(args.dtype, device := parse_device(args.device))
    model: Any = CoMemoForConditionalGeneration.from_pretrained(
        name, dtype=dtype, **chosen_weights(args.quantize, name)
    )
    check_settings("generation_config", GENERATION, vars(model.generation_config))
    return model.to(device), tokenizer
