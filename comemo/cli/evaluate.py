"""`comemo eval`: how often nano answers right, on questions that no training has seen."""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from comemo.cli.arguments import find_checkpoint
from comemo.cli.checkpoints import load_checkpoint
from comemo.cli.draw import save_picture
from comemo.cli.terminal import plain, tell
from comemo.nano.evaluation import Evaluation, Score, evaluate


def run(args: argparse.Namespace) -> int:
    """Ask, and print a table; returns the exit status.

    Raises:
        ValueError, OSError: a checkpoint or path that is wrong.
    """
    if args.json == "-" and args.wrong:
        raise ValueError("--json - prints all answers already, --wrong is for the table")
    if args.keep is not None and not args.wrong:
        raise ValueError("--keep DIR draws the pictures of --wrong N, which is missing")
    if args.json not in (None, "-") and not Path(args.json).parent.is_dir():
        raise ValueError(f"--json: there is no directory {str(Path(args.json).parent)!r}")
    kinds = None if args.kinds is None else list(dict.fromkeys(args.kinds))
    model, processor = load_checkpoint(find_checkpoint(args.model))
    shape = {"total": args.questions, "unit": " questions", "ncols": 80}
    watched = sys.stderr.isatty()
    with tqdm(file=sys.stderr, leave=False, disable=not watched, **shape) as bar:
        result = evaluate(
            model,
            processor,
            args.questions,
            kinds,
            args.tiles,
            done=lambda count: bar.update(count - bar.n),
        )
    facts = json.dumps(result.facts(), indent=2)
    if args.json == "-":
        tell(facts)
        return 0
    if args.json is not None:
        Path(args.json).write_text(facts + "\n", encoding="utf-8")
    tell(table(result))
    if args.wrong:
        _show_wrong(result, args.wrong, args.keep)
    return 0


def table(result: Evaluation) -> str:
    """Format the scores as a table.

    Args:
        result: of `evaluate`.

    Returns:
        Lines of text.
    """
    tiles = f"up to {result.tiles} tiles each" if result.tiles > 1 else "the thumbnail alone"
    lines = [
        f"{_count(len(result.examples), 'question')} about held-out pictures, {tiles}",
        "",
        f"{'kind':10}{'n':>7}{'right':>7}{'accuracy':>11}  {'95 % interval':>16}{'chance':>10}",
    ]
    rows = [*result.kinds.items(), ("overall", result.overall)]
    return "\n".join([*lines, *(_row(name, score) for name, score in rows)])


def _row(name: str, score: Score) -> str:
    interval = f"{100 * score.low:.1f} - {100 * score.high:.1f} %"
    return (
        f"{name:10}{score.n:7,}{score.right:7,}{100 * score.accuracy:9.1f} %  {interval:>16}"
        f"{100 * score.chance:8.1f} %"
    )


def _show_wrong(result: Evaluation, most: int, keep: str | None) -> None:
    wrong = result.wrong()
    tell(f"\n{_count(len(wrong), 'wrong answer')}{', some of them:' if len(wrong) > most else ''}")
    for one, answer in wrong[:most]:
        tell(
            f"  {one.kind}, {one.layout} of seed {one.seed}: {one.question}\n"
            f"    answer  {plain(answer)}\n    truth   {one.answer}"
        )
        if keep is not None:
            Path(keep).mkdir(parents=True, exist_ok=True)
            for index, picture in enumerate(one.pictures(), 1):
                name = f"{one.seed}{f'-{index}' if len(one.scenes) > 1 else ''}.png"
                save_picture(picture, Path(keep) / name, force=True)
                tell(f"    picture {plain(Path(keep) / name)}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
