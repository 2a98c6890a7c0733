"""What a run will read: packs, samples, labels, tiles, found without decoding an image."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from comemo.config import CoMemoConfig
from comemo.train.data.checks import check_count, check_epochs
from comemo.train.data.faults import FaultLog
from comemo.train.data.loader import open_data
from comemo.train.data.order import Order
from comemo.train.data.packs import Packer
from comemo.train.data.reads import Reads, Request
from comemo.train.data.samples import Size
from comemo.train.data.streams import Epochs
from comemo.train.data.workers import read_in_order
from comemo.train.settings import DataSettings


@dataclass
class DatasetPlan:
    """Of one dataset: lines that are used, samples read in all epochs, and what they hold.

    Attributes:
        lines: of the file, that are read at all.
        samples: read in all epochs, without bad ones.
        tokens, labels, tiles: of these samples.
        bad: number of bad lines by kind.
    """

    lines: int
    samples: int = 0
    tokens: int = 0
    labels: int = 0
    tiles: int = 0
    bad: dict[str, int] = field(default_factory=dict)


@dataclass
class Plan:
    """Of a run over some epochs.

    Attributes:
        packs: of each stream, in each epoch.
        steps: most packs of a stream, which are the steps of the optimizer.
        samples, tokens, labels, tiles: that are read, of all datasets.
        filled: share of the packs' `max_tokens` that tokens take.
        padding: share of tokens that are padding, always 0.
        datasets: by name.
        faults: bad lines, each counted once, as found by one reading.
    """

    packs: list[list[int]]
    steps: int
    samples: int
    tokens: int
    labels: int
    tiles: int
    filled: float
    padding: float
    datasets: dict[str, DatasetPlan]
    faults: FaultLog


def plan(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    config: CoMemoConfig,
    *,
    total: int,
    seed: int,
    epochs: float,
    cache: Path | None = None,
) -> Plan:
    """Count what `make_loader` will give out with the same arguments.

    Text is encoded and the headers of images are read, so the counts are exact unless pixels are
    damaged.

    Args:
        settings, tokenizer, config, total, seed, epochs, cache: see `make_loader`.

    Raises:
        ValueError: as `make_loader`; a dataset without a good sample; with `bad_data` "stop" any
            bad sample.
    """
    reads, order = open_data(settings, tokenizer, config, seed, False, cache, measures=True)
    check_count("total", total)
    check_epochs(1 if epochs is None else epochs)
    if epochs is None:
        raise ValueError("plan: epochs must be a number, got None")
    sizes, faults = _measure(reads, order, settings)
    datasets = _describe(reads, order, faults)
    packs = [
        _count_packs(reads, settings, stream, Epochs(order, total, epochs), sizes, datasets)
        for stream in range(total)
    ]
    every = datasets.values()
    tokens, given = sum(part.tokens for part in every), sum(map(sum, packs))
    return Plan(
        packs,
        max(map(sum, packs)),
        sum(part.samples for part in every),
        tokens,
        sum(part.labels for part in every),
        sum(part.tiles for part in every),
        tokens / (given * settings.max_tokens) if given else 0.0,
        0.0,
        datasets,
        faults,
    )


def _used(reads: Reads, order: Order) -> list[int]:
    """Lines of each dataset that are read at all."""
    return [
        min(count, len(lines)) if weight > 0 else 0
        for count, weight, lines in zip(order.counts, order.weights, reads.lines, strict=True)
    ]


def _measure(
    reads: Reads, order: Order, settings: DataSettings
) -> tuple[list[list[Size | None]], FaultLog]:
    """The size of each line, None for a bad one."""
    sizes: list[list[Size | None]] = [[] for _ in reads.lines]
    faults = FaultLog()
    requests: Iterable[Request] = (
        Request(0, 0, line, dataset, line)
        for dataset, used in enumerate(_used(reads, order))
        for line in range(used)
    )
    for result in read_in_order(reads, requests, settings.workers):
        if result.error is not None:
            raise RuntimeError(f"data: {reads.describe(result)}")
        if result.fault is not None:
            if settings.bad_data == "stop" and not result.varies:
                raise ValueError(f"data: {reads.describe(result)}")
            faults.add(result.place, *result.fault)
        again = Size(0, 0, 0, varies=True) if result.varies else None
        sizes[result.request.dataset].append(result.size or again)
    for collection, found in zip(reads.collections, sizes, strict=True):
        if found and not any(found):
            raise ValueError(
                f"data: dataset {collection.name!r} of {collection.annotation!r} must have a sample"
                f" that can be used, got none: {faults.describe(collection.name)}"
            )
    return sizes, faults


def _describe(reads: Reads, order: Order, faults: FaultLog) -> dict[str, DatasetPlan]:
    names = [collection.name for collection in reads.collections]
    used = zip(names, _used(reads, order), strict=True)
    return {name: DatasetPlan(lines, bad=dict(faults.counts.get(name, {}))) for name, lines in used}


def _count_packs(
    reads: Reads,
    settings: DataSettings,
    stream: int,
    epochs: Epochs,
    sizes: list[list[Size | None]],
    datasets: dict[str, DatasetPlan],
) -> list[int]:
    """Packs of a stream in each epoch; adds its samples to `datasets`."""
    plans = [datasets[collection.name] for collection in reads.collections]
    packer: Packer[None] = Packer(settings.max_tokens, settings.max_tiles, settings.buffer)
    found, epoch = [], 0
    while not epochs.ended(epoch):
        packs = 0
        chosen = (part.tolist() for part in epochs.of_stream(stream, epoch))
        for index, (dataset, sample) in enumerate(zip(*chosen, strict=True)):
            size = sizes[dataset][sample % len(reads.lines[dataset])]
            if size is not None and size.varies:
                position = stream + index * epochs.total
                size = reads[Request(stream, epoch, position, dataset, sample)].size
            if size is None:
                continue
            packs += len(packer.add(None, size.tokens, size.tiles))
            part = plans[dataset]
            part.samples += 1
            part.tokens += size.tokens
            part.labels += size.labels
            part.tiles += size.tiles
        found.append(packs + len(packer.flush()))
        epoch += 1
    return found
