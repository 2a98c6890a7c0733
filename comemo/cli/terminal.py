"""What the command prints: answers on stdout, all else on stderr, control characters escaped.

File names, settings of a checkpoint and answers of a model are untrusted: unescaped, they could
control the terminal, or look like messages of the command itself.
"""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import TextIO

from safetensors import SafetensorError

# C0 and C1 control characters, lone surrogates (bytes that are not text), and characters that
# reorder or end a line
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
Colour = tuple[int, int, int]  # red, green, blue
_FULL = re.compile("out of memory|not enough memory|can't allocate memory")
# Errors about a file that the user can correct.
_USERS_ERRNO = {
    None,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTEMPTY,
    errno.EROFS,
    errno.ENXIO,
    errno.EINVAL,
}


def plain(text: object, keep: str = "") -> str:
    r"""Escape control characters, as `\x1b` or `\u202e`.

    Args:
        text: from a file, a user or a model.
        keep: control characters to leave unescaped.
    """

    def escape(found: re.Match[str]) -> str:
        char = found[0]
        if char in keep:
            return char
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"

    return _CONTROL.sub(escape, str(text))


def prepare() -> None:
    """Make the streams accept any text; a closed stderr discards it."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for the life of the process)
    for stream, errors in (
        (sys.stdin, "surrogateescape"),  # refused by the code that reads it
        (sys.stdout, "backslashreplace"),  # a terminal without Unicode
        (sys.stderr, "backslashreplace"),
    ):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def settle() -> None:
    """Flush stdout; if that fails, make sure that Python does not try again when it exits."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(text: str = "", end: str = "\n") -> None:
    """Print lines on stdout at once."""
    print(plain(text, "\n\t"), end=end, flush=True)


def note(text: str, end: str = "\n") -> None:
    """Print lines on stderr; do nothing if nobody reads it."""
    with contextlib.suppress(OSError, ValueError):
        print(plain(text, "\n\t"), end=end, file=sys.stderr, flush=True)


def show(text: str, out: TextIO) -> None:
    """Write a part of an answer; line breaks and tabs are not escaped."""
    out.write(plain(text, "\n\t"))
    out.flush()


def shows_colours() -> bool:
    """Whether stdout is a terminal that names itself able to show 24-bit colours, as wanted.

    The environment says so: COLORTERM or TERM, and NO_COLOR if the user wants none.
    """
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return False
    names = {os.environ.get("COLORTERM", ""), *os.environ.get("TERM", "").split("-")[1:]}
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return unicode and not names.isdisjoint({"truecolor", "24bit", "direct"})


def paint(rows: Sequence[Sequence[tuple[Colour, Colour]]]) -> None:
    """Draw rows of cells on stdout, if `shows_colours`: each has an upper and a lower colour."""
    for row in rows:
        cells = "".join(
            f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{s};{t};{u}m\u2580" for (r, g, b), (s, t, u) in row
        )
        sys.stdout.write(f"   {cells}\x1b[0m\n")
    sys.stdout.flush()


def is_watched(verbose: bool = False) -> bool:
    """Whether to show notes and progress: stderr is a terminal, or the user asked for them."""
    return verbose or sys.stderr.isatty()


def report(error: BaseException) -> int:
    """Print an error in one line on stderr, without the name of the function that raised it.

    Args:
        error: what was raised.

    Returns:
        Exit status: 2 for an error that the user can correct, 1 for a failure.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f": {str(error.filename)!r}"
        text = error.strerror + name
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        text = re.sub(r"^[A-Za-z_]\w*(\.\w+)*: ", "", text)
        status = 2 if getattr(error, "errno", None) in _USERS_ERRNO else 1
    elif isinstance(error, MemoryError) or _FULL.search(text):  # torch's are RuntimeErrors
        text, status = f"there is not enough memory: {text}", 1
    else:
        text, status = f"{type(error).__name__}: {text} (--debug shows where)", 1
    note(f"comemo: error: {plain(text)[:600]}")
    return status
