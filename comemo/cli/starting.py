"""Ctrl-C while the libraries are imported, which takes seconds; imported before everything else.

The process then ends at once, as it does after the command is done: there is nothing to clean up.
A KeyboardInterrupt would show a traceback from inside a library, or be lost there.
"""

import os
import signal
import sys


def _is_command() -> bool:
    """Whether this process is `comemo` or `python -m comemo`, not a program that imports it."""
    script = os.path.basename(sys.argv[0]) if sys.argv else ""
    if script == "-m":  # while Python looks for the module
        return ("-m", "comemo") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return os.path.splitext(script)[0] == "comemo"


def _leave(*_: object) -> None:
    os._exit(130)


_COMMAND = _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interruptible(work: bool) -> None:
    """Choose what Ctrl-C does while the command runs.

    Args:
        work: True to raise a KeyboardInterrupt, False to end the process at once.
    """
    if _COMMAND:
        signal.signal(signal.SIGINT, signal.default_int_handler if work else _leave)


interruptible(False)
