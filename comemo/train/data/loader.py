"""Packs of training data, in an order that no number of processes changes."""

import hashlib
import json
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from comemo.config import CoMemoConfig
from comemo.train.data.batches import make_batch, make_filler
from comemo.train.data.checks import check_count, check_data, check_epochs
from comemo.train.data.faults import FaultLog
from comemo.train.data.meta import read_collections
from comemo.train.data.order import Order, weights_of
from comemo.train.data.packs import Packer
from comemo.train.data.reads import Reads, Request, Result, open_lines
from comemo.train.data.samples import SampleReader
from comemo.train.data.streams import Epochs, Stream
from comemo.train.data.workers import Lazy, read_in_order
from comemo.train.settings import DataSettings


def make_loader(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    config: CoMemoConfig,
    *,
    streams: Sequence[int],
    total: int,
    seed: int,
    epochs: float | None = None,
    held_out: bool = False,
    cache: Path | None = None,
) -> "PackLoader":
    """The packs of some streams.

    Args:
        settings: of the data.
        tokenizer, config: of the model.
        streams: numbers of the streams that are given out, below `total`.
        total: number of streams of all processes: stream s reads the samples s, s + total, ... of
            each epoch.
        seed: of order and augmentation.
        epochs: how often all data is read; None for no end.
        held_out: read `settings.eval` once, in the order of the file, without augmentation.
        cache: folder for indices of the files; None keeps them in memory.

    Raises:
        ValueError: settings or files that cannot be used; without `epochs`, fewer samples than
            streams.
    """
    reads, order = open_data(settings, tokenizer, config, seed, held_out, cache)
    check_count("total", total)
    numbers = list(streams)
    if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(total)):
        wanted = f"different numbers below {total}"
        raise ValueError(f"make_loader: streams must be {wanted}, got {numbers}")
    if held_out:
        if epochs is not None:
            raise ValueError(f"make_loader: held-out data is read once, got epochs {epochs}")
        epochs = 1
    check_epochs(epochs)
    if epochs is None and order.length < total:
        raise ValueError(
            f"make_loader: data must have at least a sample for each of {total} packs of a step,"
            f" got {order.length}"
        )
    return PackLoader(reads, order, settings, numbers, total, epochs)


def open_data(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    config: CoMemoConfig,
    seed: int,
    held_out: bool,
    cache: Path | None,
    measures: bool = False,
) -> tuple[Reads, Order]:
    """The samples of a meta or JSONL file, and their order; see `make_loader` and `Reads`."""
    check_data(settings)
    check_count("seed", seed, 0)
    path = settings.eval if held_out else settings.train
    lists = [name for name in (settings.train, settings.eval) if (name or "").endswith(".jsonl")]
    applies = path in lists or not lists
    collections = read_collections(path or "", settings.root if applies else None)
    reader = SampleReader(settings, tokenizer, config)
    lines = open_lines(collections, cache)
    counts = [part.count(len(found)) for part, found in zip(collections, lines, strict=True)]
    names = [part.name for part in collections]
    # weights are those of the training data: a held-out file has other names
    weights = weights_of("length" if held_out else settings.mixing, names, counts)
    restart = settings.restart and not held_out
    order = Order(tuple(counts), weights, seed, restart, not held_out)
    return Reads(collections, lines, reader, seed, held_out, measures), order


class PackLoader:
    """Gives out batches of one pack each; see `make_loader`.

    Streams take turns. With `epochs`, a stream that has ended gives fillers: two tokens without
    labels. Held-out data ends when all streams have. A batch is a dict:

    - `input_ids`, `labels`, `position_ids`: int64 [1, N]; labels are -100 where nothing is learnt;
    - `loss_weights`: float32 [1, N], 0 where the label is -100;
    - `cu_seqlens`: int64 [samples + 1], the bounds of the samples;
    - with images `pixel_values`: uint8 [T, 3, side, side], see `normalise_pixels`, and `tile_grid`:
      list of (cols, rows), both in the order of the images;
    - `samples`: (dataset, file, line number from 1) of each sample.

    Iteration goes on after the last batch that was given out, also after an error. When it ends, is
    closed or raises, its workers end too.

    Attributes:
        faults: bad samples, as of the batches that were given out.
    """

    def __init__(
        self,
        reads: Reads,
        order: Order,
        settings: DataSettings,
        streams: list[int],
        total: int,
        epochs: float | None,
    ):
        self.reads, self.settings = reads, settings
        self.faults = FaultLog()
        shared = Epochs(order, total, epochs)
        packing = (settings.max_tokens, settings.max_tiles, settings.buffer)
        self._streams = [Stream(number, shared, Packer(*packing)) for number in streams]
        self._by_number = {stream.number: stream for stream in self._streams}
        self._wanted = self._streams[0]
        self._good: set[int] = set()  # datasets with a sample that can be used
        self._results: Iterator[Result] | None = None
        self._run: weakref.ref[Any] | None = None  # it refers to this object
        self._within = False  # whether a batch was begun and not given out
        self._data = _fingerprint(reads, order, settings, total)
        self._states = {stream.number: stream.state_dict() for stream in self._streams}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.close()
        if self._within:
            self.load_state_dict(self.state_dict())
        run = self._give_out()
        self._run = weakref.ref(run)
        return run

    def close(self) -> None:
        """End the iteration and its workers."""
        run = None if self._run is None else self._run()
        self._run = None
        if run is not None:
            run.close()
        self._results = None

    def filler(self) -> dict[str, Any]:
        """What stands in for a pack: two tokens without labels."""
        return make_filler(self.reads.reader.encoder.tokenizer)

    def state_dict(self) -> dict[str, Any]:
        """Where the streams are after the batches that were given out.

        Returns:
            JSON-able: `streams`, by their number as text; `faults`, the counts of all; `data`, by
            which other data is recognised. States of loaders with other streams are united by
            uniting their `streams`: the rest is for people, or the same.
        """
        faults = FaultLog()
        for state in self._states.values():
            faults.merge(state["faults"])
        return {
            "streams": {str(number): state for number, state in self._states.items()},
            "faults": faults.counts,
            "data": self._data,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where the streams were. Samples of packs that are not full are read again.

        Args:
            state: what `state_dict` returned, of these or of more streams.

        Raises:
            ValueError: a state without one of the streams, of other data, or no state.
        """
        streams = state.get("streams") if isinstance(state, dict) else None
        if not isinstance(streams, dict) or "data" not in state:
            raise ValueError(f"load_state_dict: wanted a state of a loader, got {state!r:.60}")
        keys = next(iter(self._states.values())).keys()
        missing = [
            number
            for number in self._by_number
            if not isinstance(found := streams.get(str(number)), dict) or found.keys() != keys
        ]
        if missing:
            got = sorted(streams)
            raise ValueError(f"load_state_dict: wanted a state of stream {missing}, got {got}")
        for key, ours in self._data.items():
            if (theirs := state["data"].get(key)) != ours:
                raise ValueError(
                    f"load_state_dict: the data must be as it was: {key} was {theirs}, is {ours}"
                )
        self.close()
        faults = FaultLog(told=self.faults.told)
        for stream in self._streams:
            stream.load_state_dict(streams[str(stream.number)])
            faults.merge(stream.faults.state_dict())
        self.faults = faults
        self._states = {stream.number: stream.state_dict() for stream in self._streams}
        self._within = False

    def _give_out(self) -> Iterator[dict[str, Any]]:
        for each in self._streams:
            each.restart()
        self._within = True
        try:
            self._results = iter(self._make_reading())
            self._refill()
            while (stream := self._next_stream()) is not None:
                batch = self._make_batch(stream)
                self._states[stream.number] = stream.state_dict()
                self._within = False
                yield batch
                self._within = True
        finally:
            self._results = None  # ends the workers

    def _next_stream(self) -> Stream | None:
        """The first with the fewest batches given out; of held-out data, of those that go on."""
        streams = self._streams
        if self.reads.held_out:
            streams = [stream for stream in streams if stream.ready or not stream.ended]
        return min(streams, key=lambda stream: stream.given, default=None)

    def _make_batch(self, stream: Stream) -> dict[str, Any]:
        self._wanted = stream
        while not stream.ready and not stream.ended:
            while not stream.queue:
                result = self._next_result()
                self._by_number[result.request.stream].queue.append(result)
            self._use(stream, stream.queue.popleft())
        stream.given += 1
        if stream.ready:
            return make_batch(stream.ready.popleft())
        return self.filler()

    def _use(self, stream: Stream, result: Result) -> None:
        if result.fault is not None:
            if self.settings.bad_data == "stop":
                raise ValueError(f"data: {self.reads.describe(result)}")
            stream.faults.count(result.place, *result.fault)
            self.faults.add(result.place, *result.fault)
        else:
            self._good.add(result.request.dataset)
        if stream.use(result):
            self._check_datasets(stream)

    def _check_datasets(self, stream: Stream) -> None:
        """At the end of an epoch: no dataset may consist of bad samples alone."""
        for index, collection in enumerate(self.reads.collections):
            if index in self._good or collection.name not in stream.faults.counts:
                continue
            if not self.reads.find_good(index):
                found = self.faults.describe(collection.name)
                raise ValueError(
                    f"data: dataset {collection.name!r} of {collection.annotation!r} must have a"
                    f" sample that can be used, got none: {found}"
                )
            self._good.add(index)

    def _next_result(self) -> Result:
        if self._results is None:
            raise ValueError("PackLoader: the iteration was closed")
        result = next(self._results)
        if result.error is not None:
            raise RuntimeError(f"data: {self.reads.describe(result)}")
        return result

    def _refill(self) -> None:
        for stream in self._streams:
            for pack, entry, _ in stream.missing():
                result = self._next_result()
                if result.sample is None:
                    got = self.reads.describe(result)
                    raise ValueError(f"data: a sample of the state must be as it was, got {got}")
                entry.place, entry.sample = result.place, result.sample
                tokens, tiles = result.sample.size
                pack.tokens += tokens
                pack.tiles += tiles

    def _requests(self) -> Iterator[Request]:
        """What to read next: for the stream with the fewest samples that wait, the wanted first."""

        def urgency(stream: Stream) -> tuple[int, bool]:
            return stream.unused, stream is not self._wanted

        yield from [request for stream in self._streams for *_, request in stream.missing()]
        while live := [stream for stream in self._streams if stream.pending is not None]:
            yield min(live, key=urgency).request()

    def _make_reading(self) -> DataLoader:
        requests, streams = Lazy(self._requests), len(self._streams)
        return read_in_order(self.reads, requests, self.settings.workers, streams)


def _fingerprint(reads: Reads, order: Order, settings: DataSettings, total: int) -> dict[str, Any]:
    """What a state must have in common with the data that it is loaded into."""
    names = [collection.name for collection in reads.collections]
    rule = json.dumps([order.weights, order.restart, order.shuffled])
    return {
        "streams": total,
        "seed": order.seed,
        "samples": dict(zip(names, order.counts, strict=True)),
        "mixing": hashlib.sha256(rule.encode()).hexdigest()[:16],
        "max_tokens": settings.max_tokens,
        "max_tiles": settings.max_tiles,
    }
