"""Resumption after any batch, with any number of workers and ranks; workers that end."""

import copy
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from interrupting import find_places, interrupt_at
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

pytestmark = pytest.mark.usefixtures("one_thread")


def check_resumes(words, settings, streams, total, count, epochs=None, following=4):
    """Resuming after each batch gives the batches that remain, as many as are read."""
    whole = loader_of(words, settings, streams, total, epochs=epochs)
    batches, states = [], [whole.state_dict()]
    for batch in itertools.islice(whole, count):
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state_dict())))
    for done, state in enumerate(states[:-1]):
        resumed = loader_of(words, settings, streams, total, epochs=epochs)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        rest = list(itertools.islice(resumed, min(count - done, following)))
        assert all(map(same, rest, batches[done:]))
        assert resumed.state_dict() == states[done + len(rest)]
    return whole


def test_resuming_gives_the_same_remaining_batches(words, mixed):
    settings = settings_for(mixed, max_tokens=250, min_frames=2)
    loader = check_resumes(words, settings, [0, 2], 3, 20)
    assert loader.faults.counts["a"]["broken JSON"] > 1
    assert loader.faults.counts["b"]["not an object"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("restart", "mixing"), [(False, "sqrt"), (True, {"a": 2, "b": 1})])
@pytest.mark.parametrize("epochs", [None, 1.5])
def test_resuming_with_every_option(words, mixed, workers, restart, mixing, epochs):
    settings = settings_for(mixed, workers=workers, restart=restart, mixing=mixing, min_frames=2)
    check_resumes(words, settings, [0, 1], 2, 8, epochs, 1)
    assert not workers_alive()


def test_workers_change_nothing(words, mixed):
    alone, two = (
        loader_of(words, settings_for(mixed, workers=workers, min_frames=2), [0, 1], 2)
        for workers in (0, 2)
    )
    torch.manual_seed(3)
    running = iter(two)
    for batch in itertools.islice(alone, 8):
        assert same(batch, next(running))
        assert alone.state_dict() == two.state_dict()
    assert torch.initial_seed() == 3
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert drawn == torch.rand(1)  # nothing was drawn in between
    assert workers_alive()
    two.close()
    assert not workers_alive()


def test_a_loop_that_is_left_leaves_no_worker(words, mixed):
    loader = loader_of(words, settings_for(mixed, workers=2))
    for _batch in loader:
        assert workers_alive()
        break
    assert not workers_alive()
    following = next(iter(loader))
    assert not workers_alive()
    alone = loader_of(words, settings_for(mixed))
    assert same(following, list(itertools.islice(alone, 2))[1])
    running = iter(loader)
    next(running)
    assert workers_alive()
    loader.close()
    assert not workers_alive()


PARTS = {"loader.py", "streams.py", "packs.py", "faults.py", "order.py", "batches.py"}


@pytest.mark.parametrize("every", [80, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupted_batch_is_made_again(words, mixed, every):
    settings = settings_for(mixed, min_frames=2, max_tokens=250)
    arguments = (words, settings, [0, 1], 2)
    reference = loader_of(*arguments)
    batches = list(itertools.islice(reference, 11))

    def begun():
        """A loader that is about to end an epoch of a stream."""
        loader = loader_of(*arguments)
        run = iter(loader)
        assert all(map(same, itertools.islice(run, 8), batches))
        return loader, run

    loader, run = begun()
    before, faults = loader.state_dict(), copy.deepcopy(loader.faults.counts)
    places = [
        place
        for place in find_places(lambda: next(run))
        # no signal comes between the last step and the handing over, which this event is
        if place.file in PARTS and (place.event, place.code.co_name) != ("return", "_give_out")
    ]
    after = loader.state_dict()
    assert len(places) > 60
    assert before != after
    for place in places[::every]:
        loader, run = begun()
        assert interrupt_at(lambda run=run: next(run), place), place
        assert loader.state_dict() == before, place
        assert all(map(same, itertools.islice(loader, 3), batches[8:])), place
    loader, run = begun()
    assert loader.faults.counts == faults
    assert same(next(run), batches[8])
    assert loader.state_dict() == after


CHILD = """
import os, sys, time
sys.path.insert(0, "tests")
from comemo import InternLM2Tokenizer
from train_lines import loader_of, settings_for
words = InternLM2Tokenizer.from_pretrained(sys.argv[1])
next(run := iter(loader_of(words, settings_for(sys.argv[2], workers=2))))
print(*(child.pid for child in __import__("multiprocessing").active_children()), flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(demo_checkpoint, mixed):
    command = [sys.executable, "-c", CHILD, str(demo_checkpoint), mixed]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    until = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < until:
        time.sleep(0.2)
    alive = [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
    assert not [pid for pid in alive if ") Z " not in Path(f"/proc/{pid}/stat").read_text()]


def test_states_of_ranks_unite(words, mixed):
    settings = settings_for(mixed, min_frames=2)
    whole = loader_of(words, settings, range(4), 4)
    list(itertools.islice(whole, 8))
    ranks = [loader_of(words, settings, [rank, rank + 2], 4) for rank in (0, 1)]
    for rank in ranks:
        list(itertools.islice(rank, 4))
    first, second = (rank.state_dict() for rank in ranks)
    united = {**first, "streams": first["streams"] | second["streams"]}
    assert united["streams"] == whole.state_dict()["streams"]
    third = loader_of(words, settings, [3, 1, 0], 4)
    third.load_state_dict(united)
    following = dict(zip(range(4), whole, strict=False))
    for stream, batch in zip([3, 1, 0], third, strict=False):
        assert same(batch, following[stream])


def test_states_that_do_not_fit(words, tmp_path):
    settings = settings_for(write_meta(tmp_path, {"a": 8}))
    state = loader_of(words, settings, [0], 2).state_dict()
    for wrong in (None, {}, {"streams": 3}):
        with pytest.raises(ValueError, match="a state of a loader"):
            loader_of(words, settings, [0], 2).load_state_dict(wrong)
    broken = {**state, "streams": {"0": {"epoch": 0}}}
    with pytest.raises(ValueError, match=r"a state of stream \[0\], got \['0'\]"):
        loader_of(words, settings, [0], 2).load_state_dict(broken)
    with pytest.raises(ValueError, match=r"a state of stream \[1\], got \['0'\]"):
        loader_of(words, settings, [0, 1], 2).load_state_dict(state)
    for key, other in {
        "seed": loader_of(words, settings, [0], 2, seed=5),
        "streams": loader_of(words, settings, [0], 3),
        "max_tokens": loader_of(words, settings_for(settings.train, max_tokens=500), [0], 2),
        "mixing": loader_of(words, settings_for(settings.train, mixing="sqrt"), [0], 2),
    }.items():
        with pytest.raises(ValueError, match=f"the data must be as it was: {key} was"):
            other.load_state_dict(state)
