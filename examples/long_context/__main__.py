"""Train, ask and draw: `python -m examples.long_context --out runs/long_context --jobs 2`."""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from comemo import nano
from examples.long_context.configurations import configurations, prepare, run, wanted_pictures
from examples.long_context.evaluation import DISTANCES
from examples.long_context.reports import write_reports
from examples.long_context.training import Recipe

LEARNT, ASKED = 2000, 96  # pictures


def main() -> None:
    options = _parse()
    folder, checkpoint = Path(options.out), Path(options.checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    steps, learnt, asked, distances = options.steps, LEARNT, ASKED, DISTANCES
    if options.smoke:
        # Enough pictures that for each shape there are others without it.
        steps, learnt, asked, distances = 2, 80, 12, (0, 64)
    recipe = Recipe(steps=steps)
    train, held, sets = wanted_pictures(learnt, asked)
    _check(folder, {"steps": steps, "learnt": learnt, "asked": asked, "nano": str(checkpoint)})
    begin = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        parts = {"learnt": train, "asked": held}.items()
        for future in [pool.submit(prepare, folder, checkpoint, *part) for part in parts]:
            future.result()
        print(f"{len(train) + len(held)} pictures encoded  {time.perf_counter() - begin:.0f} s")
        waiting = [c for c in configurations(options.seeds) if not _file(folder, c).exists()]
        futures = {
            pool.submit(run, folder, checkpoint, c, recipe, sets, distances): c for c in waiting
        }
        for number, future in enumerate(as_completed(futures), 1):
            done = future.result()
            seconds = sum(done["seconds"].values())
            print(
                f"{number}/{len(waiting)}  {futures[future]}  loss {done['curve'][-1][1]:.3f}"
                f"  {seconds:.0f} s  {time.perf_counter() - begin:.0f} s in all",
                flush=True,
            )
    found = [json.loads(_file(folder, c).read_text()) for c in configurations(options.seeds)]
    for path in write_reports(folder / "results", found):
        print(path)


def _file(folder: Path, chosen: object) -> Path:
    return folder / f"{chosen}.json"


def _check(folder: Path, settings: dict) -> None:
    """Refuse to mix results of different settings in one folder."""
    file = folder / "settings.json"
    if file.exists() and (known := json.loads(file.read_text())) != settings:
        raise SystemExit(f"long_context: {folder} is of {known}, got {settings}: use another --out")
    file.write_text(json.dumps(settings), encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.long_context", description=__doc__)
    parser.add_argument("--out", default="runs/long_context", help="folder of the run")
    parser.add_argument("--jobs", type=int, default=2, help="configurations at the same time")
    parser.add_argument("--seeds", type=int, default=3, help="of each configuration")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of each training")
    parser.add_argument("--checkpoint", default=nano.checkpoint(), help="comemo-nano")
    parser.add_argument("--smoke", action="store_true", help="two steps of each, in a minute")
    return parser.parse_args()


if __name__ == "__main__":
    main()
