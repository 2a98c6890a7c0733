"""`comemo store`: list, remove and sum up the images in a store's directory, without a model."""

import argparse
import contextlib
import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from comemo.cli.terminal import plain, tell
from comemo.store import directory as store_directory
from comemo.store.directory import BadFileError
from comemo.store.headers import read_header

SHOWN = 12  # characters of a key or a model's digest in a table
DAY = 86400.0


def run(args: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit status.

    Raises:
        ValueError: no such directory, or keys that match no image or several.
        OSError: a directory that cannot be read, or a file that cannot be removed.
    """
    return {"ls": _ls, "rm": _rm, "stats": _stats}[args.action](args)


def describe(directory: str | Path) -> list[dict[str, Any]]:
    """Read the headers of a store's files, not their tensors.

    Args:
        directory: of the store.

    Returns:
        For each file `key`, `bytes` and `used` (seconds since the epoch), least recently used
        first; also `tokens`, `dtype` and `model` for a good file, or the reason as `broken`.

    Raises:
        ValueError: there is no such directory.
    """
    if not str(directory) or not Path(directory).is_dir():  # "" would be the current directory
        raise ValueError(f"there is no directory {str(directory)!r}")
    rows = []
    for path, status in store_directory.list_files(Path(directory)):
        row = {"key": path.stem, "bytes": status.st_size, "used": status.st_mtime}
        try:
            header = read_header(path)
            facts = header.facts
            if facts["key"] != path.stem:
                raise BadFileError(f"its key is {facts['key'][:SHOWN]}")
            row |= {"tokens": header.tokens, "dtype": facts["dtype"], "model": facts["model"]}
        except FileNotFoundError:
            continue
        except (OSError, BadFileError) as error:
            row["broken"] = str(getattr(error, "strerror", None) or error)
        rows.append(row)
    return rows


def _ls(args: argparse.Namespace) -> int:
    rows = describe(args.directory)
    if args.json:
        tell(json.dumps([row | {"used": _date(row["used"])} for row in rows], indent=2))
        return 0
    if rows:
        tell(f"{'key':14}{'tokens':>8}{'bytes':>16}  {'dtype':10}{'model':14}last use")
    for row in rows:
        about = f"broken: {plain(row.get('broken'))}"
        if "broken" not in row:
            about = f"{row['dtype']:10}{row['model'][:SHOWN]:14}{_date(row['used'])}"
        tell(f"{row['key'][:SHOWN]:14}{row.get('tokens', '-'):>8}{row['bytes']:>16,}  {about}")
    return 0


def _rm(args: argparse.Namespace) -> int:
    if [bool(args.keys), args.all, args.older_than is not None].count(True) != 1:
        raise ValueError("wanted either KEYs, --all or --older-than DAYS")
    rows = describe(args.directory)
    if args.keys:
        chosen = [_find(key, rows) for key in args.keys]
    else:
        oldest = time.time() - (args.older_than or 0) * DAY
        chosen = [row for row in rows if args.all or row["used"] < oldest]
    chosen = list({row["key"]: row for row in chosen}.values())
    for row in chosen:
        store_directory.remove(Path(args.directory) / f"{row['key']}{store_directory.ENDING}")
    store_directory.sweep(Path(args.directory))
    size = sum(row["bytes"] for row in chosen)
    if args.json:
        tell(json.dumps({"removed": [row["key"] for row in chosen], "bytes": size}, indent=2))
    else:
        tell(f"removed {_count(len(chosen), 'image')}, {size:,} bytes")
    return 0


def _find(start: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The one image whose key begins with `start`."""
    found = [row for row in rows if row["key"].startswith(start.lower())]
    if len(found) != 1 or not start:
        fault = "several keys begin" if found else "no key begins"
        raise ValueError(f"{fault} with {start!r}; nothing was removed")
    return found[0]


def _stats(args: argparse.Namespace) -> int:
    rows = describe(args.directory)
    good = [row for row in rows if "broken" not in row]
    models: dict[str, dict[str, int]] = {}
    for row in good:
        about = models.setdefault(row["model"], {"images": 0, "bytes": 0})
        about["images"] += 1
        about["bytes"] += row["bytes"]
    facts = {
        "directory": args.directory,
        "images": len(good),
        "broken": len(rows) - len(good),
        "bytes": sum(row["bytes"] for row in rows),
        "first_use": _date(rows[0]["used"]) if rows else None,
        "last_use": _date(rows[-1]["used"]) if rows else None,
        "models": models,
    }
    if args.json:
        tell(json.dumps(facts, indent=2))
        return 0
    tell(
        f"{plain(args.directory)}\n  {_count(len(good), 'image')},"
        f" {_count(len(rows) - len(good), 'broken file')}, {facts['bytes']:,} bytes"
    )
    if rows:
        tell(f"  last used {facts['first_use']} to {facts['last_use']}")
    for model, about in models.items():
        tell(
            f"  model {model[:SHOWN]}: {_count(about['images'], 'image')}, {about['bytes']:,} bytes"
        )
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _date(seconds: float) -> str:
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(" ", "seconds")
    return f"{seconds:.0f} s since 1970"  # a file may have any time
