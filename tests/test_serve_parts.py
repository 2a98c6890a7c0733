"""The parts of an engine that compute nothing: segments, queues, texts, keys of clients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comemo.serve.engine.answer import Answer, AnswerText
from comemo.serve.engine.looks import coarser
from comemo.serve.engine.segments import Segments
from comemo.serve.engine.waiting import FairQueue
from comemo.serve.http.settings import ServerSettings, digest_of_key, read_keys
from comemo.serve.work import Sampling, TokenFacts


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(0, 9)), max_size=60))
def test_segments_never_meet_and_all_holes_come_back(steps):
    segments, held, buffer = Segments(40), [], torch.arange(40)
    for action, size, which in steps:
        if action < 2:
            segment = segments.take(size)
            taken = sum(map(len, held))
            # First fit may fail for scattered holes, never for a buffer that is empty.
            assert segment is not None or size > 40 - taken or held
            held += [] if segment is None else [segment]
        elif held and action == 2:
            segments.give_back(held.pop(which % len(held)))
        elif which == 9:
            rows = [int(buffer[place]) for one in held for place in range(one.start, one.end)]
            segments.close_holes(held, [buffer])
            assert segments.free == 40 or segments.take(segments.free + 1) is None
            assert rows == [int(buffer[p]) for one in held for p in range(one.start, one.end)]
            if segments.free:
                held.append(segments.take(segments.free))
        elif held:
            segment = held[which % len(held)]
            before = (segment.start, segment.end)
            assert segments.resize(segment, size) or before == (segment.start, segment.end)
        places = [place for one in held for place in range(one.start, one.end)]
        assert len(places) == len(set(places)) == 40 - segments.free
        assert not places or (min(places) >= 0 and max(places) < 40)
    for segment in held:
        segments.give_back(segment)
        segments.give_back(segment)  # again is allowed
    whole = segments.take(40)
    assert whole is not None
    assert len(whole) == 40


def test_namespaces_take_turns():
    waiting = FairQueue()
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        waiting.put(name[0], name)
    assert waiting.remove("a", "a2")
    assert not waiting.remove("a", "a2")
    assert (len(waiting), waiting.count("b"), waiting.count("x")) == (5, 2, 0)
    assert [waiting.pop() for _ in range(5)] == ["a1", "b1", "c1", "a3", "b2"]
    assert waiting.first() is None


class Letters:
    """A tokenizer of characters; 0 is the stop token."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) if i else "<end>" for i in ids)


@given(
    st.text(alphabet="ab .", max_size=40),
    st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=3),
)
def test_pieces_are_the_text_up_to_the_first_stop(text, stops):
    """Nothing of a stop text is passed on, not even its beginning."""
    answer = AnswerText(Letters(), "<end>", tuple(stops))
    ids, pieces = [], []
    for letter in text:
        ids.append(ord(letter))
        pieces.append(answer.add(ids[-1], last=False))
        if answer.stopped:
            break
    if not answer.stopped:
        pieces.append(answer.add(0, last=True))
    # The earliest stop of what was generated until one was complete.
    told = "".join(map(chr, ids)).strip()
    places = [place for stop in stops if (place := told.find(stop)) >= 0]
    assert "".join(pieces) == (told[: min(places)] if places else told)


def drawn(logits, seed, **options):
    sampling = Sampling(max_tokens=50, temperature=1.0, seed=seed, **options)
    answer = Answer(0, sampling, AnswerText(Letters(), "<end>", ()), 0, torch.device("cpu"))
    found = []
    for _ in range(50):
        token = int(answer.choose(logits))
        found.append(token)
        answer.take(TokenFacts(token))
    return found


def test_drawn_tokens_depend_on_the_seed_and_keep_their_limits():
    logits = torch.randn(1, 30)
    assert drawn(logits, 1) == drawn(logits, 1) != drawn(logits, 2)
    best = logits[0].argsort(descending=True).tolist()
    assert set(drawn(logits, 3, top_k=2)) == set(best[:2])
    probabilities = logits[0].softmax(-1)[best].cumsum(0)
    inside = int((probabilities < 0.5).sum()) + 1
    assert set(drawn(logits, 4, top_p=0.5)) <= set(best[:inside])


def test_penalties_are_those_of_the_answer():
    logits = torch.zeros(1, 5)
    logits[0, 2] = 1.0
    minus = Sampling(max_tokens=9, frequency_penalty=0.4, presence_penalty=0.3)
    answer = Answer(0, minus, AnswerText(Letters(), "<end>", ()), 0, torch.device("cpu"))
    assert int(answer.choose(logits)) == 2
    answer.take(TokenFacts(2))
    assert int(answer.choose(logits)) == 2  # 1 - 0.4 - 0.3 is still the most
    answer.take(TokenFacts(2))
    assert int(answer.choose(logits)) == 0  # 1 - 0.8 - 0.3 is not
    assert logits[0, 2] == 1.0


def test_an_answer_does_not_end_too_early():
    logits = torch.zeros(1, 5)
    logits[0, 0], logits[0, 3] = 2.0, 1.0
    sampling = Sampling(max_tokens=9, min_tokens=2)
    answer = Answer(0, sampling, AnswerText(Letters(), "<end>", ()), 0, torch.device("cpu"))
    for wanted in (3, 3, 0):
        assert not answer.is_plain or wanted == 0
        assert int(answer.choose(logits)) == wanted
        answer.take(TokenFacts(wanted))
    assert answer.reason == "stop"


def test_a_file_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst-key team\n\nsecond-key team\nthird-key\n")
    settings = ServerSettings("m", keys=read_keys(path))
    assert settings.namespace_of("first-key") == settings.namespace_of("second-key") == "team"
    alone = settings.namespace_of("third-key")
    assert alone == f"key-{digest_of_key('third-key')[:16]}"
    assert settings.namespace_of("team") is settings.namespace_of(None) is None
    assert "key" not in repr(settings)
    assert ServerSettings("m").namespace_of(None) == "public"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "has no key"),
        ("a b c\n", "got 3 words"),
        ("a ../b\n", "of letters"),
        ("a x\na y\n", "line 2 has a key that an earlier line has"),
    ],
)
def test_wrong_files_of_keys(tmp_path, text, wanted):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ValueError, match=wanted):
        read_keys(path)


@pytest.mark.parametrize(("grid", "side", "wanted"), [((4, 3), 16, (24, 32)), ((2, 1), 4, (4, 8))])
def test_large_maps_are_made_coarser(grid, side, wanted):
    cols, rows = grid
    cells = torch.rand(5, rows * side, cols * side)
    found = coarser(cells, side)
    assert found.shape == (5, *wanted)
    torch.testing.assert_close(found.sum((1, 2)), cells.sum((1, 2)))
    factor = cells.shape[1] // wanted[0]
    torch.testing.assert_close(found[0, 0, 0], cells[0, :factor, :factor].sum())
