"""Requests that wait: in turns among namespaces, in order within each."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Many requests of one namespace delay those of another by one request each."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def count(self, namespace: str) -> int:
        """How many of a namespace wait."""
        return len(self._queues.get(namespace, ()))

    def put(self, namespace: str, item: T) -> None:
        """Add one at the end of its namespace."""
        self._queues.setdefault(namespace, deque()).append(item)

    def first(self) -> T | None:
        """The one whose turn it is; None if nobody waits."""
        return next(iter(self._queues.values()))[0] if self._queues else None

    def pop(self) -> T:
        """Remove and return `first`; then it is the turn of the next namespace."""
        namespace, queue = next(iter(self._queues.items()))
        item = queue.popleft()
        del self._queues[namespace]
        if queue:
            self._queues[namespace] = queue
        return item

    def remove(self, namespace: str, item: T) -> bool:
        """Remove one that still waits; returns whether it did."""
        queue = self._queues.get(namespace)
        if queue is None or item not in queue:
            return False
        queue.remove(item)
        if not queue:
            del self._queues[namespace]
        return True

    def items(self) -> list[T]:
        """All that wait, in no order."""
        return [item for queue in self._queues.values() for item in queue]
