"""Draw the losses of comemo-nano's training: python examples/nano/plot.py [FOLDER of logs]"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

STAGES = ("colours", "places", "see-begun", "see")


def main(folder: Path) -> None:
    """Write curve.png beside the logs of the runs, such as colours.jsonl, that are there."""
    figure, (loss, gates) = pyplot.subplots(1, 2, figsize=(10, 3.6))
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
    loss.set(xlabel="step", ylabel="loss", yscale="log")
    gates.set(xlabel="step", ylabel="tanh of the gates")
    loss.legend()
    gates.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "log"))
