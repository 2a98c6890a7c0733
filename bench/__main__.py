"""`python -m bench NAME [options] [--out DIR]`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import (
    attend,
    chat,
    decode,
    gpu,
    host,
    measure,
    memory,
    mixin,
    positions,
    project,
    rotary,
    vision,
)

BENCHMARKS: dict[str, Any] = {
    "attend": attend,
    "chat": chat,
    "decode": decode,
    "gpu": gpu,
    "host": host,
    "memory": memory,
    "mixin": mixin,
    "positions": positions,
    "project": project,
    "rotary": rotary,
    "vision": vision,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, description=module.__doc__)
        module.add_arguments(command)
        command.add_argument("--out", type=Path, help="folder for NAME.json and NAME.csv")
    options = parser.parse_args()
    machine = measure.describe_machine()
    print("  ".join(f"{key} {value}" for key, value in machine.items()))
    rows: list[dict[str, Any]] = []
    for row in BENCHMARKS[options.name].run(options):
        rows.append(row)
        if options.out and options.name != "gpu":  # which writes what its stages measured
            # At once: what is measured outlives a run that is cut short.
            measure.write(options.name, rows, machine, options.out)
    measure.show(rows)
    sys.exit(1 if getattr(options, "failed", False) else 0)


if __name__ == "__main__":
    main()
