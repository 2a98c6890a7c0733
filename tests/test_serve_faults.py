"""What goes wrong in an engine: one request fails, not the others, and nothing is left behind."""

import threading
import time

import pytest
import torch
from serving import SMALL, client_of, collect, first_pieces
from talks import make_chatty, make_picture

from comemo.serve.engine.settings import EngineSettings
from comemo.serve.work import Piece, Refused

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("an engine has a thread of its own"),
]
P, Q = ("p", make_picture(1, (2, 1))), ("q", make_picture(2))
LONGER = 400  # tokens: an answer that is still at work when the test goes on


@pytest.fixture(scope="module")
def chatty(processor):
    return make_chatty(processor)


def settled(client):
    """The state once nothing is at work."""
    end = time.monotonic() + 60
    while True:
        state = client.engine.state()
        if not (state.waiting or state.reading or state.answering):
            return state
        assert time.monotonic() < end
        time.sleep(0.005)


def failing(chatty, monkeypatch, fails):
    """Let a forward fail where `fails`, of its arguments, says how."""
    model, forward = chatty[0], chatty[0].forward

    def patched(*args, **inputs):
        if (error := fails(inputs)) is not None:
            if isinstance(error, Exception):
                raise error
            output = forward(*args, **inputs)
            output.logits[error] = float("nan")
            return output
        return forward(*args, **inputs)

    monkeypatch.setattr(model, "forward", patched)


def test_limits_are_named(chatty):
    settings = EngineSettings(memory=SMALL, longest=300, answers=2)
    with client_of(*chatty, settings) as client:
        engine = client.engine
        for work, kind, limit in (
            (client.work("hi", max_tokens=1000), "too_large", "tokens of a prompt and its answer"),
            (client.work("hi", n=3, max_tokens=4), "too_large", "answers of a request"),
            (client.work("hi", *[P] * 9, max_tokens=1), "too_large", "tokens of a prompt"),
        ):
            with pytest.raises(Refused, match="at most") as error:
                engine.submit(work, lambda event: None)
            assert error.value.kind == kind
            assert error.value.limit.startswith(limit)
        assert client.ask(client.work("hi", max_tokens=2)).text is not None


def test_who_comes_too_often_is_told_so(chatty):
    settings = EngineSettings(memory=3e7, answers=1, waiting=3, waiting_each=2)
    with client_of(*chatty, settings) as client:
        works = [client.work("hi", max_tokens=LONGER, namespace=name) for name in "aaabb"]
        ticket, events = client.submit(works[0])
        first_pieces(events, 1)
        for work in (works[1], works[2]):
            client.submit(work)
        with pytest.raises(Refused, match="at most 2 waiting requests of one key") as own:
            client.submit(works[2])
        client.submit(works[3])
        with pytest.raises(Refused, match="at most 3 waiting requests:") as all_of_them:
            client.submit(works[4])
        assert (own.value.kind, all_of_them.value.kind) == ("busy", "busy")
        client.engine.cancel(ticket)


def test_a_client_that_is_gone_costs_no_further_step(chatty):
    with client_of(*chatty, EngineSettings(memory=3e7, answers=1)) as client:
        ticket, events = client.submit(client.work("what is this?", P, max_tokens=LONGER))
        _, other = client.submit(client.work("hi", max_tokens=2))
        gone, _ = client.submit(client.work("hello", max_tokens=2))
        first_pieces(events, 1)
        client.engine.cancel(gone)
        client.engine.cancel(ticket)
        assert collect(other).error is None
        state = settled(client)
        assert state.totals["cancelled"] == 2
        assert state.totals["answer_tokens"] < LONGER
        assert events.empty() or isinstance(events.get(), Piece)
        # Its prompt was read, and is found.
        assert client.ask(client.work("what is this?", P)).begun.cached_tokens > 0


def test_deadlines(chatty):
    with client_of(*chatty, EngineSettings(memory=3e7, answers=1)) as client:
        late = client.ask(client.work("hi", deadline=time.monotonic() - 1))
        assert late.error.kind == "timeout"
        soon = time.monotonic() + 0.2
        slow = client.ask(client.work("hi", max_tokens=9_000, deadline=soon))
        assert slow.error.kind == "timeout"
        assert len(slow.tokens[0]) > 1
        assert settled(client).totals["timeouts"] == 2


def test_out_of_memory_fails_one_request(chatty, monkeypatch):
    """A step of two answers fails, and so does the row of one of them alone."""
    with client_of(*chatty) as client:
        good, bad = client.work("what is this?", P), client.work("hello there", Q)
        wanted = client.ask(good)
        length = bad.tokens

        def fails(inputs):
            counts = inputs.get("token_counts")
            if counts is not None and bool((counts == length + 4).any()):
                return torch.OutOfMemoryError("CUDA out of memory")
            return None

        failing(chatty, monkeypatch, fails)
        found, failed = client.ask(good, bad)
        assert found.tokens == wanted.tokens
        assert failed.error.kind == "failed"
        assert "out of memory" in failed.error.text
        monkeypatch.undo()
        assert client.ask(bad).error is None
        assert settled(client).totals["failed"] == 1


def test_out_of_memory_in_a_prompt(chatty, monkeypatch):
    with client_of(*chatty) as client:
        failing(
            chatty,
            monkeypatch,
            lambda inputs: (
                torch.OutOfMemoryError("out of memory")
                if inputs.get("inputs_embeds") is not None
                else None
            ),
        )
        assert client.ask(client.work("hi", P)).error.kind == "failed"
        monkeypatch.undo()
        assert client.ask(client.work("hi", P)).error is None


def test_what_is_not_a_number_is_not_kept(chatty, monkeypatch):
    with client_of(*chatty) as client:
        good, bad = client.work("what is this?", P), client.work("hello there", Q)
        wanted = client.ask(good), client.ask(bad)
        length = bad.tokens

        def fails(inputs):
            counts = inputs.get("token_counts")
            rows = [] if counts is None else (counts == length + 3).nonzero().flatten().tolist()
            return rows[0] if rows else None

        failing(chatty, monkeypatch, fails)
        found, failed = client.ask(good, bad)
        assert found.tokens == wanted[0].tokens
        assert failed.error.text == "the model's logits are not numbers"
        monkeypatch.undo()
        again = client.ask(bad)
        assert again.tokens == wanted[1].tokens
        assert again.begun.cached_tokens < bad.tokens - 1  # only what other requests have left


def test_a_fault_of_the_engine_fails_all_and_is_told(chatty, monkeypatch):
    with client_of(*chatty) as client:
        _, events = client.submit(client.work("hi", max_tokens=LONGER))
        first_pieces(events, 1)

        def broken(self):
            raise KeyError("of the engine itself")

        monkeypatch.setattr(type(client.engine), "_admit", broken)
        other = client.submit(client.work("hello"))[1]
        for found in (collect(events), collect(other)):
            assert found.error.kind == "internal"
        state = client.engine.state()
        assert not state.healthy
        assert "KeyError" in state.reason or "of the engine itself" in state.reason
        with pytest.raises(Refused, match="the engine has stopped"):
            client.submit(client.work("hi"))


def test_closing_finishes_what_is_under_way_and_refuses_the_rest(chatty):
    with client_of(*chatty) as client:
        wanted = client.ask(client.work("what is this?", P, max_tokens=30))
        _, events = client.submit(client.work("what is this?", P, max_tokens=30))
        closing = threading.Thread(target=client.engine.close, args=(60,))
        closing.start()
        while client.engine.state().healthy:
            time.sleep(0.001)
        with pytest.raises(Refused, match="shutting down") as error:
            client.submit(client.work("hi"))
        assert error.value.kind == "closing"
        assert collect(events).tokens == wanted.tokens
        closing.join(60)
        assert not closing.is_alive()
    with client_of(*chatty) as client:
        _, events = client.submit(client.work("hi", max_tokens=9_000))
        first_pieces(events, 1)
        client.engine.close(0)
        assert collect(events).error.kind == "closing"


def test_a_picture_that_cannot_be_read_fails_its_request(chatty):
    def gone():
        raise OSError(2, "No such file or directory")

    with client_of(*chatty) as client:
        work = client.work("what is this?", P)
        picture = work.pictures[0].__class__(**vars(work.pictures[0]) | {"load": gone})
        broken = client.ask(work.__class__(**vars(work) | {"pictures": (picture,)}))
        assert broken.error.kind == "failed"
        assert "No such file" in broken.error.text
        assert client.ask(work).error is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.config, "memory_positions", "absolute"), "memory_positions"),
        (lambda model: model.train(), "training mode"),
        (lambda model: setattr(model.config.mixin_config, "_attn_implementation", "sdpa"), "sdpa"),
    ],
)
def test_models_that_are_not_supported(processor, change, reason):
    chatty = make_chatty(processor)
    change(chatty[0])
    with (
        pytest.raises(ValueError, match=f"ContinuousEngine: wanted a model .*{reason}"),
        client_of(*chatty),
    ):
        pass
