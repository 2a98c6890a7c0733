"""A run in a few lines: our ways compared with others, configurations with the first."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench.ways import is_ours

Row = dict[str, Any]
LIMIT = 11000  # characters printed last; only the end of a long output is visible
SHARES = ("of_limit", "of_copy", "of_dense")  # columns
BASELINES = ("published", "published code", "as shipped")  # ways, up to a comma
TIMES = {"us": (1.0, "us"), "token_s": (1e3, "ms a token"), "host_us": (1.0, "us of the host")}


def compare(rows: Sequence[Row]) -> list[str]:
    """A line for each case and pass: the first of our ways, and others relative to its time.

    After our other ways come the fastest foreign one and the published or shipped one; "x0.5" is
    twice as fast as ours.
    """
    lines = []
    for (bench, case, kind), group in _grouped(rows, "bench", "case", "pass"):
        ours = next((row for row in group if _is_ours(row)), None)
        time = next((name for name in TIMES if ours and name in ours), None)
        if ours is None or time is None:
            continue
        scale, unit = TIMES[time]
        parts = [f"{bench} {case} {kind}: {scale * ours[time]:.4g} {unit}"]
        parts += [f"{100 * ours[n]:.0f}% {n[3:]}" for n in SHARES if n in ours]
        parts += [f"first {1e3 * ours['first_s']:.0f} ms"] if "first_s" in ours else []
        others = sorted(
            (row[time] / ours[time], row["way"]) for row in group if row is not ours and time in row
        )
        foreign = [other for other in others if not _names_ours(other[1])]
        shown = [other for other in others if _names_ours(other[1])] + foreign[:1]
        shown += [other for other in foreign[1:] if other[1].split(",")[0] in BASELINES]
        parts += [f"{way} x{share:.3g}" for share, way in shown]
        lines.append(", ".join(parts))
    return lines


def _is_ours(row: Row) -> bool:
    return _names_ours(row["way"]) and row["pass"] != "tune"


def _names_ours(way: str) -> bool:
    return is_ours(way.split(",")[0]) or way == "memory"  # the name in `bench decode`


def choose(rows: Sequence[Row]) -> list[str]:
    """A line for each kernel and case of `--tune`: the first configuration, and the fastest."""
    lines = []
    tuned = [row for row in rows if row["pass"] == "tune"]
    for (bench, case, kernel), group in _grouped(tuned, "bench", "case", "kernel"):
        fastest = min(group, key=lambda row: row["us"])
        first = next((row for row in group if row["first"]), None)
        if first is fastest:
            line = f"the first is the fastest of {len(group)}, {first['us']:.4g} us"
        else:
            line = "the first was not timed, fastest"
            if first is not None:
                gain = 100 * (first["us"] / fastest["us"] - 1)
                line = f"first {first['us']:.4g} us {first['config']}, {gain:.1f}% slower than"
            line += f" {fastest['us']:.4g} us {fastest['config']}"
        lines.append(f"{bench} {case}, {kernel}: {line}")
    return lines


def _grouped(rows: Iterable[Row], *names: str) -> Iterable[tuple[tuple[str, ...], list[Row]]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups.items()


def fit(parts: Sequence[tuple[str, Sequence[str]]], limit: int = LIMIT) -> str:
    """Titles with their lines as one text of at most `limit` characters.

    Lines are cut from the end of the longest part; their number is printed.
    """
    kept = {title: list(lines) for title, lines in parts if lines}

    def text() -> str:
        blocks = []
        for title, lines in parts:
            if lines:
                cut = len(lines) - len(kept[title])
                more = [f"  ... and {cut} more, in the archive"] if cut else []
                blocks.append("\n".join([title, *(f"  {line}" for line in kept[title]), *more]))
        return "\n".join(blocks)

    while len(text()) > limit and any(kept.values()):
        longest = max(kept.values(), key=lambda lines: sum(map(len, lines)))
        longest.pop()
    return text()
