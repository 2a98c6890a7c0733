"""Results as a table, plots and a summary."""

import csv
import math
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from comemo.nano.words import COLOURS as GUESSES
from examples.long_context.evaluation import FILLERS
from examples.long_context.paths import PATHS, ROPES
from examples.long_context.training import LONGEST

# Relative gains of CoMemo over LVLM-S in the paper (arXiv:2506.06279), in percent.
PAPER = {"caption": 17.2, "long generation": 7.0, "long context": 5.6}
LONG = 256  # tokens between a picture and its question, from which a context counts as long
NAMES = {"context": "context path", "memory": "memory path", "both": "both"}
COLOURS = {"context": "#d95f02", "memory": "#7570b3", "both": "#1b9e77"}


def write_reports(folder: Path, found: list[dict]) -> list[Path]:
    """Write the table of all results, the summary, the loss curves and the plots.

    Args:
        folder: is created.
        found: of `configurations.run`.

    Returns:
        The files. No plots, with a message, if matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        (one["path"], one["rope"], one["seed"], *result.values())
        for one in found
        for result in one["results"]
    ]
    head = ("path", "rope", "seed", "task", "at", "right", "asked")
    losses = [
        (one["path"], one["rope"], one["seed"], step, f"{loss:.4f}")
        for one in found
        for step, loss in one["curve"]
    ]
    files = [
        _table(folder / "results.csv", head, rows),
        _table(folder / "losses.csv", ("path", "rope", "seed", "step", "loss"), losses),
        folder / "summary.md",
    ]
    files[-1].write_text(_summary(found), encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: no plots")
        return files
    matplotlib.use("Agg")
    return [*files, _plot_distances(folder, found), _plot_rest(folder, found)]


def accuracy(one: dict, wanted: Callable[[str, int], bool]) -> float:
    """Share of right answers of one configuration, over all results that are wanted.

    Args:
        one: of `configurations.run`.
        wanted: task, at -> whether it counts. Each `task, at` counts alike.
    """
    shares = [r["right"] / r["asked"] for r in one["results"] if wanted(r["task"], r["at"])]
    return statistics.fmean(shares) if shares else math.nan


def across_seeds(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; the error of one value is 0, and NaN stays NaN."""
    if any(map(math.isnan, values)):
        return math.nan, math.nan
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def _of(found: list[dict], path: str, rope: str) -> list[dict]:
    return [one for one in found if (one["path"], one["rope"]) == (path, rope)]


def _table(file: Path, head: tuple, rows: Iterable[tuple]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened, lineterminator="\n").writerows([head, *rows])
    return file


TASKS: dict[str, Callable[[str, int], bool]] = {
    "no distance": lambda task, at: task.startswith("distance") and at == 0,
    "caption": lambda task, at: task == "caption",
    "long generation": lambda task, at: task == "long generation",
    "long context": lambda task, at: task.startswith("distance") and at >= LONG,
    "long context, text": lambda task, at: task == "distance text" and at >= LONG,
    "long context, pictures": lambda task, at: task == "distance pictures" and at >= LONG,
    "long context, trained distances": lambda task, at: (
        task.startswith("distance") and LONG <= at <= LONGEST
    ),
    "long context, longer ones": lambda task, at: task.startswith("distance") and at > LONGEST,
}


def _summary(found: list[dict]) -> str:
    """Accuracy of all configurations, and gains over the context path alone, in Markdown."""
    columns = [(path, rope) for rope in ROPES for path in PATHS if _of(found, path, rope)]
    names = [f"{NAMES[path]}, {rope}" for path, rope in columns]
    lines = ["Right answers in percent, mean and standard error over seeds:", ""]
    lines += [_row(["", *names]), _row(["---", *["---:"] * len(names)])]
    for task, wanted in TASKS.items():
        cells = []
        for path, rope in columns:
            mean, error = across_seeds([accuracy(one, wanted) for one in _of(found, path, rope)])
            cells.append("" if math.isnan(mean) else f"{100 * mean:.1f} ± {100 * error:.1f}")
        lines.append(_row([task, *cells]))
    lines += ["", "Relative gain over the context path of the same seed, in percent:", ""]
    gains = {
        "both, dhr": ("both", "dhr", "dhr"),
        "both, original": ("both", "original", "original"),
        "both, dhr, over context, original": ("both", "dhr", "original"),
        "context, dhr, over context, original": ("context", "dhr", "original"),
    }
    heads = [*gains, "paper"]
    lines += [_row(["", *heads]), _row(["---", *["---:"] * len(heads)])]
    for task, wanted in TASKS.items():
        cells = [_gain(found, wanted, *compared) for compared in gains.values()]
        lines.append(_row([task, *cells, f"{PAPER[task]:.1f}" if task in PAPER else ""]))
    machine = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    machine += f", transformers {transformers.__version__}, {platform.machine()}"
    first = found[0]
    hours = sum(sum(one["seconds"].values()) for one in found) / 3600  # without the pictures
    lines += ["", f"{len(found)} trainings of {first['recipe']['steps']} steps, {hours:.1f} hours"]
    lines[-1] += f" of one core. {machine}."
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _gain(
    found: list[dict], wanted: Callable[[str, int], bool], path: str, rope: str, base: str
) -> str:
    """Of `path` with `rope` over the context path with `base`, seed by seed."""
    bases = {one["seed"]: accuracy(one, wanted) for one in _of(found, "context", base)}
    gains = [
        100 * (accuracy(one, wanted) / bases[one["seed"]] - 1)
        for one in _of(found, path, rope)
        if bases.get(one["seed"], 0) > 0
    ]
    if not gains:
        return ""
    mean, error = across_seeds(gains)
    return f"{mean:+.1f} ± {error:.1f}"


def _curves(axes: Any, found: list[dict], task: str, ropes: tuple[str, ...] = ROPES) -> None:
    """One line for each configuration: accuracy over `at`, with standard errors."""
    for rope in ropes:
        for path in PATHS:
            own = _of(found, path, rope)
            places = sorted({r["at"] for one in own for r in one["results"] if r["task"] == task})
            points = [
                across_seeds([accuracy(one, lambda t, a, p=p: (t, a) == (task, p)) for one in own])
                for p in places
            ]
            axes.errorbar(
                places,
                [100 * mean for mean, _ in points],
                [100 * error for _, error in points],
                color=COLOURS[path],
                linestyle="-" if rope == "dhr" else "--",
                marker="o" if rope == "dhr" else "s",
                markersize=4,
                capsize=2,
                label=f"{NAMES[path]}, {'RoPE-DHR' if rope == 'dhr' else 'original RoPE'}",
            )
    axes.set_ylim(0, 102)
    if task.startswith(("distance", "tiles")):
        axes.axhline(100 / len(GUESSES), color="black", linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.3)


def _plot_distances(folder: Path, found: list[dict]) -> Path:
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    titles = ("text between", "conversations about other pictures between")
    for axes, filler, title in zip(both, FILLERS, titles, strict=True):
        _curves(axes, found, f"distance {filler}")
        axes.set_xscale("symlog", base=2, linthresh=64)
        axes.set_xticks([0, 64, 256, 1024, 4096], ["0", "64", "256", "1,024", "4,096"])
        axes.axvspan(LONGEST * 1.1, 4096 * 1.15, color="grey", alpha=0.12)
        axes.text(LONGEST * 1.2, 3, "longer than trained", fontsize=8)
        axes.set_title(title)
        axes.set_xlabel("tokens between picture and question")
    both[0].set_ylabel("right answers, %")
    return _save(figure, folder / "distances.png")


def _plot_rest(folder: Path, found: list[dict]) -> Path:
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, 3, figsize=(13, 4.8), sharey=True)
    tasks = ("tiles", "long generation", "caption")
    labels = (
        "tiles at most (a thumbnail in addition)",
        "thing of the list",
        "thing of the caption",
    )
    for axes, task, label in zip(all_axes, tasks, labels, strict=True):
        _curves(axes, found, task)
        axes.set_title(task)
        axes.set_xlabel(label)
        places = {r["at"] for one in found for r in one["results"] if r["task"] == task}
        axes.set_xticks(sorted(places))
    all_axes[0].set_ylabel("right answers, %")
    return _save(figure, folder / "tiles_and_lists.png")


def _save(figure: Any, file: Path) -> Path:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="lower center", ncols=len(PATHS))
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    figure.savefig(file, dpi=110, metadata={"Software": None})
    return file
