"""What the training of comemo-nano begins with, and the checkpoint it ends with: two commands.

Nothing here is needed to use the model; examples/nano has the whole recipe.
"""

import argparse
import shutil
from pathlib import Path

import torch

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.nano.dataset import write_items, write_pictures
from comemo.nano.start import make_start
from comemo.processor import CoMemoProcessor


def prepare(folder: str | Path, items: int, pictures: int, seed: int) -> None:
    """Write the untrained model and the data.

    Args:
        folder: gets start/ and data/.
        items: pictures of single things.
        pictures: samples of whole pictures.
        seed: of the weights, and, times 10**8, where the seeds of pictures begin.

    Raises:
        ValueError: a seed whose pictures are not for training.
    """
    folder, first = Path(folder), seed * 10**8
    write_items(folder / "data", items, first + 10**7)
    write_pictures(folder / "data", pictures, first + 2 * 10**7)
    make_start(folder / "start", seed)


def export(model: str | Path, folder: str | Path) -> None:
    """Write a trained model as small as it can be: bfloat16 weights, config, tokenizer, processor.

    Args:
        model: the folder of the trained model.
        folder: is replaced.
    """
    loaded = CoMemoForConditionalGeneration.from_pretrained(model, dtype=torch.bfloat16)
    processor = CoMemoProcessor.from_pretrained(model)
    shutil.rmtree(folder, ignore_errors=True)
    loaded.save_pretrained(folder)
    processor.save_pretrained(folder)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m comemo.nano", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    added = commands.add_parser("prepare", help="write the untrained model and the data")
    added.add_argument("folder")
    added.add_argument("--items", type=int, default=40000)
    added.add_argument("--pictures", type=int, default=24000)
    added.add_argument("--seed", type=int, default=0)
    added = commands.add_parser("export", help="write a trained model in bfloat16")
    added.add_argument("model")
    added.add_argument("folder")
    given = vars(parser.parse_args())
    {"prepare": prepare, "export": export}[given.pop("command")](**given)


if __name__ == "__main__":
    _main()
