"""Draw the losses of comemo-nano's training: python examples/nano/plot.py [FOLDER of logs]"""

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

STAGES = ("colours", "places", "see", "again")


def main(folder: Path) -> None:
    """Write curve.png beside the logs that are there.

    Args:
        folder: has tower.txt, what `python -m comemo.nano prepare` prints, and the logs of the
            runs, such as colours.jsonl.
    """
    figure, (tower, loss, gates) = pyplot.subplots(1, 3, figsize=(13, 3.6))
    _plot_tower(tower, folder / "tower.txt")
    before = 0
    for stage in [name for name in STAGES if (folder / f"{name}.jsonl").is_file()]:
        lines = (folder / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        steps = [before + row["step"] for row in rows]
        loss.plot(steps, [row["loss"] for row in rows], label=stage)
        names = sorted(name for name in rows[0] if name.startswith("gate_tanh/"))
        for index, name in enumerate(names):
            values = [row[name] for row in rows]
            gates.plot(steps, values, color=f"C{index}", label=name[10:] if not before else None)
        before = steps[-1]
    tower.set(title="tower", xlabel="step", ylabel="loss")
    loss.set(title="language and mixin layers", xlabel="step", ylabel="loss", yscale="log")
    gates.set(title="tanh of the gates", xlabel="step")
    loss.legend()
    gates.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=110)


def _plot_tower(axes, file: Path) -> None:
    """Losses of "tower 50/2200  loss 3.130"; a new part begins where the steps do again."""
    steps, losses, before, last = [], [], 0, 0
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for step, loss in re.findall(r"^tower (\d+)/\d+  loss (\S+)$", text, re.MULTILINE):
        before += last if int(step) < last else 0
        last = int(step)
        steps.append(before + last)
        losses.append(float(loss))
    axes.plot(steps, losses)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "log"))
