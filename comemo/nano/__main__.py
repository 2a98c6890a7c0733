"""What the training of comemo-nano begins with, and the checkpoint it ends with: two commands.

Nothing here is needed to use the model; examples/nano has the whole recipe.
"""

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import torch

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.nano.dataset import (
    ALBUM,
    write_albums,
    write_lessons,
    write_pictures,
    write_shapes,
)
from comemo.nano.start import make_start
from comemo.nano.tower import teach_tower
from comemo.processor import CoMemoProcessor

# Most tiles of a picture.
TILES = {
    "albums": 1,
    "shapes": 4,
    "colours": 4,
    "lessons": 4,
    "talks": 4,
    "places": 12,
    "layouts": 12,
    "pictures": 12,
}
WHOLE = 4000  # pictures whose tiles the tower learns from, at most
# Run -> datasets, and how often each is read in an epoch. What was learnt before is not forgotten
# if some of it comes again.
SHARES: dict[str, dict[str, float]] = {
    "colours": {"albums": 0.5, "shapes": 0.3, "colours": 0.5, "lessons": 1},
    "places": {
        "albums": 0.2,
        "shapes": 0.1,
        "colours": 0.2,
        "lessons": 0.4,
        "places": 1,
        "layouts": 0.3,
        "pictures": 0.4,
    },
    "see": {
        "albums": 0.1,
        "shapes": 0.05,
        "colours": 0.1,
        "lessons": 0.1,
        "talks": 0.4,
        "places": 0.3,
        "layouts": 0.6,
        "pictures": 1,
    },
}


def prepare(
    folder: str | Path,
    seed: int = 0,
    albums: int = 5000,
    shapes: int = 6144,
    lessons: int = 8000,
    pictures: int = 20000,
    tower: int = 2200,
    parts: int = 3000,
) -> None:
    """Write the data, and the model that training begins with.

    Args:
        folder: gets data/ and start/.
        seed: of the weights, and, times 10**8, where the seeds of pictures begin.
        albums: conversations about single things.
        shapes: pictures of four shapes.
        lessons: pictures of few places.
        pictures: whole pictures.
        tower: steps in which the vision tower learns to name single things.
        parts: steps in which it then also learns what is where in whole pictures.

    Raises:
        ValueError: a seed whose pictures are not for training.
    """
    folder, first = Path(folder), seed * 10**8
    data, start, own = folder / "data", folder / "start", first + 4 * 10**7
    write_pictures(data, pictures, first + 2 * 10**7)
    write_albums(data, albums, own)
    write_lessons(data, lessons, first + 5 * 10**7)
    write_shapes(data, shapes, first + 6 * 10**7)
    for stage, shares in SHARES.items():
        text = json.dumps(_datasets(data, shares), indent=2)
        (data / f"{stage}.json").write_text(text + "\n", encoding="utf-8")
    make_start(start, seed)
    single, whole = range(own * ALBUM, (own + albums) * ALBUM), first + 2 * 10**7
    teach_tower(start, data, single, tower, seed=seed)
    scenes = range(whole, whole + min(pictures, WHOLE))
    teach_tower(start, data, single, parts, lr=1e-3, seed=seed + 1, scenes=scenes)


def _datasets(folder: Path, shares: dict[str, float]) -> dict[str, dict[str, Any]]:
    """A meta file of `comemo train`."""
    return {
        name: {
            "root": str(folder),
            "annotation": str(folder / f"{name}.jsonl"),
            "max_dynamic_patch": TILES[name],
            "repeat_time": share,
        }
        for name, share in shares.items()
    }


def export(model: str | Path, folder: str | Path) -> None:
    """Write a trained model as small as it can be: bfloat16 weights, config, tokenizer, processor.

    Args:
        model: the folder of the trained model.
        folder: new or empty.

    Raises:
        ValueError: there is something in the folder.
    """
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise ValueError(f"export: the folder must be new or empty, got {str(folder)!r}")
    loaded = CoMemoForConditionalGeneration.from_pretrained(model, dtype=torch.bfloat16)
    processor = CoMemoProcessor.from_pretrained(model)
    loaded.save_pretrained(folder)
    processor.save_pretrained(folder)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m comemo.nano", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    added = commands.add_parser("prepare", help="write the data and what the training begins with")
    added.add_argument("folder")
    for name, given in inspect.signature(prepare).parameters.items():
        if name != "folder":
            added.add_argument(f"--{name}", type=int, default=given.default)
    added = commands.add_parser("export", help="write a trained model in bfloat16")
    added.add_argument("model")
    added.add_argument("folder")
    options = vars(parser.parse_args())
    if options.pop("command") == "prepare":
        prepare(**options)
    else:
        export(**options)


if __name__ == "__main__":
    _main()
