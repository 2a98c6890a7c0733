"""Packing and order: what shares a row, and how often each sample comes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comemo.train.data.order import Order, weights_of
from comemo.train.data.packs import Packer

MAX_TOKENS, MAX_TILES = 20, 6
SAMPLES = st.lists(st.tuples(st.integers(1, MAX_TOKENS), st.integers(0, MAX_TILES)), max_size=60)


def pack_all(samples, buffer):
    """Packs in the order in which they are given out, and open packs after each sample."""
    packer = Packer(MAX_TOKENS, MAX_TILES, buffer)
    packs, still_open = [], []
    for index, (tokens, tiles) in enumerate(samples):
        packs += packer.add(index, tokens, tiles)
        still_open.append(len(packer.open))
    return packs + packer.flush(), still_open, packer


@given(samples=SAMPLES, buffer=st.integers(0, 4))
def test_packs_hold_each_sample_once_and_no_more_than_fits(samples, buffer):
    packs, still_open, packer = pack_all(samples, buffer)
    assert sorted(index for pack in packs for index in pack.items) == list(range(len(samples)))
    assert not packer.open
    assert max(still_open, default=0) <= buffer
    for pack in packs:
        assert pack.items == sorted(pack.items)
        assert pack.tokens == sum(samples[index][0] for index in pack.items) <= MAX_TOKENS
        assert pack.tiles == sum(samples[index][1] for index in pack.items) <= MAX_TILES


@given(samples=SAMPLES)
def test_no_two_packs_that_were_open_together_could_be_one(samples):
    packer = Packer(MAX_TOKENS, MAX_TILES, 100)
    for index, (tokens, tiles) in enumerate(samples):
        packer.add(index, tokens, tiles)
    newest = [pack.items[0] for pack in packer.open]
    assert newest == sorted(newest)
    for older, later in zip(packer.open, packer.open[1:], strict=False):
        tokens, tiles = samples[later.items[0]]  # it began a pack because none had room
        before = [index for index in older.items if index < later.items[0]]
        assert (
            sum(samples[index][0] for index in before) + tokens > MAX_TOKENS
            or sum(samples[index][1] for index in before) + tiles > MAX_TILES
        )


def test_a_sample_goes_to_the_pack_with_most_tiles_and_full_packs_leave():
    packer = Packer(10, 4, 3)
    assert packer.add("a", 6, 1) == []
    assert packer.add("b", 6, 2) == []
    assert packer.add("c", 2, 1) == []
    assert [pack.items for pack in packer.open] == [["a"], ["b", "c"]]
    (full,) = packer.add("d", 1, 1)  # tiles
    assert full.items == ["b", "c", "d"]
    (full,) = packer.add("e", 4, 0)  # tokens
    assert full.items == ["a", "e"]


def test_the_fullest_pack_leaves_when_too_many_are_open():
    packer = Packer(10, 4, 2)
    assert packer.add("a", 6, 1) == []
    assert packer.add("b", 7, 1) == []
    (fullest,) = packer.add("c", 8, 0)
    assert fullest.items == ["b"]
    assert [pack.items for pack in packer.flush()] == [["a"], ["c"]]
    assert packer.flush() == []


COUNTS, WEIGHTS = (7, 1, 30), (7.0, 4.0, 2.0)


def test_an_epoch_has_each_sample_once():
    order = Order(COUNTS, WEIGHTS, seed=3)
    epochs = [order.epoch(epoch) for epoch in range(3)]
    for datasets, samples in epochs:
        assert (datasets.dtype, samples.dtype) == (np.uint16, np.uint32)
        read = Counter(zip(datasets.tolist(), samples.tolist(), strict=True))
        assert read == Counter((d, j) for d, count in enumerate(COUNTS) for j in range(count))
    assert len({tuple(samples.tolist()) for _, samples in epochs}) == 3
    again = Order(COUNTS, WEIGHTS, seed=3).epoch(2)
    other = Order(COUNTS, WEIGHTS, seed=4).epoch(2)
    assert all(np.array_equal(*pair) for pair in zip(epochs[2], again, strict=True))
    assert not np.array_equal(epochs[2][1], other[1])


def test_a_heavier_dataset_comes_earlier():
    order = Order((4000, 4000), (3.0, 1.0), seed=0)
    datasets, _ = order.epoch(0)
    first = (datasets[:2000] == 0).mean()
    assert abs(first - 0.75) < 0.03  # three standard deviations
    assert (datasets[-1000:] == 1).all()


def test_a_used_up_dataset_begins_again():
    order = Order((3, 200), (1.0, 1.0), seed=0, restart=True)
    datasets, samples = order.epoch(0)
    assert order.length == len(datasets) == 203
    small = samples[datasets == 0].tolist()
    assert 70 < len(small) < 130
    rounds = [small[start : start + 3] for start in range(0, len(small) // 3 * 3, 3)]
    assert all(sorted(part) == [0, 1, 2] for part in rounds)
    assert len({tuple(part) for part in rounds}) == 6  # each in a new order
    large = samples[datasets == 1].tolist()
    assert len(set(large)) == len(large)


@pytest.mark.parametrize("restart", [False, True])
def test_a_weight_of_zero_leaves_a_dataset_out(restart):
    order = Order(COUNTS, (1.0, 0.0, 1.0), seed=0, restart=restart)
    datasets, _ = order.epoch(0)
    assert len(datasets) == order.length == 37
    assert 1 not in datasets


def test_held_out_data_keeps_its_order():
    datasets, samples = Order((2, 3), (1.0, 1.0), seed=0, shuffled=False).epoch(0)
    assert datasets.tolist() == [0, 0, 1, 1, 1]
    assert samples.tolist() == [0, 1, 0, 1, 2]


def test_weights():
    names, counts = ["a", "b"], [4, 9]
    assert weights_of("length", names, counts) == (4, 9)
    assert weights_of("sqrt", names, counts) == (2, 3)
    assert weights_of({"b": 0, "a": 0.5}, names, counts) == (0.5, 0)


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        ("even", "mixing must be one of"),
        (["length"], "mixing must be one of"),
        (None, "mixing must be one of"),
        ({"a": 1}, r"a weight for each of \['a', 'b'\], got \['a'\]"),
        ({"a": 1, "b": 1, "c": 1}, "a weight for each of"),
        ({"a": -1, "b": 1}, "mixing of 'a' must be at least 0, got -1"),
        ({"a": "1", "b": 1}, "mixing of 'a' must be at least 0"),
        ({"a": float("nan"), "b": 1}, "mixing of 'a' must be at least 0"),
        ({"a": True, "b": 1}, "mixing of 'a' must be at least 0"),
        ({"a": 0, "b": 0}, "a weight above 0"),
    ],
)
def test_weights_that_cannot_be_used(mixing, message):
    with pytest.raises(ValueError, match=message):
        weights_of(mixing, ["a", "b"], [1, 2])
