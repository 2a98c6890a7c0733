"""Sessions that something goes wrong in: all of their parts agree, and the next answer is right."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from interrupting import Injected, find_places, interrupt_after, interrupt_at
from small import make_model, place
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from comemo import ChatSession, DecodeLoop, MemoryStore
from comemo.cache import RoomyCache
from comemo.session import _State

GREEDY = {"max_new_tokens": 3, "do_sample": False}
pytestmark = pytest.mark.usefixtures("one_thread")
STATE = {"session.py", "conversation.py", "transcript.py", "cache.py", "prefill.py", "decode.py"}
STATE |= {"store.py"}


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
    fresh = ChatSession(session.model, session.processor, prefill_chunk_size=None, **GREEDY)
    said = session._state.said
    pictures = tuple(replace(p, pixel_values=place(shown[p.number])) for p in said.pictures)
    fresh._state = _State(replace(said, pictures=pictures))
    fresh._numbers = itertools.count(1000)
    return fresh


def check_same(session, fresh):
    """Answers, tokens, keys and values of the last question are those of a fresh session."""
    assert session.history == fresh.history
    held, wanted = session._held, fresh._held
    tokens = session.report.prompt_tokens
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


def throw(*_):
    raise Injected


class At(BaseStreamer):
    """Does something at its n-th token."""

    def __init__(self, at, do=throw):
        self.left, self.do = at, do

    def put(self, value):
        if self.left == 0:
            self.do()
        self.left -= 1

    def end(self):
        pass


class Criterion(StoppingCriteria):
    """Raises behind the first token."""

    def __call__(self, *args, **kwargs):
        raise Injected


@pytest.mark.parametrize("visibility", ["causal", "all"])
def test_a_withdrawn_picture_is_seen_by_no_token(chatty, visibility):
    """Its place in the row of pictures is taken by another, of the same size."""
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
    """The words before them are the same, but these saw them at other places."""
    pictures = make_picture(1), make_picture(2)
    session = start(chatty)
    session.ask("<image> and <image>", list(pictures))
    session.reset(keep_pictures=True)
    with pytest.raises(Injected):
        session.ask("see <image> and there <image>", streamer=At(1))
    fresh = afresh(session, shown_in(session, *pictures))
    for either in (session, fresh):
        either.ask("see <image> <image> both")
    check_same(session, fresh)


def test_a_fork_of_what_was_interrupted_copies_what_is_known(chatty):
    """Layers of several lengths, as an interrupt within the decoder leaves them."""
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
    """Tokens that all layers held before are gone on from, whatever else is there."""
    tokens = torch.arange(1.0, 801).reshape(1, 1, -1, 1)

    def grow(cache, start, end):
        for layer in range(len(cache.layers)):
            cache.update(tokens[:, :, start:end], -tokens[:, :, start:end], layer)

    def work(cache, start):
        cache.crop_to(start)
        for end in (start + 4, start + 600):  # in the room that there is, and beyond
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
    "keep": lambda session: session.reset(keep_pictures=True),
    "loop": lambda session: session.ask("more"),
    "first loop": lambda session: session.ask("more"),
    "stored": lambda session: session.ask("and <image> more", make_picture(5)),
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
        if name == "stored":
            session.memory_store = MemoryStore(budget=20_000)  # one of the pictures
        return session

    if name == "loop":
        base.options["decode_loop"] = DecodeLoop(base.model)
        call(begin())
    session = begin()
    places = choose(find_places(lambda: call(session)))
    assert len(places) >= 6
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
    assert len(afterwards) < 4  # before, after, and for a stream what had come so far


@pytest.mark.parametrize("name", CALLS)
def test_wherever_it_is_interrupted(chatty, name, request):
    """At every place where a session's state is touched; without --all at some of most of them."""
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
    """Built at once, or by each layer that something hooks."""
    model, ids = chatty[0], torch.arange(40, 64)[None]
    ids[:, 2:18] = model.config.image_token_id
    ids, (tiles, grid) = place(ids), make_picture(1)
    mask = ids == model.config.image_token_id
    places = model.model.prompt_position_ids(mask, torch.ones_like(ids), [grid])
    layers = [at.mixin for at in model.model.language_model.layers if at.mixin is not None]
    handles = [at.kv_proj.register_forward_hook(lambda *_: None) for at in layers if called]

    def begin():
        return model.model.build_image_memory(place(tiles), mask, places, [grid])

    def answer(memory):
        return model.generate(
            ids, image_memory=memory, position_ids=places, **GREEDY | {"max_new_tokens": 1}
        )

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


WORDS = ("what is this?", "and <image> more", "<image> beside <image>", "a b c d e f g h")
WHERE = {
    "streamer": lambda: {"streamer": At(1)},
    "processor": lambda: {"logits_processor": [throw]},
    "criterion": lambda: {"stopping_criteria": [Criterion()]},
    "option": lambda: {"no_such_option": 1},
    "output": lambda: {"return_dict_in_generate": True},
}
HOW = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 3.0},
    "beams": {"num_beams": 2},
    "longer": {"max_new_tokens": 6},
}


class Talk(RuleBasedStateMachine):
    """Conversations in which much goes wrong, each answer beside that of a fresh session."""

    chatty = None
    two = st.integers(0, 1)
    words, seeds = st.sampled_from(WORDS), st.integers(1, 6)

    @initialize(
        visibility=st.sampled_from(["causal", "all"]),
        positions=st.sampled_from(["raw", "compressed"]),
        chunk=st.sampled_from([None, 20]),
        looped=st.booleans(),
        stored=st.booleans(),
    )
    def begin(self, visibility, positions, chunk, looped, stored):
        model, _ = self.chatty
        model.config.decode_positions = positions
        options = {"decode_loop": DecodeLoop(model)} if looped else {}
        options |= {"memory_store": MemoryStore()} if stored else {}
        session = start(self.chatty, visibility=visibility, prefill_chunk_size=chunk, **options)
        self.sessions, self.shown, self.looped = [session], {}, looped

    def session(self, which):
        return self.sessions[which % len(self.sessions)]

    def pictures_for(self, session, words, seed):
        """What the marks of a question want, beyond pictures that were kept."""
        said = session._state.said
        waiting = len(said.pictures) - sum(text.count("<image>") for text, _ in said.turns)
        more = max(words.count("<image>") - waiting, 0)
        words = words if words.count("<image>") >= waiting else words.replace("<image>", "")
        grids = (1, 1), (2, 1)
        return words, [make_picture(seed + i, grids[(seed + i) % 2]) for i in range(more)]

    def note(self, session, before, pictures):
        """Remember the pixels of pictures that a session has learnt to know."""
        known = {p.number for p in before}
        new = [p.number for p in session._state.said.pictures if p.number not in known]
        tiles = [tiles for tiles, _ in pictures]
        self.shown.setdefault(session, {}).update(zip(new, tiles, strict=False))

    @rule(which=two, words=words, seed=seeds, how=st.sampled_from(list(HOW)), stop=st.booleans())
    def ask(self, which, words, seed, how, stop):
        session = self.session(which)
        words, pictures = self.pictures_for(session, words, seed)
        before, options = session._state.said.pictures, dict(HOW[how])
        fresh = afresh(session, self.shown.get(session, {}))
        for either in (session, fresh):
            if stop and how != "beams":
                options["streamer"] = At(1, either.stop)
            torch.manual_seed(seed)
            either.ask(words, list(pictures), **options)
        self.note(session, before, pictures)
        check_same(session, fresh)

    @rule(which=two, words=words, seed=seeds, leave=st.integers(0, 2))
    def stream(self, which, words, seed, leave):
        session = self.session(which)
        words, pictures = self.pictures_for(session, words, seed)
        before = session._state.said.pictures
        for pieces, _ in enumerate(session.stream(words, list(pictures))):
            if pieces == leave:
                break
        self.note(session, before, pictures)

    @rule(which=two, words=words, seed=seeds, where=st.sampled_from(list(WHERE)))
    def fail(self, which, words, seed, where):
        session = self.session(which)
        words, pictures = self.pictures_for(session, words, seed)
        state = session._state
        with pytest.raises((Injected, ValueError)):
            session.ask(words, list(pictures), **WHERE[where]())
        assert session._state is state
        if state.said.turns and where != "streamer":
            with pytest.raises((Injected, ValueError)):
                session.regenerate(**WHERE[where]())
            assert session._state is state

    @rule(which=two, words=words, seed=seeds, moments=st.integers(0, 6000), again=st.booleans())
    def interrupt(self, which, words, seed, moments, again):
        session = self.session(which)
        words, pictures = self.pictures_for(session, words, seed)
        before = session._state.said.pictures
        if again and session.history:
            interrupt_after(session.regenerate, moments)
        else:
            interrupt_after(lambda: session.ask(words, list(pictures)), moments)
        self.note(session, before, pictures)

    @rule(which=two)
    def regenerate(self, which):
        session = self.session(which)
        if not session.history:
            with pytest.raises(ValueError, match="nothing was asked yet"):
                session.regenerate()
            return
        fresh = afresh(session, self.shown.get(session, {}))
        said = fresh._state.said
        fresh._state = _State(replace(said, turns=said.turns[:-1]))
        session.regenerate()
        fresh.ask(said.turns[-1][0])
        check_same(session, fresh)

    @rule(which=two)
    def fork(self, which):
        session = self.session(which)
        other = session.fork()
        self.sessions = [session, other]
        self.shown[other] = dict(self.shown.get(session, {}))

    @rule(which=two, keep=st.booleans())
    def reset(self, which, keep):
        self.session(which).reset(keep_pictures=keep)

    @invariant()
    def nothing_is_claimed_that_is_not_there(self):
        for session in getattr(self, "sessions", ()):
            assert not session._lock.locked()
            claimed = len(session._held.transcript)
            held = [layer.get_seq_length() for layer in session._held.cache.layers]
            assert min(held) >= claimed


def test_whatever_goes_wrong(chatty, monkeypatch):
    """Also together, in any order."""
    monkeypatch.setattr(Talk, "chatty", chatty)
    monkeypatch.setattr(chatty[0].config, "decode_positions", "raw")
    few = max(4, settings.default.max_examples // 8)
    run_state_machine_as_test(Talk, settings=settings(max_examples=few, stateful_step_count=12))
