"""An engine of continuous batching against each request alone: tokens, caches, isolation."""

import pytest
import torch
from conftest import SLOW, SLOW_ON_CPU
from serving import SMALL, assistant, client_of, collect, first_pieces, user
from talks import make_chatty, make_picture

from comemo import ChatSession, MemoryStore
from comemo.serve.engine.pool_sizes import PoolSizes
from comemo.serve.engine.settings import EngineSettings
from comemo.serve.start import stores_in

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("an engine has a thread of its own"),
]
P, Q, R = (("p", make_picture(1, (2, 1))), ("q", make_picture(2)), ("r", make_picture(3, (1, 2))))
TOKENS = 12


@pytest.fixture(scope="module")
def chatty(processor):
    return make_chatty(processor)


@pytest.fixture
def client(chatty):
    with client_of(*chatty) as client:
        yield client


def alone(chatty, *asked, visibility="causal"):
    """Tokens of each answer of a session: asked are (question, shown)."""
    model, processor = chatty
    session = ChatSession(model, processor, visibility=visibility, do_sample=False)
    found = []
    for question, shown in asked:
        session.ask(question, [picture for _, picture in shown], max_new_tokens=TOKENS)
        said = session._held.transcript.tokens[session.report.prompt_tokens :].tolist()
        found.append((session.history[-1][1], said))
    return found


def same(answered, wanted):
    """Text and tokens are those of the request alone; a session does not hold the last token."""
    text, tokens = wanted
    return answered.text == text and answered.tokens[0][: len(tokens)] == tokens


MIXED = [
    ("what is this?", [P]),
    ("what is this?", [P]),
    ("and here, please?", [Q]),
    ("no picture at all", []),
    ("which of them is larger?", [P, Q]),
    ("what is it?", [R]),
]


@pytest.mark.parametrize("positions", ["raw", "compressed"])
@pytest.mark.parametrize("visibility", ["causal", pytest.param("all", marks=SLOW)])
def test_a_ragged_batch_gives_the_tokens_of_each_request_alone(processor, positions, visibility):
    chatty = make_chatty(processor)
    chatty[0].config.decode_positions = positions
    wanted = [alone(chatty, one, visibility=visibility)[0] for one in MIXED]
    with client_of(*chatty, visibility=visibility) as client:
        for _ in range(2):  # at first everything is read, then almost everything is known
            found = client.ask(*(client.work(q, *shown) for q, shown in MIXED))
            assert [same(*pair) for pair in zip(found, wanted, strict=True)] == [True] * len(MIXED)
        begun = [one.begun for one in found]
        assert [one.prompt_tokens - one.cached_tokens for one in begun] == [1] * len(MIXED)
        assert client.engine.state().totals["pictures_computed"] == 3
        assert sorted(client.loads) == ["p", "q", "r"]


def test_a_conversation_reads_only_what_is_new(chatty, client):
    asked = [("what is this?", [P]), ("and this?", [Q]), ("and more?", [])]
    wanted = alone(chatty, *asked)
    messages, shown, before = [], [], 0
    for (question, pictures), expected in zip(asked, wanted, strict=True):
        messages.append(user(*[None] * len(pictures), question))
        shown += pictures
        found = client.ask(client.work(messages, *shown))
        assert found.text == expected[0]
        # All but the answer, which may be other tokens as a part of a prompt, and the question.
        assert found.begun.cached_tokens >= before
        before = found.begun.prompt_tokens
        assert found.begun.found_pictures == len(shown) - len(pictures)
        messages.append(assistant(found.text))


def test_namespaces_share_nothing(client):
    first = client.ask(client.work("what is this?", P))
    other = client.ask(client.work("what is this?", P, namespace="b"))
    assert (other.begun.cached_tokens, other.begun.found_pictures) == (0, 0)
    assert other.tokens == first.tokens
    assert client.engine.holds("a", "p")
    assert not client.engine.holds("c", "p")
    again = client.ask(client.work("what is this?", P, namespace="b"))
    assert again.begun.found_pictures == 1


def test_a_store_is_read_by_the_next_engine(chatty, tmp_path):
    for number, computed in enumerate((1, 0)):
        with client_of(*chatty, store_of=stores_in(str(tmp_path))) as client:
            found = client.ask(client.work("what is this?", P))
            assert client.engine.state().totals["pictures_computed"] == computed
            assert found.begun.found_pictures == number
            assert same(found, alone(chatty, ("what is this?", [P]))[0])
    files = [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()]
    assert set(files) == {"a"}
    assert MemoryStore(0, tmp_path / "a").stats.disk_entries == 1


def test_little_memory_is_used_again_and_changes_no_answer(chatty):
    """Pools with room for two requests: what is unused is forgotten, and who comes later waits."""
    works = [(f"question {i}, please?", [shown]) for i, shown in enumerate([P, Q, R, P, Q, R])]
    with client_of(*chatty, EngineSettings(memory=SMALL)) as client:
        sizes = client.engine.sizes
        allocated = client.engine._keys.nbytes + client.engine._pictures.nbytes
        assert 0.9 * SMALL < allocated <= sizes.nbytes <= SMALL
        asked = [client.work(q, *shown) for q, shown in works]
        assert sizes.keys < sum(one.tokens + TOKENS for one in asked)
        for answered, work in zip(client.ask(*asked), works, strict=True):
            assert same(answered, alone(chatty, work)[0])
        state = client.engine.state()
        assert state.key_tokens <= sizes.keys
        assert (state.waiting, state.reading, state.answering) == (0, 0, 0)


@SLOW_ON_CPU
def test_free_places_that_are_scattered_are_used(chatty):
    """The buffers are full of segments; when some end, no hole is large enough for a long one."""
    lengths = (20, 90, 20, 90, 20)
    short = [(f"number {i}", [shown]) for i, shown in enumerate([P, Q, R, P, Q])]
    with client_of(*chatty, EngineSettings(memory=6_000_000, answers=8)) as client:
        engine = client.engine
        works = [
            client.work(q, *shown, max_tokens=length, min_tokens=length)
            for (q, shown), length in zip(short, lengths, strict=True)
        ]
        used = sum(work.tokens + work.sampling.max_tokens for work in works)
        # More than what is free at the end, also beside the last short one when that has ended.
        most = max(work.tokens for work in works) + 120
        wide = engine.sizes.keys - used + most - client.work("and this?", R).tokens
        wanted = [client.ask(work).tokens for work in (*works, client.work("and this?", R))]
        waiting = [client.submit(work)[1] for work in works]
        ticket, events = client.submit(client.work("and this?", R, max_tokens=wide))
        begins = [event.token.id for event in first_pieces(events, TOKENS)]
        engine.cancel(ticket)
        assert [collect(one).tokens for one in waiting] == wanted[:-1]
        assert begins == wanted[-1][0]
        assert engine._keys.segments.moves >= 1


def test_prompts_are_read_in_parts_between_the_tokens_of_others(chatty):
    """A long prompt does not stop an answer, and parts give the logits of the whole."""
    long = " ".join(f"word{i}" for i in range(200))
    with client_of(*chatty, EngineSettings(memory=3e7, stall_s=1e-6, chunk=64)) as client:
        _, first = client.submit(client.work("what is this?", P, max_tokens=100))
        while type(first.get()).__name__ != "Piece":
            pass
        steps = client.engine.state().totals["steps"]
        found = client.ask(client.work(long, Q))
        assert client.engine.state().totals["steps"] > steps + 3
        wanted = alone(chatty, (long, [Q]))[0]
        assert same(found, wanted)


def test_several_answers_of_one_prompt(client):
    one = client.ask(client.work("what is this?", P, temperature=0.9, seed=5))
    found = client.ask(client.work("what is this?", P, temperature=0.9, seed=5, n=3))
    assert found.tokens[0] == one.tokens[0]
    assert len({tuple(tokens) for tokens in found.tokens.values()}) == 3
    assert {ended.choice for ended in found.ended.values()} == {0, 1, 2}
    again = client.ask(client.work("what is this?", P, temperature=0.9, seed=5, n=3))
    assert again.tokens == found.tokens


def test_probabilities_are_those_of_the_model(chatty, client):
    model, _ = chatty
    work = client.work("no picture", logprobs=3, max_tokens=2)
    found = client.ask(work)
    ids = torch.tensor([work.prompt.input_ids[0].tolist()], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].float()
    wanted = logits.log_softmax(-1)
    values, best = wanted.topk(3)
    facts = found.facts[0]
    assert facts.id == int(best[0])
    assert [token for token, _ in facts.others] == best.tolist()
    torch.testing.assert_close(
        torch.tensor([value for _, value in facts.others]), values.cpu(), rtol=1e-4, atol=1e-4
    )


def test_where_it_looked(client):
    plain = client.ask(client.work("what is this?", P, Q))
    found = client.ask(client.work("what is this?", P, Q, look=True))
    assert found.tokens == plain.tokens
    looked = found.looked[0]
    assert "".join(looked.words) == found.text.replace(" ", "")
    shapes = [tuple(heat.shape[1:]) for heat in looked.heat]
    side = client.model.config.side
    assert shapes == [(side, 2 * side), (side, side)]
    total = sum(heat.sum((1, 2)) for heat in looked.heat)
    torch.testing.assert_close(total, torch.ones(len(looked.words)), rtol=1e-4, atol=1e-4)
    assert client.ask(client.work("no picture", look=True)).looked[0].heat == []
    # What was read again did not harm what later requests find.
    assert client.ask(client.work("what is this?", P, Q)).tokens == plain.tokens


def test_memory_is_planned_before_it_is_allocated(chatty):
    model, _ = chatty
    sizes = PoolSizes.plan(model, EngineSettings(memory=SMALL))
    assert sizes.keys == sizes.pictures
    with pytest.raises(ValueError, match=r"PoolSizes\.plan: memory must be at least .* got 1,000"):
        PoolSizes.plan(model, EngineSettings(memory=1000))
    with pytest.raises(ValueError, match="EngineSettings: answers must be above 0, got 0"):
        EngineSettings(answers=0)
