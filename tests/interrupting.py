"""Every place in a call where an exception can be raised: find them, then raise one there.

The interpreter looks at signals when a Python function begins and when a call has returned, and an
error comes from a call. A profiler is called at these moments, and its exceptions are raised there.
A `with` of a lock is entered and left within one of them.
"""

import gc
import os
import sys
from contextlib import contextmanager
from types import CodeType
from typing import NamedTuple

import comemo

OURS = os.path.dirname(comemo.__file__)


class Injected(BaseException):
    """Raised by these tests only."""


class Place(NamedTuple):
    """A moment in this project's code: before or after a call, or the start of a function.

    Attributes:
        code: of the function.
        instruction: of the call; the first one at the start of a function.
        event: of the profiler.
        begins: whether code outside this project called the function.
    """

    code: CodeType
    instruction: int
    event: str
    begins: bool

    @property
    def file(self):
        return os.path.basename(self.code.co_filename)

    def __str__(self):
        return f"{self.file}:{self.code.co_name}:{self.instruction}:{self.event}"


def _place_of(frame, event, arg):
    if event.startswith("c_"):
        if arg.__name__ == "__exit__":  # of a lock
            return None
        begins = False
    else:
        caller = frame.f_back
        begins = caller is None or not caller.f_code.co_filename.startswith(OURS)
        frame = frame if begins else caller
    if not frame.f_code.co_filename.startswith(OURS):
        return None
    return Place(frame.f_code, frame.f_lasti, event, begins)


@contextmanager
def _profiler(watch):
    """Disable garbage collection: finalizers run at arbitrary places."""
    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


def find_places(call):
    """All places that a call passes, in order, without repeats."""
    found = {}

    def watch(frame, event, arg):
        if (place := _place_of(frame, event, arg)) is not None:
            found.setdefault(place)

    with _profiler(watch):
        call()
    return list(found)


def interrupt_at(call, place):
    """Make a call and raise `Injected` when it first reaches a place; returns whether it did."""
    code, _, wanted, _ = place

    def watch(frame, event, arg):
        if event == wanted:  # and not the whole question at once: there are many moments
            caller = frame.f_back
            near = frame.f_code is code or (caller is not None and caller.f_code is code)
            if near and _place_of(frame, event, arg) == place:
                raise Injected

    return _interrupted(call, watch)


def count_moments(call):
    """How many moments a call has, see `interrupt_after`."""
    found = 0

    def watch(frame, event, arg):
        nonlocal found
        found += _place_of(frame, event, arg) is not None

    with _profiler(watch):
        call()
    return found


def interrupt_after(call, moments):
    """Make a call and raise `Injected` after so many moments; returns whether it got that far."""

    def watch(frame, event, arg):
        nonlocal moments
        if _place_of(frame, event, arg) is not None:
            moments -= 1
            if moments < 0:
                raise Injected

    return _interrupted(call, watch)


def _interrupted(call, watch):
    try:
        with _profiler(watch):
            call()
    except Injected:
        return True
    return False
