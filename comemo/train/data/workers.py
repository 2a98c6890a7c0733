"""Processes that read samples, in the order in which they are asked for."""

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

# Samples read while a step computes, so that the next one does not wait: about a pack of images for
# each stream. They wait as pixels, so a worker reads no more than MOST_AHEAD.
SAMPLES_AHEAD, MOST_AHEAD = 8, 64


class Lazy:
    """An iterable that asks for each element when it is needed."""

    def __init__(self, make: Any):
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return self.make()


def read_in_order(reads: Any, requests: Any, workers: int, streams: int = 0) -> DataLoader:
    """A DataLoader that answers requests in their order.

    Args:
        reads: a dataset of requests.
        requests: iterable, asked a few requests ahead.
        workers: processes; 0 for none.
        streams: how many take what is read.
    """
    ahead = min(max(2, SAMPLES_AHEAD * streams // workers), MOST_AHEAD) if workers else None
    return DataLoader(
        reads,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        prefetch_factor=ahead,
        worker_init_fn=_end_with_parent if workers else None,
        collate_fn=_as_it_is,  # as arrays: tensors would each need a file descriptor
        generator=torch.Generator(),  # so that nothing is drawn from the global one
    )


def _end_with_parent(_: int) -> None:
    """End a worker after its parent was killed.

    torch's own check ends its loop, but not the process: samples that nobody takes are waited for.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(result: Any) -> Any:
    return result
