"""`python -m bench NAME [options] [--out DIR]`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from bench import (
    attend,
    chat,
    decode,
    divided,
    dropin,
    gpu_bench,
    gpu_check,
    host,
    images,
    linear,
    measure,
    memory,
    mixin,
    positions,
    profile,
    progress,
    project,
    quantised,
    recipe,
    rotary,
    scaling,
    serve,
    store,
    train,
    vision,
)

BENCHMARKS: dict[str, Any] = {
    "attend": attend,
    "chat": chat,
    "decode": decode,
    "divided": divided,
    "dropin": dropin,
    "host": host,
    "images": images,
    "linear": linear,
    "memory": memory,
    "mixin": mixin,
    "positions": positions,
    "profile": profile,
    "project": project,
    "quantised": quantised,
    "recipe": recipe,
    "rotary": rotary,
    "scaling": scaling,
    "serve": serve,
    "store": store,
    "train": train,
    "vision": vision,
}
COMMANDS: dict[str, Any] = {"gpu-check": gpu_check, "gpu-bench": gpu_bench}  # run many stages
INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended


def main() -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, as in the command `comemo`
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in (BENCHMARKS | COMMANDS).items():
        command = commands.add_parser(name, description=module.__doc__)
        module.add_arguments(command)
        if name in COMMANDS:
            command.add_argument("--out", type=Path, required=True, help="folder for its files")
            continue
        command.add_argument("--out", type=Path, help="folder for NAME.json and NAME.csv")
        command.add_argument("--wait", action="store_true", help="for a line on stdin, then start")
    options = parser.parse_args()
    if options.name in COMMANDS:
        sys.exit(COMMANDS[options.name].run(options))
    if options.wait and not sys.stdin.readline():
        sys.exit(f"python -m bench {options.name} --wait: stdin was closed")
    sys.exit(_run(options))


def _run(options: argparse.Namespace) -> int:
    """Measure, print and write rows as they come; the exit code."""
    machine = measure.describe_machine()
    print("  ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    rows: list[dict[str, Any]] = []
    table = measure.Table()
    try:
        with progress.shown(options.name, sys.stdout, sys.stderr):
            for row in BENCHMARKS[options.name].run(options):
                rows.append(row)
                table.show(row)
                if options.out:
                    # After each row: an interrupt loses no measured row.
                    measure.write(options.name, rows, machine, options.out)
    except KeyboardInterrupt:
        kept = ""
        if options.out and rows:
            measure.write(options.name, rows, machine, options.out)  # in case it came within one
            kept = f", written to {options.out / options.name}.json and .csv"
        count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
        print(f"interrupted: {count} measured{kept}", file=sys.stderr)
        return INTERRUPTED
    return 1 if getattr(options, "failed", False) else 0


if __name__ == "__main__":
    main()
