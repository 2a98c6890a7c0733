"""A stream: every S-th sample of the order of each epoch, and the packs that they fill."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from comemo.train.data.faults import FaultLog, Place
from comemo.train.data.order import Order
from comemo.train.data.packs import Pack, Packer
from comemo.train.data.reads import Request, Result
from comemo.train.data.samples import Sample


@dataclass
class Entry:
    """A sample in a pack.

    Attributes:
        epoch, index: its place in the stream.
        place: dataset, file and line number.
        sample: None until it is read again after a resumption.
    """

    epoch: int
    index: int
    place: Place | None = None
    sample: Sample | None = None


class Epochs:
    """What each stream reads in each epoch.

    Args:
        order: of the samples.
        total: number of streams.
        epochs: how many there are; None for no end.
    """

    def __init__(self, order: Order, total: int, epochs: float | None):
        self.order, self.total, self.epochs = order, total, epochs
        self._orders = lru_cache(maxsize=2)(order.epoch)

    def limit(self, epoch: int) -> int:
        """Positions of an epoch that are read; of the last one a part if `epochs` is not whole."""
        if self.epochs is None or epoch < math.floor(self.epochs):
            return self.order.length
        rest = self.epochs - math.floor(self.epochs) if epoch < self.epochs else 0
        return round(self.order.length * rest)

    def length(self, stream: int, epoch: int) -> int:
        """Samples of a stream in an epoch."""
        return max(-(-(self.limit(epoch) - stream) // self.total), 0)

    def ended(self, epoch: int) -> bool:
        """Whether there is no such epoch."""
        return self.epochs is not None and epoch >= self.epochs

    def of_stream(self, stream: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and sample of each index of a stream in an epoch; views of a shared array."""
        datasets, samples = self._orders(epoch)
        own = slice(stream, self.limit(epoch), self.total)
        return datasets[own], samples[own]


class Stream:
    """The place and the packs of a stream.

    Args:
        number: of the stream.
        epochs: what it reads.
        packer: an empty one.
    """

    def __init__(self, number: int, epochs: Epochs, packer: Packer[Entry]):
        self.number, self.epochs, self.packer = number, epochs, packer
        self.epoch = self.index = self.given = 0
        self.ready: deque[Pack[Entry]] = deque()
        self.faults = FaultLog()
        self._skip_empty()
        self.restart()

    @property
    def ended(self) -> bool:
        """Whether all its samples are used."""
        return self.epochs.ended(self.epoch)

    def restart(self) -> None:
        """Forget what was requested and not used."""
        self.queue: deque[Result] = deque()
        self.unused = 0
        self._requests = self._walk()
        self.pending = next(self._requests, None)

    def request(self) -> Request:
        """The next sample to read; there is one unless `pending` is None."""
        request, self.unused = self.pending, self.unused + 1
        self.pending = next(self._requests, None)
        if request is None:
            raise IndexError("the stream has ended")
        return request

    def missing(self) -> list[tuple[Pack[Entry], Entry, Request]]:
        """The samples in packs that must be read again after a resumption."""
        return [
            (pack, entry, self._request(entry.epoch, entry.index))
            for pack in (*self.ready, *self.packer.open)
            for entry in pack.items
            if entry.sample is None
        ]

    def use(self, result: Result) -> bool:
        """Take a sample, or pass over a bad one.

        Args:
            result: of the next request.

        Returns:
            Whether it was the last of its epoch.
        """
        self.unused -= 1
        if result.sample is not None:
            entry = Entry(self.epoch, self.index, result.place, result.sample)
            self.ready.extend(self.packer.add(entry, *result.sample.size))
        self.index += 1
        if self.index < self.epochs.length(self.number, self.epoch):
            return False
        self.ready.extend(self.packer.flush())
        self.epoch, self.index = self.epoch + 1, 0
        self._skip_empty()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Place and packs, JSON-able: samples by their index in the stream's part of the epoch."""
        return {
            "epoch": self.epoch,
            "position": self.index,
            "given": self.given,
            "open": [[entry.index for entry in pack.items] for pack in self.packer.open],
            "ready": [
                [pack.items[0].epoch, [entry.index for entry in pack.items]] for pack in self.ready
            ],
            "faults": self.faults.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place of a state; its samples are read again, see `missing`."""
        self.epoch, self.index, self.given = state["epoch"], state["position"], state["given"]
        self.packer.open = [_empty_pack(self.epoch, indices) for indices in state["open"]]
        self.ready = deque(_empty_pack(epoch, indices) for epoch, indices in state["ready"])
        self.faults = FaultLog()
        self.faults.merge(state["faults"])
        self.restart()

    def _skip_empty(self) -> None:
        """Go to the next epoch with samples of this stream, or to the end."""
        while not self.ended and not self.epochs.length(self.number, self.epoch):
            self.epoch += 1

    def _walk(self) -> Iterator[Request]:
        epoch, index = self.epoch, self.index
        while not self.epochs.ended(epoch):
            datasets, samples = (part.copy() for part in self.epochs.of_stream(self.number, epoch))
            for here in range(index, len(datasets)):
                position = self.number + here * self.epochs.total
                chosen = int(datasets[here]), int(samples[here])
                yield Request(self.number, epoch, position, *chosen)
            epoch, index = epoch + 1, 0

    def _request(self, epoch: int, index: int) -> Request:
        datasets, samples = self.epochs.of_stream(self.number, epoch)
        position = self.number + index * self.epochs.total
        return Request(self.number, epoch, position, int(datasets[index]), int(samples[index]))


def _empty_pack(epoch: int, indices: list[int]) -> Pack[Entry]:
    return Pack([Entry(epoch, index) for index in indices])
