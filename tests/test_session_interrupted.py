"""Sessions that something goes wrong in: all of their parts agree, and the next answer is right."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch
from conftest import SLOW
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from interrupting import Injected, find_places, interrupt_after, interrupt_at
from small import make_model, place
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from comemo import ChatSession, DecodeLoop, MemoryStore
from comemo.session import _State

GREEDY = {"max_new_tokens": 3, "do_sample": False}
pytestmark = pytest.mark.usefixtures("one_thread")
STATE = {"session.py", "conversation.py", "transcript.py", "cache.py", "prefill.py", "decode.py"}


def make_picture(seed, grid=(1, 1)):
    tiles = grid[0] * grid[1] + (grid != (1, 1))
    return torch.randn(tiles, 3, 112, 112, generator=torch.Generator().manual_seed(seed)), grid


@pytest.fixture(scope="module")
def chatty(processor):
    """A small model, and a processor whose tokenizer is its."""
    model = make_model(vocab_size=600)
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return model, processor


def start(chatty, **options):
    return ChatSession(*chatty, **GREEDY, **options)


def afresh(session, shown):
    """A session of the same conversation that holds nothing yet; `shown` is pixels by number."""
    fresh = ChatSession(
        session.model, session.processor, prefill_chunk_size=None, **session.options
    )
    said = session._state.said
    pictures = tuple(replace(p, pixel_values=place(shown[p.number])) for p in said.pictures)
    fresh._state = _State(replace(said, pictures=pictures))
    fresh._numbers = itertools.count(1000)
    return fresh


def check_same(session, fresh):
    """Answers, tokens, keys and values of the last question are those of a fresh session."""
    assert session.history == fresh.history
    held, wanted = session._held, fresh._held
    tokens = fresh.report.prompt_tokens
    assert session.report.prompt_tokens == tokens
    ours, theirs = held.transcript.columns, wanted.transcript.columns
    assert torch.equal(ours[1:], theirs[1:])
    text = ours[0].clamp(min=-1) == theirs[0].clamp(min=-1)  # pictures have other numbers
    assert bool(text.all())
    for mine, other in zip(held.cache.layers, wanted.cache.layers, strict=True):
        for a, b in ((mine.keys, other.keys), (mine.values, other.values)):
            torch.testing.assert_close(a[:, :, :tokens], b[:, :, :tokens], rtol=1e-3, atol=1e-4)


def shown_in(session, *pictures):
    """Pixels by number, of the pictures of a conversation in order."""
    numbers = [picture.number for picture in session._state.said.pictures]
    return dict(zip(numbers, (tiles for tiles, _ in pictures), strict=True))


class Raising(BaseStreamer):
    """Raises at its n-th token."""

    def __init__(self, at):
        self.left = at

    def put(self, value):
        if self.left == 0:
            raise Injected
        self.left -= 1

    def end(self):
        pass


@pytest.mark.parametrize("visibility", ["causal", "all"])
def test_a_withdrawn_picture_is_seen_by_no_token(chatty, visibility):
    """Its place in the row of pictures is taken by another, of the same size."""
    first, withdrawn, second = make_picture(1), make_picture(2), make_picture(3)
    session = start(chatty, visibility=visibility)
    session.ask("what is this?", first)
    with pytest.raises(Injected):
        session.ask("now compare with <image> this", withdrawn, streamer=Raising(1))
    fresh = afresh(session, shown_in(session, first))
    for either in (session, fresh):
        either.ask("now compare with <image> this", second)
    check_same(session, fresh)


def test_pictures_that_stay_stand_elsewhere(chatty):
    """The words before them are the same, but these saw them at other places."""
    pictures = make_picture(1), make_picture(2)
    session = start(chatty)
    session.ask("<image> and <image>", list(pictures))
    session.reset(keep_pictures=True)
    with pytest.raises(Injected):
        session.ask("see <image> and there <image>", streamer=Raising(1))
    fresh = afresh(session, shown_in(session, *pictures))
    for either in (session, fresh):
        either.ask("see <image> <image> both")
    check_same(session, fresh)


def test_a_fork_of_what_was_interrupted_copies_what_is_known(chatty):
    """Layers of several lengths, as an interrupt within the decoder leaves them."""
    session, picture = start(chatty), make_picture(1)
    session.ask("what is this?", picture)
    layer = chatty[0].model.language_model.layers[2]

    def interrupt(*_):
        raise Injected

    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(Injected):
        session.ask("and then some more words")
    handle.remove()
    fork, fresh = session.fork(), afresh(session, shown_in(session, picture))
    assert len({at.get_seq_length() for at in fork._held.cache.layers}) == 1
    for each in (fork, session, fresh):
        each.ask("other words")
    check_same(fork, fresh)
    check_same(session, fresh)


CALLS = {
    "ask": lambda session: session.ask("and <image> more", make_picture(5)),
    "text": lambda session: session.ask("more"),
    "regenerate": lambda session: session.regenerate(),
    "fork": lambda session: session.fork(),
    "reset": lambda session: session.reset(),
    "keep": lambda session: session.reset(keep_pictures=True),
    "loop": lambda session: session.ask("more"),
    "first loop": lambda session: session.ask("more"),
    "beams": lambda session: session.ask("more", num_beams=2),
    "stream": lambda session: list(session.stream("more")),
}


def interrupt_everywhere(chatty, name, choose):
    """Interrupt a call at the chosen places in turn, and ask on each time."""
    first, second, call = make_picture(1), make_picture(6), CALLS[name]
    base = start(chatty, visibility="all")
    base.ask("what is this?", first)
    base.ask("and that?")
    shown = shown_in(base, first)

    def begin():
        session = base.fork()
        if name == "first loop":
            session.options["decode_loop"] = DecodeLoop(session.model)
        return session

    if name == "loop":
        base.options["decode_loop"] = DecodeLoop(base.model)
        call(begin())
    session = begin()
    places = choose(find_places(lambda: call(session)))
    assert len(places) > 8
    afterwards = {}
    for at in places:
        session = begin()
        reached = interrupt_at(lambda: call(session), at)  # noqa: B023
        assert reached or name == "stream", f"{at} was not reached"  # how often that waits varies
        for thread in threading.enumerate():
            if thread is not threading.current_thread():  # of a stream that was left
                thread.join()
        said = session._state.said
        state = said.turns, len(said.pictures)
        if state not in afterwards:
            new = {p.number: make_picture(5)[0] for p in said.pictures if p.number not in shown}
            afterwards[state] = afresh(session, shown | new)
            afterwards[state].ask("now this", second)
        session.ask("now this", second)
        check_same(session, afterwards[state])
    assert len(afterwards) < 4  # before, after, and for a stream what had come so far


@pytest.mark.parametrize("name", CALLS)
def test_wherever_it_is_interrupted(chatty, name, request):
    """At every place where a session's state is touched; without --all at some of them."""
    every = request.config.getoption("--all")

    def choose(places):
        places = [at for at in places if at.file in STATE]
        return places if every else places[:: max(1, len(places) // 10)]

    interrupt_everywhere(chatty, name, choose)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_at_every_place_of_a_question(chatty, part):
    interrupt_everywhere(chatty, "ask", lambda places: places[part::4])
