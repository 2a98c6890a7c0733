"""Interrupted sessions: all of their parts agree, and the next answer is right."""

import threading

import pytest
import torch
from conftest import SLOW
from interrupting import Injected, find_places, interrupt_at
from small import place
from talks import GREEDY, At, afresh, check_same, make_chatty, make_picture, shown_in, start, throw

from comemo import DecodeLoop, MemoryStore
from comemo.decode.cache import RoomyCache

pytestmark = pytest.mark.usefixtures("one_thread")
STATE = {"session.py", "conversation.py", "transcript.py", "cache.py", "prefill.py", "decode.py"}
STATE |= {"store.py"}


@pytest.fixture(scope="module")
def chatty(processor):
    return make_chatty(processor)


@pytest.mark.parametrize("visibility", ["causal", "all"])
def test_a_withdrawn_picture_is_seen_by_no_token(chatty, visibility):
    """Another image of the same size takes its index."""
    first, withdrawn, second = make_picture(1), make_picture(2), make_picture(3)
    session = start(chatty, visibility=visibility)
    session.ask("what is this?", first)
    with pytest.raises(Injected):
        session.ask("now compare with <image> this", withdrawn, streamer=At(1))
    fresh = afresh(session, shown_in(session, first))
    for either in (session, fresh):
        either.ask("now compare with <image> this", second)
    check_same(session, fresh)


def test_pictures_that_stay_stand_elsewhere(chatty):
    """The words before them are the same, but read them at other positions."""
    pictures = make_picture(1), make_picture(2)
    session = start(chatty)
    session.ask("<image> and <image>", list(pictures))
    session.reset(keep_images=True)
    with pytest.raises(Injected):
        session.ask("see <image> and there <image>", streamer=At(1))
    fresh = afresh(session, shown_in(session, *pictures))
    for either in (session, fresh):
        either.ask("see <image> <image> both")
    check_same(session, fresh)


def test_a_fork_of_what_was_interrupted_copies_what_is_known(chatty):
    """Layers of several lengths, as after an interrupt within the decoder."""
    session, picture = start(chatty), make_picture(1)
    session.ask("what is this?", picture)
    layer = chatty[0].model.language_model.layers[2]
    handle = layer.register_forward_pre_hook(throw)
    with pytest.raises(Injected):
        session.ask("and then some more words")
    handle.remove()
    fork, fresh = session.fork(), afresh(session, shown_in(session, picture))
    assert len({at.get_seq_length() for at in fork._held.cache.layers}) == 1
    for each in (fork, session, fresh):
        each.ask("other words")
    check_same(fork, fresh)
    check_same(session, fresh)


def test_a_cache_is_right_wherever_it_was_interrupted():
    """Tokens that all layers held before are reused, whatever else the layers hold."""
    tokens = torch.arange(1.0, 801).reshape(1, 1, -1, 1)

    def grow(cache, start, end):
        for layer in range(len(cache.layers)):
            cache.update(tokens[:, :, start:end], -tokens[:, :, start:end], layer)

    def work(cache, start):
        cache.crop_to(start)
        for end in (start + 4, start + 600):  # within the allocated room, and beyond
            grow(cache, start, end)
            start = end
        cache.crop_to(start - 500)

    def begin(held):
        cache = RoomyCache(2)
        if held:
            grow(cache, 0, held)
        return cache

    for held, kept in ((0, 0), (5, 3), (5, 5)):
        places = find_places(lambda: work(begin(held), kept))  # noqa: B023
        assert len(places) > 30
        for at in places:
            cache = begin(held)
            interrupt_at(lambda: work(cache, kept), at)  # noqa: B023
            interrupt_at(lambda: work(cache, kept), at)  # noqa: B023
            cache.crop_to(kept)
            grow(cache, kept, 700)
            for layer in cache.layers:
                assert torch.equal(layer.keys, tokens[:, :, :700]), at
                assert torch.equal(layer.values, -tokens[:, :, :700]), at


CALLS = {
    "ask": lambda session: session.ask("and <image> more", make_picture(5)),
    "text": lambda session: session.ask("more"),
    "regenerate": lambda session: session.regenerate(),
    "fork": lambda session: session.fork(),
    "reset": lambda session: session.reset(),
    "keep": lambda session: session.reset(keep_images=True),
    "loop": lambda session: session.ask("more"),
    "first loop": lambda session: session.ask("more"),
    "stored": lambda session: session.ask("and <image> more", make_picture(5)),
    "beams": lambda session: session.ask("more", num_beams=2),
    "stream": lambda session: list(session.stream("more")),
}

SIMILAR = ("text", "keep", "first loop", "beams")  # to others


def interrupt_everywhere(chatty, name, choose):
    """Interrupt a call at each of the chosen places, and ask again each time."""
    first, second, call = make_picture(1), make_picture(6), CALLS[name]
    base = start(chatty, visibility="all")
    base.ask("what is this?", first)
    base.ask("and that?")
    shown = shown_in(base, first)

    def begin():
        session = base.fork()
        if name == "first loop":
            session.options["decode_loop"] = DecodeLoop(session.model)
        if name == "stored":
            session.memory_store = MemoryStore(budget=20_000)  # room for one image
        return session

    if name == "loop":
        base.options["decode_loop"] = DecodeLoop(base.model)
    call(begin())  # fill caches of the process
    session = begin()
    places = choose(find_places(lambda: call(session)))
    assert len(places) >= 6
    afterwards = {}
    for at in places:
        session, others = begin(), {*threading.enumerate()}
        reached = interrupt_at(lambda: call(session), at)  # noqa: B023
        assert reached or name == "stream", f"{at} was not reached"  # its number of waits varies
        for thread in {*threading.enumerate()} - others:  # of an abandoned stream
            thread.join()
        said = session._state.conversation
        state = said.turns, len(said.images)
        if state not in afterwards:
            new = {p.number: make_picture(5)[0] for p in said.images if p.number not in shown}
            fresh = afresh(session, shown | new)
            fresh.ask("now this")
            afterwards[state] = fresh.fork(), fresh
            fresh.ask("and this", second)
        for wanted, pictures in zip(afterwards[state], (None, second), strict=True):
            session.ask("and this" if pictures else "now this", pictures)
            check_same(session, wanted)
        if name == "stored":
            assert session.memory_store.stats.entries == 1
            assert session.memory_store.stats.bytes <= 20_000
    assert len(afterwards) < 4  # before, after, and for a stream the part so far


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW if name in SIMILAR else ()) for name in CALLS]
)
def test_wherever_it_is_interrupted(chatty, name, request):
    """At every place that touches a session's state; without --all at a sample of them."""
    every = request.config.getoption("--all")

    def choose(places):
        places = [at for at in places if at.file in STATE]
        few = places[:: max(1, len(places) // 6)]
        if name == "ask":
            few += [at for at in places if at.code.co_name in ("go_back", "crop_to", "claim")]
        return places if every else few

    interrupt_everywhere(chatty, name, choose)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_at_every_place_of_a_question(chatty, part):
    interrupt_everywhere(chatty, "ask", lambda places: places[part::4])


@pytest.mark.parametrize("called", [False, True])
def test_a_memory_that_was_being_built_serves_the_next_call(chatty, called, request):
    """Built at once, or by each layer if it has hooks."""
    model, ids = chatty[0], torch.arange(40, 64)[None]
    ids[:, 2:18] = model.config.image_token_id
    ids, (tiles, grid) = place(ids), make_picture(1)
    mask = ids == model.config.image_token_id
    places = model.model.prompt_position_ids(mask, torch.ones_like(ids), [grid])
    layers = [at.mixin for at in model.model.language_model.layers if at.mixin is not None]
    handles = [at.kv_proj.register_forward_hook(lambda *_: None) for at in layers if called]

    def begin():
        return model.model.build_image_memory(place(tiles), mask, places, [grid])

    one_token = GREEDY | {"max_new_tokens": 1}

    def answer(memory):
        return model.generate(ids, image_memory=memory, position_ids=places, **one_token)

    memory = begin()
    wanted, found = answer(memory), begin()
    moments = find_places(lambda: answer(found))
    building = ("mixin.py", "memory.py", "decoder.py")
    moments = [at for at in moments if at.file in building and at.code.co_name != "__init__"]
    if not request.config.getoption("--all"):
        moments = moments[:: len(moments) // 12]
    try:
        for at in moments:
            found = begin()
            assert interrupt_at(lambda: answer(found), at), at  # noqa: B023
            assert torch.equal(answer(found), wanted)
            for layer in memory.keys:
                torch.testing.assert_close(found.keys[layer], memory.keys[layer])
                torch.testing.assert_close(found.values[layer], memory.values[layer])
    finally:
        for handle in handles:
            handle.remove()
