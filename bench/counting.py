"""Counting calls of methods."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def count_calls(objects: Sequence[Any], method: str) -> Iterator[list[int]]:
    """Count the calls of a method of these objects; they are as before afterwards.

    Args:
        objects: which; their class and its other objects are left alone.
        method: its name.

    Yields:
        A list of one number that goes up.
    """
    count = [0]

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return call(*args, **kwargs)

        return wrapper

    own = [vars(item).get(method) for item in objects]  # a module's, not one of a class
    try:
        for item in objects:
            vars(item)[method] = counted(getattr(item, method))
        yield count
    finally:
        for item, before in zip(objects, own, strict=True):
            if before is None:
                vars(item).pop(method, None)
            else:
                vars(item)[method] = before
