"""Sessions: what stays between questions changes no token, and what fails leaves no trace."""

import dataclasses
import threading

import pytest
import torch
from conftest import SLOW
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import comemo
import comemo_kernels as ops
from bench.counting import count_calls
from comemo import ChatSession, prompts

GREEDY = {"max_new_tokens": 6, "do_sample": False}
pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = ("hello there", "what is this?", "and more?", "now <image> compare", "last one")
GRIDS = {1: (2, 1), 3: (1, 1)}  # of the pictures that come with a question
TILES = {1: 3, 3: 1}


@pytest.fixture(scope="module")
def pictures():
    return {
        turn: (
            torch.randn(TILES[turn], 3, 448, 448, generator=torch.Generator().manual_seed(turn)),
            grid,
        )
        for turn, grid in GRIDS.items()
    }


@pytest.fixture
def session(model, processor):
    return ChatSession(model, processor, **GREEDY)


@pytest.fixture(params=["raw", "compressed"])
def positions(request, model):
    model.config.decode_positions = request.param
    return request.param


def read_whole(model, tokenizer, history, question, pictures, turns, visibility, rope="dhr"):
    """Cache and last logits of the whole prompt at once; `turns` are those of the pictures."""
    text = prompts.build_prompt([*history, (question, None)])
    tiles = [pictures[turn][0] for turn in turns]
    grids = [pictures[turn][1] for turn in turns]
    counts = [len(t) * 256 for t in tiles]
    ids = prompts.encode_prompt(tokenizer, prompts.expand_images(text, counts))
    ids = torch.tensor([ids], device=model.device)
    image = model.model.find_image_tokens(ids)
    core = model.model
    places = core.prompt_position_ids(image, torch.ones_like(ids), grids if rope == "dhr" else None)
    cache = DynamicCache()
    memory = None
    if turns:
        memory = core.build_image_memory(torch.cat(tiles), image, places, grids)
        embeds = core.embed(ids, image, memory)
        # Where each question begins, from the text alone.
        heads = [
            len(
                prompts.encode_prompt(
                    tokenizer,
                    prompts.expand_images(
                        prompts.build_prompt(history[:turn]),
                        [256 * len(pictures[t][0]) for t in turns if t < turn],
                    ),
                )
            )
            for turn in turns
        ]
        ends = torch.tensor([0, *counts], device=model.device).cumsum(0)
        seen = torch.zeros(ids.shape[1], dtype=torch.long, device=model.device)
        for head, turn in zip(heads, turns, strict=True):
            seen[0 if turn == 0 or visibility == "all" else head :] += 1
        spans = torch.stack([torch.zeros_like(seen), ends[seen]], -1)[None]
        memory = memory.reading(spans)
    else:
        embeds = core.embed(ids, None, None)
    with torch.no_grad():
        out = model(
            inputs_embeds=embeds,
            position_ids=places,
            image_memory=memory,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return ids, cache, out.logits[0, -1]


def same_cache(session, cache, tokens):
    """Whether the session's first tokens have these keys and values."""
    for ours, theirs in zip(session._held.cache.layers, cache.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a[:, :, :tokens], b[:, :, :tokens], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("rope", "visibility"),
    [("dhr", "causal"), ("original", "all")]
    + [pytest.param(*two, marks=SLOW) for two in (("dhr", "all"), ("original", "causal"))],
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
        # A raw answer stood elsewhere than it does in a prompt.
        assert session.report.read_tokens < 40
        prompt = session.report.prompt_tokens
        session.ask("a second picture", pictures[3])
        assert (seen[0], built[0], built_alone[0]) == (1, 1, 0)
    whole = session.report.prompt_tokens
    read = whole if visibility == "all" else whole - prompt + 12
    assert session.report.read_tokens <= read
    assert (session.report.read_tokens == whole) == (visibility == "all")


def test_compressed_answers_are_not_read_again(model, processor):
    """What was generated is kept, where its text makes the same tokens."""
    model.config.decode_positions = "compressed"
    session = ChatSession(model, processor, **GREEDY)
    session.ask("hello world")
    held, answer = len(session._held.transcript), session.history[-1][1]
    again, ids = session._state.said.prompt("go on", model, processor.tokenizer)
    expected = session._held.transcript.common(again)
    session.ask("go on")
    assert session.report.read_tokens == len(ids) - expected
    assert expected <= held
    assert answer in session.history[0]


def test_text_before_the_first_picture_is_read_with_it(model, processor, pictures):
    """Without any picture the mixin layers are passed; with one, they see nothing before it."""
    session = ChatSession(model, processor, **GREEDY)
    session.ask("hello")
    session.ask("look", pictures[3])
    assert session.report.read_tokens == session.report.prompt_tokens


def test_regenerate(session, pictures):
    session.ask("hello")
    first = session.ask("what is this?", pictures[1])
    assert session.regenerate() == first
    assert session.report.read_tokens == 1
    assert len(session.history) == 2
    torch.manual_seed(1)
    other = session.regenerate(do_sample=True, temperature=5.0)
    assert session.history[-1] == ("<image>\nwhat is this?", other)
    assert other != first
    with pytest.raises(ValueError, match="nothing was asked yet"):
        ChatSession(session.model, session.processor).regenerate()


def test_forks_go_their_own_ways(session, pictures):
    session.ask("what is this?", pictures[1])
    fork = session.fork()
    wanted = session.ask("one"), session.ask("another", pictures[3])
    before = session.history
    assert fork.ask("no, this", pictures[3]) is not None
    assert (fork.report.read_tokens, len(fork.history)) < (fork.report.prompt_tokens, 3)
    assert session.history == before
    third = fork.fork()
    third.reset()
    assert third.history == []
    # The first fork's tokens are still right.
    again = ChatSession(session.model, session.processor, **GREEDY)
    again.ask("what is this?", pictures[1])
    assert (again.ask("one"), again.ask("another", pictures[3])) == wanted
    assert session.regenerate() == wanted[1]


def test_reset_forgets(session, pictures):
    first = session.ask("what is this?", pictures[1])
    assert session.nbytes > 0
    session.reset()
    assert session.history == []
    session.ask("hello")
    assert session.report.read_tokens == session.report.prompt_tokens < 200
    session.reset()
    assert session.ask("what is this?", pictures[1]) == first


def test_pictures_may_stay_when_words_are_forgotten(session, pictures):
    session.ask("hello")
    wanted = session.ask("what is this?", pictures[1]), session.ask("and?", pictures[3])
    session.reset(keep_pictures=True)
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
    with pytest.raises(ValueError, match="keep_pictures must be False"):
        session.reset(keep_pictures=True)


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


class Recorder(BaseStreamer):
    """Notes tokens, and does something at one of them."""

    def __init__(self, at=None, do=None):
        self.tokens, self.at, self.do = [], at, do

    def put(self, value):
        self.tokens.append(value.tolist())
        if len(self.tokens) - 1 == self.at:
            self.do()

    def end(self):
        pass


def test_a_layer_that_fails_leaves_no_trace(session, pictures, model):
    first = session.ask("what is this?", pictures[1])
    layer = model.model.language_model.layers[2]

    def fail(*_):
        raise RuntimeError("out of memory")

    for raising in (layer, model.model.vision_tower.encoder.layer[0]):
        handle = raising.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            session.ask("more", pictures[3])
        handle.remove()
    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.regenerate()
    handle.remove()
    assert session.history == [("<image>\nwhat is this?", first)]
    assert session.regenerate() == first
    twin = ChatSession(session.model, session.processor, **GREEDY)
    twin.ask("what is this?", pictures[1])
    assert session.ask("more", pictures[3]) == twin.ask("more", pictures[3])


def test_stop_keeps_what_was_said(session):
    streamer = Recorder(3, session.stop)
    answer = session.ask("hello world", streamer=streamer)
    # The prompt, three, and, where tokens are streamed late, the one that was on its way.
    assert len(streamer.tokens) in (4, 5)
    assert session.report.new_tokens == len(streamer.tokens) - 1
    assert session.history[-1][1] == answer
    session.ask("go on")
    assert session.report.new_tokens == 6


def test_streams(session):
    wanted = session.ask("hello world")
    session.reset()
    assert "".join(session.stream("hello world")) == wanted
    assert session.history == [("hello world", wanted)]
    session.reset()
    session.options["max_new_tokens"] = 400
    for _ in session.stream("hello world", eos_token_id=None):
        break
    assert session.report.new_tokens < 400
    assert len(session.history) == 1
    with pytest.raises(ValueError, match="its 0 images, or none, got 1"):
        list(session.stream("<image>"))


def test_whoever_waits_for_a_stream_may_be_interrupted(session):
    """Ctrl-C comes while the next piece is waited for: nothing goes on behind the caller's back."""
    session.options["max_new_tokens"] = 400
    pieces = session.stream("hello world", eos_token_id=None)
    next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    assert session.report.new_tokens < 400
    assert session.ask("go on", max_new_tokens=2) is not None


def test_one_thread_at_a_time(session):
    """Whoever comes second is told, and disturbs nothing."""
    errors = []

    def intrude():
        for call in (
            lambda: session.ask("me too"),
            session.regenerate,
            session.fork,
            session.reset,
        ):
            thread_error = None
            try:
                call()
            except RuntimeError as error:
                thread_error = str(error)
            errors.append(thread_error)

    def from_another_thread():
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()

    answer = session.ask("hello", streamer=Recorder(2, from_another_thread))
    verbs = ["ask", "regenerate", "fork", "reset"]
    for verb, error in zip(verbs, errors, strict=True):
        assert error.startswith(f"ChatSession.{verb}: another thread is at work on this session")
    assert session.history == [("hello", answer)]


def test_sessions_side_by_side(model, processor, pictures):
    """Two sessions on one model in two threads answer as alone."""

    def talk(turn):
        session = ChatSession(model, processor, **GREEDY)
        return [session.ask("what?", pictures[turn]), session.ask("and?"), session.ask("more")]

    alone = {turn: talk(turn) for turn in pictures}
    found = {}
    threads = [
        threading.Thread(target=lambda turn=turn: found.update({turn: talk(turn)}))
        for turn in pictures
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_beams_and_several_sequences(model, processor, pictures):
    session = ChatSession(model, processor, **GREEDY)
    tiles, grid = pictures[1]
    options = {**GREEDY, "num_beams": 3}
    answer = session.ask("what is this?", (tiles, grid), num_beams=3)
    wanted = model.chat(
        processor.tokenizer, tiles, "what is this?", options, target_aspect_ratio=[grid]
    )
    assert answer == wanted
    assert session.regenerate(num_beams=3) == wanted
    assert session.report.read_tokens == 1
    twin = ChatSession(model, processor, **GREEDY)
    twin.ask("what is this?", (tiles, grid))
    twin._state = session._state
    assert session.ask("more") == twin.ask("more")


def test_pictures_from_files(model, processor, picture_file):
    session = ChatSession(model, processor, **GREEDY)
    session.ask("what is this?", str(picture_file))
    tiles, grid = comemo.load_image(picture_file)
    twin = ChatSession(model, processor, **GREEDY)
    twin.ask("what is this?", [(tiles, grid)])
    assert session.history == twin.history
    assert session._state.said.pictures[0].pixel_values is None  # a session does not keep pixels


def test_says_what_is_wrong(session, model, processor, pictures):
    tiles, grid = pictures[1]
    with pytest.raises(ValueError, match=r"mark for each of its 1 images, or none, got 2"):
        session.ask("<image> <image>", (tiles, grid))
    with pytest.raises(ValueError, match=r"grid \(2, 2\) must have 5 tiles, got 3"):
        session.ask("what?", (tiles, (2, 2)))
    with pytest.raises(ValueError, match=r"ask: pixel_values must be a tensor .*, got \(3, 448"):
        session.ask("what?", (tiles[0], (1, 1)))
    with pytest.raises(ValueError, match="visibility must be one of"):
        ChatSession(model, processor, visibility="none")
    with pytest.raises(ValueError, match="rope must be one of"):
        ChatSession(model, processor, rope="none")
    with pytest.raises(FileNotFoundError):
        session.ask("what?", "no-such-file.png")
    assert session.history == []
    assert session.ask("<img><IMG_CONTEXT></img><|im_end|>") is not None


def test_dynamic_scaling_is_the_whole_prompts(model, processor, tokenizer, pictures):
    """Past the trained range the whole conversation turns by its length."""
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


def test_report_is_a_record(session):
    session.ask("hello")
    report = dataclasses.asdict(session.report)
    assert report["new_tokens"] == 6
    assert 0 < report["first_s"] < 60
    assert 0 < report["per_token_s"] < 60


def test_an_item_of_images_is_one_picture(session):
    several = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="ask: an item of images must be one picture, got 2"):
        session.ask("what is this?", several)
    assert session.history == []
