"""Calls of a session: streams, stops, forks, resets, threads and errors."""

import dataclasses
import threading

import pytest
import torch
from sessions import (  # noqa: F401
    GREEDY,
    pictures,
    session,
)
from transformers.generation.streamers import BaseStreamer

import comemo
from comemo import ChatSession

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_forks_are_independent(session, pictures):
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


class Recorder(BaseStreamer):
    """Records tokens, and calls a function at one of them."""

    def __init__(self, at=None, do=None):
        self.tokens, self.at, self.do = [], at, do

    def put(self, value):
        self.tokens.append(value.tolist())
        if len(self.tokens) - 1 == self.at:
            self.do()

    def end(self):
        pass


def test_a_failing_layer_leaves_the_session_unchanged(session, pictures, model):
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
    # The prompt, three tokens, and one more if tokens are streamed one step late.
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


def test_waiting_for_a_stream_can_be_interrupted(session):
    """Ctrl-C while waiting for the next piece: nothing continues in the background."""
    session.options["max_new_tokens"] = 400
    pieces = session.stream("hello world", eos_token_id=None)
    next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    assert session.report.new_tokens < 400
    assert session.ask("go on", max_new_tokens=2) is not None


def test_one_thread_at_a_time(session):
    """The second caller gets an error and changes nothing."""
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
        assert error.startswith(f"ChatSession.{verb}: another thread uses this session")
    assert session.history == [("hello", answer)]


def test_sessions_side_by_side(model, processor, pictures):
    """Two sessions on one model in two threads answer as each does alone."""

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
    assert (
        session._state.conversation.images[0].pixel_values is None
    )  # a session does not keep pixels


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


def test_report_is_a_record(session):
    session.ask("hello")
    report = dataclasses.asdict(session.report)
    assert report["new_tokens"] == 6
    assert 0 < report["first_s"] < 60
    assert 0 < report["per_token_s"] < 60


def test_an_item_of_images_is_one_picture(session):
    several = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="ask: an item of images must be one image, got 2"):
        session.ask("what is this?", several)
    assert session.history == []
