"""Count calls of a method, for tests and benchmarks that say how often something is computed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def count_calls(objects: Sequence[Any], method: str) -> Iterator[list[int]]:
    """Count the calls of a method on these objects inside the `with` block.

    Args:
        objects: instances or modules; their classes and other instances are not touched.
        method: its name.

    Yields:
        A list of one integer, the number of calls so far.
    """
    count = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return call(*args, **kwargs)

        return wrapper

    # None where the method is the class's; a module has its functions itself.
    own = [vars(item).get(method) for item in objects]
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
