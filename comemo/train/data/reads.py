"""Reading single samples by their place in the order of an epoch, in any process."""

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from comemo.train.data.faults import BadSample, Place
from comemo.train.data.lines import Lines
from comemo.train.data.meta import Collection
from comemo.train.data.samples import Sample, SampleReader, Size


class Request(NamedTuple):
    """Which sample to read, and for which stream."""

    stream: int
    epoch: int
    position: int  # in the epoch, of all streams
    dataset: int
    sample: int  # of the dataset


@dataclass
class Result:
    """What became of a request.

    Attributes:
        request: as given.
        place: dataset, file and line number.
        sample: None if it is bad, or the reading failed.
        size: instead of the sample, of `Reads` that only measure.
        fault: kind and message of a bad sample.
        varies: whether another reading of the line may be good.
        error: what went wrong in reading, with its trace; not the sample's fault.
    """

    request: Request
    place: Place
    sample: Sample | None = None
    size: Size | None = None
    fault: tuple[str, str] | None = None
    varies: bool = False
    error: str | None = None


class Reads(Dataset):
    """Samples of all datasets, by request; picklable.

    Args:
        collections: the datasets.
        lines: of each.
        reader: makes the samples.
        seed: of the random numbers, together with epoch and position of a request.
        held_out: no augmentation and no random numbers.
        measures: only the sizes of samples are found.
    """

    def __init__(
        self,
        collections: list[Collection],
        lines: list[Lines],
        reader: SampleReader,
        seed: int,
        held_out: bool = False,
        measures: bool = False,
    ):
        self.collections, self.lines, self.reader = collections, lines, reader
        self.seed, self.held_out, self.measures = seed, held_out, measures

    def __getitem__(self, request: Request) -> Result:
        """Read a sample. Errors are part of the result: nothing is raised in a worker."""
        collection, lines = self.collections[request.dataset], self.lines[request.dataset]
        line = request.sample % len(lines)
        result = Result(request, self.place(request))
        rng = None
        if not self.held_out:
            rng = np.random.default_rng([self.seed, request.epoch, request.position, 1])
        try:
            if self.measures:
                result.size = self.reader.measure(collection, lines.read(line), rng)
            else:
                augment = collection.augment and not self.held_out
                result.sample = self.reader.read(collection, lines.read(line), rng, augment)
        except BadSample as fault:
            result.fault, result.varies = (fault.kind, fault.message), fault.varies
        except Exception:
            result.error = traceback.format_exc()
        return result

    def place(self, request: Request) -> Place:
        """Dataset, file and line number of a request."""
        collection, lines = self.collections[request.dataset], self.lines[request.dataset]
        number = lines.number(request.sample % len(lines))
        return collection.name, collection.annotation, number

    def describe(self, result: Result) -> str:
        """File, line and what is wrong, for a message."""
        _, file, number = result.place
        what = ": ".join(result.fault) if result.fault else result.error
        return f"{file}:{number}: {what}"

    def find_good(self, dataset: int) -> bool:
        """Whether a dataset has a sample that can be used; reads until there is one."""
        lines = len(self.lines[dataset])
        for line in range(min(self.collections[dataset].count(lines), lines)):
            result = self[Request(0, 0, line, dataset, line)]
            if result.error is not None:
                raise RuntimeError(f"data: {self.describe(result)}")
            if result.sample is not None or result.size is not None:
                return True
        return False


def open_lines(collections: list[Collection], cache: Path | None) -> list[Lines]:
    """Index the files of datasets.

    Args:
        collections: the datasets.
        cache: folder of the indices, or None.

    Raises:
        ValueError: a file without lines, or that cannot be read.
    """
    found = []
    for collection in collections:
        where = f"data: dataset {collection.name!r}"
        try:
            lines = Lines(collection.annotation, cache)
        except OSError as error:
            raise ValueError(f"{where}: {collection.annotation!r}: {error}") from error
        if not len(lines):
            raise ValueError(f"{where} must have lines, got none in {collection.annotation!r}")
        collection.check_length(len(lines))
        found.append(lines)
    return found
