"""Reading in threads, in order: some things are read before they are asked for."""

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

AT_ONCE = 4  # images: 12 megapixels are 48 MB, and about as much again while they are resized


class ReadAhead(Generic[Key, Result]):
    """Reads a few expected things in threads. Used in a `with`, by one thread.

    Args:
        read: from a key to what is read; called in threads.
        threads: that read at the same time; 0 to read nothing ahead.
        ahead: how many are read, or wait, before they are taken.
        keep: how many of the last ones taken are kept for another time.
    """

    def __init__(
        self, read: Callable[[Key], Result], threads: int, ahead: int, keep: int = 0
    ) -> None:
        self._read, self._threads, self._keep = read, threads, keep
        self._ahead = ahead if threads else 0
        self._waiting: dict[Key, Future[Result]] = {}
        self._kept: OrderedDict[Key, Result] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    def expect(self, keys: Iterable[Key]) -> None:
        """Start to read what is wanted next; the first `ahead` keys count.

        Args:
            keys: in the order in which they will be taken. What was expected before and is not
                among them is forgotten.
        """
        new = (key for key in keys if key not in self._kept)
        wanted = list(dict.fromkeys(itertools.islice(new, self._ahead)))
        for key in self._waiting.keys() - wanted:
            self._waiting.pop(key).cancel()
        for key in wanted:
            if key not in self._waiting:
                self._pool = self._pool or ThreadPoolExecutor(self._threads, "comemo-read-ahead")
                self._waiting[key] = self._pool.submit(self._read, key)

    def take(self, key: Key) -> Result:
        """What is read for a key; it is read here if it was not expected.

        Raises:
            Exception: what `read` raised for it.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        future = self._waiting.pop(key, None)
        result = self._read(key) if future is None else future.result()
        if self._keep:
            self._kept[key] = result
            if len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return result

    def __enter__(self) -> "ReadAhead[Key, Result]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the threads: what is being read is read to its end, the rest is not begun."""
        self._waiting.clear()
        self._kept.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def read_each(
    read: Callable[[Any, int], Result], sources: Sequence[Any], threads: int
) -> Iterator[Result]:
    """Read images in order, some of them ahead in threads.

    File objects, Pillow images and tensors are read in the caller's thread: two sources may be the
    same object, a file object may have to be waited for, and a tensor may be on a device.

    Args:
        read: from a source, and how many threads it may use, to what is yielded.
        sources: of images.
        threads: of all reading together.

    Yields:
        What `read` returned. At most `AT_ONCE` sources are read at the same time, and one more
        waits.

    Raises:
        Exception: what `read` raised, in the turn of its source. No thread is left.
    """
    apart = sum(map(_may_be_read_apart, sources))
    readers = min(threads, apart, AT_ONCE) if len(sources) > 1 and threads > 1 else 0
    within = max(1, threads // readers) if readers else threads
    ahead = readers + 1
    with ReadAhead[int, Result](lambda i: read(sources[i], within), readers, ahead) as reader:
        for index in range(len(sources)):
            rest = range(index, len(sources))
            reader.expect(i for i in rest if _may_be_read_apart(sources[i]))
            yield reader.take(index)


def _may_be_read_apart(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike, bytes, np.ndarray))
