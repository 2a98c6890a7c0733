"""Conversations on a small model, compared with a fresh session of the same conversation."""

import itertools
from dataclasses import replace

import torch
from interrupting import Injected
from small import make_model, place
from transformers.generation.streamers import BaseStreamer

from comemo import ChatSession
from comemo.chat.session import _State

GREEDY = {"max_new_tokens": 3, "do_sample": False}


def make_picture(seed, grid=(1, 1)):
    tiles = grid[0] * grid[1] + (grid != (1, 1))
    return torch.randn(tiles, 3, 112, 112, generator=torch.Generator().manual_seed(seed)), grid


def make_chatty(processor):
    """A small model, and a processor with its tokenizer."""
    model = make_model(vocab_size=600)
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return model, processor


def start(chatty, **options):
    return ChatSession(*chatty, **GREEDY, **options)


def afresh(session, shown):
    """A session of the same conversation that holds nothing yet; `shown` is pixels by number."""
    fresh = ChatSession(session.model, session.processor, prefill_chunk_size=None, **GREEDY)
    said = session._state.conversation
    images = tuple(replace(p, pixel_values=place(shown[p.number])) for p in said.images)
    fresh._state = _State(replace(said, images=images))
    fresh._numbers = itertools.count(1000)
    return fresh


def check_same(session, fresh):
    """Answers, tokens, keys and values of the last question are those of a fresh session."""
    assert session.history == fresh.history
    held, wanted = session._held, fresh._held
    tokens = session.report.prompt_tokens
    ours, theirs = held.transcript.columns, wanted.transcript.columns
    assert torch.equal(ours[1:], theirs[1:])
    text = ours[0].clamp(min=-1) == theirs[0].clamp(min=-1)  # images have other numbers
    assert bool(text.all())
    for mine, other in zip(held.cache.layers, wanted.cache.layers, strict=True):
        for a, b in ((mine.keys, other.keys), (mine.values, other.values)):
            torch.testing.assert_close(a[:, :, :tokens], b[:, :, :tokens], rtol=1e-3, atol=1e-4)


def shown_in(session, *pictures):
    """Pixels by number, of the images of a conversation in order."""
    numbers = [picture.number for picture in session._state.conversation.images]
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
