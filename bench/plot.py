"""Plots of measured rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = {
    "of_copy": "share of a copy's bandwidth",
    "of_limit": "share of the limit",
    "us": "microseconds",
}


def draw(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """A PNG for each benchmark: a bar for each way, grouped by case and pass.

    Bars show the first column of `LABELS` that all rows of a benchmark have: the share of a copy's
    bandwidth, the share of the limit, or microseconds.

    Args:
        rows: of `results.json`.
        out: folder for `<bench>.png`.

    Returns:
        The files; none, with a message, if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: no plots")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = []
    for bench in dict.fromkeys(row["bench"] for row in rows):
        timed = [row for row in rows if row["bench"] == bench and "us" in row]
        groups = list(dict.fromkeys((row["case"], row["pass"]) for row in timed))
        ways = list(dict.fromkeys(row["way"] for row in timed))
        if not groups:
            continue
        measured = next(name for name in LABELS if all(name in row for row in timed))
        figure, axes = pyplot.subplots(figsize=(2 + 1.1 * len(groups), 5), layout="constrained")
        width = 0.8 / len(ways)
        for i, way in enumerate(ways):
            found = {
                place + i * width: row[measured]
                for place, group in enumerate(groups)
                for row in timed
                if (row["case"], row["pass"], row["way"]) == (*group, way)
            }
            axes.bar(list(found), list(found.values()), width, label=way)
        axes.set_xticks(
            [place + 0.4 - width / 2 for place in range(len(groups))],
            [f"{case}\n{kind}".replace(" ", "\n") for case, kind in groups],
            fontsize=7,
        )
        axes.set_ylabel(LABELS[measured])
        axes.set_title(bench)
        axes.legend()
        axes.grid(axis="y", alpha=0.3)
        files.append(out / f"{bench}.png")
        figure.savefig(files[-1], dpi=110)
        pyplot.close(figure)
    return files
