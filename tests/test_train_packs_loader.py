"""The loader: each sample as often as it must come, whoever reads it; resumption; faults."""

import itertools
import math
from collections import Counter

import pytest
import torch
from train_lines import (  # noqa: F401
    lines_of,
    loader_of,
    mixed,
    same,
    settings_for,
    small_config,
    talk,
    words,
    workers_alive,
    write_lines,
    write_meta,
    write_picture,
)

from comemo.train.data.loader import make_loader

pytestmark = pytest.mark.usefixtures("one_thread")


def read_epochs(words, settings, epochs, ranks, total):
    """The batches of each rank, without fillers."""
    found = []
    for rank in range(ranks):
        streams = range(rank, total, ranks)
        loader = loader_of(words, settings, streams, total, epochs=epochs)
        found.append([])
        fillers = 0
        for batch in loader:
            fillers = 0 if batch["samples"] else fillers + 1
            if fillers == len(streams):  # every stream has ended
                break
            found[-1] += [batch] if batch["samples"] else []
    return found


REPEATS = {"a": {"repeat_time": 2.5}, "b": {"repeat_time": 0.5}, "c": {}}
SIZES = {"a": 4, "b": 7, "c": 11}


def expected(epochs):
    """How often each line must be read."""
    counts = Counter()
    for name, size in SIZES.items():
        repeat = REPEATS[name].get("repeat_time", 1)
        for sample in range(math.floor(repeat) * size + int(size * (repeat % 1))):
            counts[name, sample % size + 1] += epochs
    return counts


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("mixing", ["length", "sqrt", {"a": 1, "b": 5, "c": 0.1}])
def test_each_sample_is_read_as_often_as_it_must(words, tmp_path, ranks, mixing):
    settings = settings_for(write_meta(tmp_path, SIZES, **REPEATS), mixing=mixing)
    found = read_epochs(words, settings, 2, ranks, 6)
    assert Counter(lines_of(itertools.chain(*found))) == expected(2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("mixing", ["length", "sqrt"])
def test_each_sample_is_read_as_often_with_workers(words, tmp_path, ranks, workers, mixing):
    meta = write_meta(tmp_path, SIZES, **REPEATS)
    settings = settings_for(meta, mixing=mixing, workers=workers)
    found = read_epochs(words, settings, 2, ranks, 6)
    assert Counter(lines_of(itertools.chain(*found))) == expected(2)
    alone = read_epochs(words, settings_for(meta, mixing=mixing), 2, ranks, 6)
    for theirs, ours in zip(found, alone, strict=True):
        assert all(map(same, theirs, ours))


@pytest.mark.parametrize("ranks", [2, 3])
def test_streams_do_not_depend_on_the_number_of_ranks(words, tmp_path, ranks):
    settings = settings_for(write_meta(tmp_path, SIZES, **REPEATS))
    alone = iter(loader_of(words, settings, range(6), 6))
    loaders = [iter(loader_of(words, settings, range(r, 6, ranks), 6)) for r in range(ranks)]
    for _step in range(5):
        step = list(itertools.islice(alone, 6))
        for rank, loader in enumerate(loaders):
            assert all(same(next(loader), step[stream]) for stream in range(rank, 6, ranks))


def test_a_restarting_epoch_draws_by_weight(words, tmp_path):
    meta = write_meta(tmp_path, {"a": 2, "b": 30})
    settings = settings_for(meta, restart=True, mixing={"a": 1, "b": 1})
    read = Counter(lines_of(read_epochs(words, settings, 1, 1, 2)[0]))
    assert read.total() == 32
    ones, twos = read["a", 1], read["a", 2]
    assert abs(ones - twos) <= 1
    assert ones + twos > 6
    assert all(count == 1 for (name, _), count in read.items() if name == "b")


@pytest.mark.parametrize(("epochs", "count"), [(0.5, 4), (1.25, 10), (1, 8), (0.01, 0)])
def test_epochs_may_end_with_a_part(words, tmp_path, epochs, count):
    settings = settings_for(write_meta(tmp_path, {"a": 8}))
    (batches,) = read_epochs(words, settings, epochs, 1, 3)
    assert len(lines_of(batches)) == count


def test_a_stream_that_has_ended_gives_fillers(words, tmp_path):
    settings = settings_for(write_meta(tmp_path, {"a": 2}))
    loader = iter(loader_of(words, settings, range(3), 3, epochs=1))
    first, second, third, fourth = itertools.islice(loader, 4)
    assert [len(batch["samples"]) for batch in (first, second, third, fourth)] == [1, 1, 0, 0]
    assert third["input_ids"].shape == third["position_ids"].shape == (1, 2)
    assert (third["labels"] == -100).all()
    assert not third["loss_weights"].any()
    assert third["cu_seqlens"].tolist() == [0, 2]
    assert third["input_ids"].dtype == first["input_ids"].dtype == torch.int64
    assert third["loss_weights"].dtype == first["loss_weights"].dtype == torch.float32


def test_held_out_data_is_read_once_in_order(words, tmp_path):
    write_meta(tmp_path, {"a": 9})
    settings = settings_for(
        "", eval=str(tmp_path / "a.jsonl"), max_tokens=80, max_sample_tokens=80, mixing={"b": 1}
    )
    for streams in ([0], [0, 1]):
        batches = list(loader_of(words, settings, streams, len(streams), held_out=True))
        assert sorted(lines_of(batches)) == [("a", line) for line in range(1, 10)]
        assert all(batch["samples"] for batch in batches)
    one = list(loader_of(words, settings, held_out=True))
    for batch in one:
        assert lines_of([batch]) == sorted(lines_of([batch]))


def test_bad_samples_are_counted_and_told_once(words, mixed, caplog):
    loader = loader_of(words, settings_for(mixed), [0], 1, epochs=3)
    list(itertools.takewhile(lambda batch: batch["samples"], loader))
    assert loader.faults.counts == {"a": {"broken JSON": 3}, "b": {"not an object": 3}}
    assert loader.faults.total == 6
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert any("a.jsonl:8: skipped, broken JSON" in text for text in told)
    assert any("b.jsonl:10: skipped, not an object" in text for text in told)


def test_few_of_a_kind_are_told(words, tmp_path, caplog):
    path = write_lines(tmp_path / "a.jsonl", [talk("q", "a")] + [b"{"] * 30)
    loader = loader_of(words, settings_for(path), [0], 1, epochs=1)
    next(iter(loader))
    assert loader.faults.counts == {"a": {"broken JSON": 30}}
    assert len(caplog.records) == 20
    assert "more of this kind are only counted" in caplog.records[-1].getMessage()
    assert len(loader.faults.examples["a"]["broken JSON"]) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_can_stop(words, tmp_path, workers):
    path = write_lines(tmp_path / "a.jsonl", [talk("q", "a")] * 3 + [b"{"])
    loader = loader_of(words, settings_for(path, bad_data="stop", workers=workers))
    with pytest.raises(ValueError, match=r"a\.jsonl:4: broken JSON"):
        list(loader)
    assert not workers_alive()
    assert loader.state_dict()["streams"]["0"]["given"] == 0
    with pytest.raises(ValueError, match=r"a\.jsonl:4: broken JSON"):
        list(loader)


@pytest.mark.parametrize("streams", [1, 3])
def test_a_dataset_without_a_good_sample_ends_the_run(words, tmp_path, streams):
    meta = write_meta(tmp_path, {"a": 5, "b": 4})
    write_lines(tmp_path / "b.jsonl", [b"{", b"7", talk("q", ""), b"{"])
    loader = loader_of(words, settings_for(meta, buffer=0), range(streams), streams)
    with pytest.raises(ValueError, match=r"dataset 'b' of .* must have a sample .*broken JSON"):
        list(itertools.islice(loader, 30))


def test_a_stream_with_bad_samples_alone_goes_on(words, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [b"{"] * 3 + [talk("q", "a")])
    loader = loader_of(words, settings_for(path), range(4), 4)
    batches = list(itertools.islice(loader, 12))
    assert lines_of(batches) == [("a", 4)] * 12


def test_a_file_that_changes_is_told(words, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [talk("q", "a")] * 3)
    loader = loader_of(words, settings_for(path))
    write_lines(tmp_path / "a.jsonl", [talk("q", "b")] * 4)
    with pytest.raises(RuntimeError, match="must not change while it is read"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"streams": []}, r"streams must be different numbers below 2, got \[\]"),
        ({"streams": [0, 0]}, "streams must be different"),
        ({"streams": [2]}, "streams must be different"),
        ({"total": 0}, "total must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"epochs": 0}, "epochs must be a number above 0, got 0"),
        ({"epochs": "1"}, "epochs must be a number above 0"),
        ({"streams": [0], "total": 9}, "at least a sample for each of 9 packs of a step, got 8"),
        ({"held_out": True}, "wanted the path of a meta or JSONL file, got ''"),
        ({"held_out": True, "epochs": 1, "eval": True}, "held-out data is read once"),
    ],
)
def test_arguments_that_cannot_be_used(words, tmp_path, more, message):
    settings = settings_for(write_meta(tmp_path, {"a": 8}))
    if more.pop("eval", False):
        settings.eval = settings.train
    with pytest.raises(ValueError, match=message):
        make_loader(
            settings, words, small_config(), **{"streams": [0], "total": 2, "seed": 0, **more}
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train", 3),
        ("eval", 3),
        ("root", 3),
        ("too_long", "drop"),
        ("max_dynamic_patch", 1025),
        ("bad_data", None),
        ("loss_weight", "sum"),
        ("max_tokens", 0),
        ("max_tokens", "16384"),
        ("max_tiles", -1),
        ("buffer", True),
        ("max_sample_tokens", 1.5),
        ("workers", -1),
        ("max_dynamic_patch", 0),
        ("max_frames", 3),
        ("min_dynamic_patch", "2"),
        ("restart", "no"),
        ("use_thumbnail", 3),
        ("use_thumbnail", False),
        ("mixing", "even"),
    ],
)
def test_settings_that_cannot_be_used(words, tmp_path, name, value):
    settings = settings_for(write_meta(tmp_path, {"a": 8}))
    setattr(settings, name, value)
    with pytest.raises(ValueError, match=f"data: .*{name}"):
        loader_of(words, settings)
