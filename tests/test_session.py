"""A session against the whole conversation read at once: answers, tokens, keys and values."""

import pytest
from conftest import SLOW
from sessions import (  # noqa: F401
    GREEDY,
    QUESTIONS,
    pictures,
    positions,
    read_whole,
    same_cache,
    session,
)

import comemo_kernels as ops
from bench.counting import count_calls
from comemo import ChatSession

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("rope", "visibility"),
    [("dhr", "causal")]
    + [
        pytest.param(*two, marks=SLOW)
        for two in (("dhr", "all"), ("original", "all"), ("original", "causal"))
    ],
)
def test_every_turn_is_the_whole_prompt(
    model, processor, tokenizer, pictures, positions, visibility, rope
):
    session = ChatSession(model, processor, visibility=visibility, rope=rope, **GREEDY)
    turns = []
    for turn, question in enumerate(QUESTIONS):
        history = session.history
        if turn in pictures:
            turns.append(turn)
        session.ask(question, pictures.get(turn))
        asked = session.history[-1][0]
        ids, cache, logits = read_whole(
            model, tokenizer, history, asked, pictures, turns, visibility, rope
        )
        assert session.report.prompt_tokens == ids.shape[1]
        same_cache(session, cache, ids.shape[1])
        said = session._held.transcript.tokens
        assert int(said[ids.shape[1]]) == int(logits.argmax())


def test_pictures_of_the_first_question_are_the_published_chat(
    model, processor, pictures, positions
):
    tiles, grid = pictures[1]
    session, history = ChatSession(model, processor, **GREEDY), []
    for question in ("what is this?", "and more?", "really?"):
        answer = session.ask(question, (tiles, grid) if not history else None)
        wanted, history = model.chat(
            processor.tokenizer,
            tiles,
            question,
            GREEDY,
            history=history,
            return_history=True,
            target_aspect_ratio=[grid],
        )
        assert answer == wanted
        assert session.history == history


@pytest.mark.parametrize("visibility", ["causal", "all"])
def test_a_question_reads_its_own_tokens(model, processor, pictures, positions, visibility):
    session = ChatSession(model, processor, visibility=visibility, **GREEDY)
    session.ask("what is this?", pictures[1])
    first = session.report
    assert first.read_tokens == first.prompt_tokens > 768
    mixins = [x.mixin for x in model.model.language_model.layers if x.mixin is not None]
    with (
        count_calls([model.model], "project_images") as seen,
        count_calls([ops], "build_memory") as built,
        count_calls(mixins, "build") as built_alone,
    ):
        session.ask("and more?")
        assert (seen[0], built[0], built_alone[0]) == (0, 0, 0)
        # A raw answer had other positions than in a prompt.
        assert session.report.read_tokens < 40
        prompt = session.report.prompt_tokens
        session.ask("a second picture", pictures[3])
        assert (seen[0], built[0], built_alone[0]) == (1, 1, 0)
    whole = session.report.prompt_tokens
    read = whole if visibility == "all" else whole - prompt + 12
    assert session.report.read_tokens <= read
    assert (session.report.read_tokens == whole) == (visibility == "all")


def test_compressed_answers_are_not_read_again(model, processor):
    """Generated tokens are kept if their text is encoded to the same tokens."""
    model.config.decode_positions = "compressed"
    session = ChatSession(model, processor, **GREEDY)
    session.ask("hello world")
    held, answer = len(session._held.transcript), session.history[-1][1]
    again, _ = session._state.conversation.prompt("go on", model, processor.tokenizer)
    expected = session._held.transcript.common(again)
    session.ask("go on")
    assert session.report.read_tokens == len(again) - expected
    assert expected <= held
    assert answer in session.history[0]


def test_text_before_the_first_picture_is_read_with_it(model, processor, pictures):
    """Without images mixin layers are skipped; with one, tokens before it read nothing."""
    session = ChatSession(model, processor, **GREEDY)
    session.ask("hello")
    session.ask("look", pictures[3])
    assert session.report.read_tokens == session.report.prompt_tokens


def test_pictures_may_stay_when_words_are_forgotten(session, pictures):
    session.ask("hello")
    wanted = session.ask("what is this?", pictures[1]), session.ask("and?", pictures[3])
    session.reset(keep_images=True)
    with count_calls([session.model.model], "project_images") as seen:
        with pytest.raises(ValueError, match="its 2 images, or none, got 1"):
            session.ask("<image>")
        both = session.ask("here is <image> and there <image>")
    assert seen[0] == 0
    twin = ChatSession(session.model, session.processor, **GREEDY)
    assert twin.ask("here is <image> and there <image>", [pictures[1], pictures[3]]) == both
    same_cache(session, twin._held.cache, twin.report.prompt_tokens)
    assert wanted
    session.model.config.memory_positions = "absolute"
    session.reset()
    session.ask("what is this?", pictures[1])
    session.ask("and?", pictures[3])
    ids, cache, _ = read_whole(
        session.model,
        session.tokenizer,
        session.history[:1],
        session.history[1][0],
        {0: pictures[1], 1: pictures[3]},
        [0, 1],
        "causal",
    )
    same_cache(session, cache, ids.shape[1])
    with pytest.raises(ValueError, match="keep_images must be False"):
        session.reset(keep_images=True)


@pytest.mark.parametrize("chunk", [7, 300, None])
def test_chunks_change_nothing(model, processor, tokenizer, pictures, chunk):
    session = ChatSession(model, processor, prefill_chunk_size=chunk, **GREEDY)
    session.ask("hello")
    session.ask("what is this?", pictures[1])
    ids, cache, logits = read_whole(
        model, tokenizer, session.history[:1], session.history[1][0], pictures, [1], "causal"
    )
    same_cache(session, cache, ids.shape[1])
    assert int(session._held.transcript.tokens[ids.shape[1]]) == int(logits.argmax())


def test_dynamic_scaling_is_the_whole_prompts(model, processor, tokenizer, pictures):
    """Beyond the trained range dynamic scaling depends on the whole conversation."""
    text = model.config.text_config
    model.config.ntk_length = "token_count"
    text.max_position_embeddings, limit = 820, text.max_position_embeddings
    try:
        session = ChatSession(model, processor, **GREEDY)
        for turn, question in enumerate(("what is this?", "and more, much more?", "and?")):
            history = session.history
            session.ask(question, pictures[1] if not turn else None)
            asked = session.history[-1][0]
            ids, cache, _ = read_whole(
                model, tokenizer, history, asked, {0: pictures[1]}, [0], "causal"
            )
            same_cache(session, cache, ids.shape[1])
        assert session.report.prompt_tokens > 820
    finally:
        text.max_position_embeddings = limit
