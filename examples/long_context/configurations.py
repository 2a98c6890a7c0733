"""One configuration from its pictures to its results; each in a process of its own."""

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from comemo.nano.scenes import SEEDS
from comemo.tokenizer import InternLM2Tokenizer
from examples.long_context.conversations import Writer
from examples.long_context.evaluation import DISTANCES, evaluate
from examples.long_context.paths import PATHS, ROPES, make_model
from examples.long_context.pictures import Wanted, read_pictures, write_pictures
from examples.long_context.training import Recipe, train

CUTS = (1, 4, 9)  # most tiles of the pictures that are asked about over tiles
# Sides and most tiles of pictures to learn from, by turns: mostly a tile for each place.
LEARNT = ((2, 4), (3, 9), (2, 4), (1, 1), (2, 4), (3, 9), (2, 4), (2, 9), (2, 4), (2, 1))


class Configuration(NamedTuple):
    """What is trained.

    Attributes:
        path: of `PATHS`.
        rope: of `ROPES`.
        seed: of weights and conversations.
    """

    path: str
    rope: str
    seed: int

    def __str__(self) -> str:
        return f"{self.path}-{self.rope}-{self.seed}"


def configurations(seeds: int) -> list[Configuration]:
    """All, seed by seed, so that the first whole comparison comes early."""
    return [Configuration(p, r, seed) for seed in range(seeds) for r in ROPES for p in PATHS]


def wanted_pictures(learnt: int, asked: int) -> tuple[list[Wanted], list[Wanted], dict[str, range]]:
    """The pictures to learn from, those to ask about, and the sets of these, by name.

    Args:
        learnt: pictures to learn from.
        asked: pictures of each set.
    """
    first = SEEDS["train"][0]
    train = [
        Wanted(first + i, side, None, tiles)
        for i, (side, tiles) in zip(range(learnt), itertools.cycle(LEARNT), strict=False)
    ]
    held = SEEDS["held-out"][0]
    own = range(held, held + asked)
    parts = {"any": [Wanted(seed, 2, None, 4) for seed in own]}
    parts |= {f"tiles {cut}": [Wanted(seed, 2, None, cut) for seed in own] for cut in CUTS}
    parts["short"] = [Wanted(seed + asked, 2, 2 + seed % 2, 4) for seed in own]
    parts["long"] = [Wanted(seed + 2 * asked, 3, 6, 9) for seed in own]
    sets, whole = dict[str, range](), list[Wanted]()
    for name, pictures in parts.items():
        sets[name] = range(len(whole), len(whole) + len(pictures))
        whole += pictures
    return train, whole, sets


def prepare(folder: Path, checkpoint: Path, name: str, wanted: list[Wanted]) -> float:
    """Encode pictures if they are not in the folder yet; the seconds it took."""
    begin = time.perf_counter()
    if not (file := folder / f"{name}.pt").exists():
        write_pictures(file, checkpoint, wanted)
    return time.perf_counter() - begin


def run(
    folder: Path,
    checkpoint: Path,
    chosen: Configuration,
    recipe: Recipe,
    sets: dict[str, range],
    distances: tuple[int, ...] = DISTANCES,
) -> dict:
    """Train and evaluate one configuration, and write what comes out to its JSON file.

    Args:
        folder: of the run, with the encoded pictures.
        checkpoint: comemo-nano.
        chosen: the configuration.
        recipe: of the training.
        sets: of `wanted_pictures`.
        distances: of the evaluation.
    """
    torch.set_num_threads(1)
    begin = time.perf_counter()
    tokenizer = InternLM2Tokenizer.from_pretrained(checkpoint)
    learnt, asked = (
        Writer(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], pictures)
        for pictures in (read_pictures(folder / "learnt.pt"), read_pictures(folder / "asked.pt"))
    )
    model = make_model(checkpoint, chosen.rope, chosen.seed, tokenizer.convert_tokens_to_ids("\n"))
    log = folder / f"{chosen}.log"
    with log.open("w", encoding="utf-8") as file:
        curve = train(
            model,
            chosen.path,
            learnt,
            range(len(learnt.pictures.scenes)),
            chosen.seed,
            recipe,
            lambda text: print(text, file=file, flush=True),
        )
    trained = time.perf_counter()
    results = evaluate(model, chosen.path, asked, sets, distances)
    whole = {
        **chosen._asdict(),
        "recipe": asdict(recipe),
        "curve": curve,
        "results": [result._asdict() for result in results],
        "seconds": {
            "training": round(trained - begin, 1),
            "evaluation": round(time.perf_counter() - trained, 1),
        },
    }
    partial = folder / f"{chosen}.partial"
    partial.write_text(json.dumps(whole), encoding="utf-8")
    partial.replace(folder / f"{chosen}.json")
    return whole
