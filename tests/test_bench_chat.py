"""The end-to-end benchmark: rows, and the formula of peak memory compared with allocations."""

import copy

import pytest
import torch
from timed import options_of
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import chat, models, peak
from comemo import ChatSession, CoMemoConfig, CoMemoForConditionalGeneration

pytestmark = pytest.mark.usefixtures("one_thread", "made_up_limits")


@pytest.fixture
def drawn(loaded, monkeypatch):
    """The tiny model instead of one of several gigabytes."""
    monkeypatch.setattr(chat, "draw_model", lambda *_: copy.deepcopy(loaded[0]))


@pytest.mark.parametrize(
    "batches", [(), pytest.param(("2",), marks=pytest.mark.slow)], ids=["alone", "in batches"]
)
def test_rows(drawn, batches):
    words = ("--cols", "2", "--rows", "1", "--tokens", "3", "--batches", *batches)
    words += ("--ways", *chat.WAYS)
    rows = list(chat.run(options_of(chat, *words)))
    assert [(row["pass"], row["way"]) for row in rows] == [
        ("new picture", "ours"),
        ("second question", "ours"),
        ("known picture", "ours"),
        ("second question", chat.STAND_IN),
    ] + [
        (f"decode, batch 2, {pictures}", way.replace("published", chat.STAND_IN))
        for pictures in ("one picture", "own pictures")
        for way in chat.WAYS
        if batches
    ]
    new, second, known, published = rows[:4]
    assert new["read_tokens"] > 768 > 100 > second["read_tokens"]
    assert known["read_tokens"] > 768
    assert published["read_tokens"] > new["read_tokens"]
    for row in rows[:4]:
        assert 0 < row["first_s"] < 60
    for row in rows:
        assert 0 < row["token_s"] < 60
        assert row["of_limit"] == pytest.approx(row["limit_s"] / row["token_s"])
    for row in rows[4:]:
        assert row["tokens_per_s"] == pytest.approx(2 / row["token_s"])
    # Less is computed of a question whose picture is known, and least of a second question.
    assert new["first_limit_s"] > known["first_limit_s"] > second["first_limit_s"] > 0
    assert new["limit_s"] <= second["limit_s"] == published["limit_s"]


def allocated(run):
    """Peak bytes that a call allocates on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held, most = 0, 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("chunk", "tiles_at_once"), [(256, 4), pytest.param(4096, 1, marks=pytest.mark.slow)]
)
def test_the_peak_is_predicted(chunk, tiles_at_once):
    """At widths at which weights and activations dominate."""
    base = CoMemoConfig().to_dict() | {"text_config": None}  # it is made from llm_config
    base["llm_config"] |= {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 2048}
    base["llm_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 700}
    base["vision_config"] |= {"num_hidden_layers": 2, "hidden_size": 512}
    base["vision_config"] |= {"intermediate_size": 2048, "num_attention_heads": 8}
    base["mixin_config"] |= {"language_dim": 512, "vision_dim": 512, "num_heads": 4}
    base["mixin_config"] |= {"intermediate_size": 2048, "mixin_every_n_layers": 2}
    model = CoMemoForConditionalGeneration(CoMemoConfig.from_dict(base)).eval()
    model.config.tiles_at_once = tiles_at_once
    processor = models.give_words(model)
    session = ChatSession(
        model, processor, prefill_chunk_size=chunk, max_new_tokens=2, do_sample=False
    )
    picture = (torch.randn(5, 3, 448, 448), (2, 2))
    most = allocated(lambda: session.ask("what is this?", picture))
    weights = sum(p.nbytes for p in model.parameters())
    predicted = peak.predict(model, session, 5) - weights
    assert predicted == pytest.approx(most, rel=0.1)
