"""What the training of comemo-nano begins with, and the checkpoint it ends with: two commands.

Nothing here is needed to use the model; examples/nano has the whole recipe.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.nano.dataset import write_albums, write_lessons, write_pictures
from comemo.nano.start import make_start
from comemo.processor import CoMemoProcessor

TILES = {"albums": 1, "lessons": 4, "pictures": 12}  # most of a picture
# Run -> datasets, and how often each is read in an epoch. What was learnt before is not forgotten
# if some of it comes again.
SHARES: dict[str, dict[str, float]] = {
    "albums": {"albums": 1},
    "lessons": {"albums": 0.5, "lessons": 1},
    "see": {"albums": 0.5, "lessons": 0.6, "pictures": 1},
}


def prepare(folder: str | Path, albums: int, lessons: int, pictures: int, seed: int) -> None:
    """Write the untrained model and the data.

    Args:
        folder: gets start/ and data/.
        albums: conversations about single things.
        lessons: pictures of few places.
        pictures: whole pictures.
        seed: of the weights, and, times 10**8, where the seeds of pictures begin.

    Raises:
        ValueError: a seed whose pictures are not for training.
    """
    folder, first = Path(folder), seed * 10**8
    write_pictures(folder / "data", pictures, first + 2 * 10**7)
    write_albums(folder / "data", albums, first + 4 * 10**7)
    write_lessons(folder / "data", lessons, first + 5 * 10**7)
    for stage, shares in SHARES.items():
        text = json.dumps(_datasets(folder / "data", shares), indent=2)
        (folder / "data" / f"{stage}.json").write_text(text + "\n", encoding="utf-8")
    make_start(folder / "start", seed)


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
    added = commands.add_parser("prepare", help="write the untrained model and the data")
    added.add_argument("folder")
    added.add_argument("--albums", type=int, default=5000)
    added.add_argument("--lessons", type=int, default=8000)
    added.add_argument("--pictures", type=int, default=20000)
    added.add_argument("--seed", type=int, default=0)
    added = commands.add_parser("export", help="write a trained model in bfloat16")
    added.add_argument("model")
    added.add_argument("folder")
    given = vars(parser.parse_args())
    if given.pop("command") == "prepare":
        prepare(**given)
    else:
        export(**given)


if __name__ == "__main__":
    _main()
