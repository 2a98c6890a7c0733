"""Engines under test: requests from messages, and what comes back."""

import contextlib
import queue
from dataclasses import dataclass, field

from comemo import images, prompts
from comemo.serve.engine.continuous import ContinuousEngine
from comemo.serve.engine.reader import OpenedPicture, PromptReader
from comemo.serve.engine.settings import EngineSettings
from comemo.serve.work import Begun, Ended, Failed, Finished, Looked, Piece, Sampling, Work

LONG = 60.0  # seconds; nothing takes as long
SMALL = 900_000  # bytes: room for some short requests of the small model


@dataclass
class Answered:
    """Everything that an engine delivered for a request."""

    begun: Begun | None = None
    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    facts: list = field(default_factory=list)
    ended: dict[int, Ended] = field(default_factory=dict)
    looked: dict[int, Looked] = field(default_factory=dict)
    error: object = None

    @property
    def text(self):
        assert self.error is None, self.error
        return self.texts[0]


class Client:
    """Asks an engine.

    Args:
        model, processor: of a checkpoint.
        settings: of the engine.
        options: of the `PromptReader`.
    """

    def __init__(self, model, processor, settings=None, store_of=lambda namespace: None, **options):
        self.model = model
        stop = prompts.stop_text(model.config.template)
        self.engine = ContinuousEngine(
            model, processor.tokenizer, stop, settings or EngineSettings(memory=3e7), store_of
        )
        self.reader = PromptReader(model, processor, **options)
        self.loads = []

    def work(self, messages, *shown, namespace="a", look=False, deadline=float("inf"), **sampling):
        """A request; `shown` are (name, (pixel_values, grid)) or (name, picture)."""
        opened = []
        for name, picture in shown:
            if not isinstance(picture, tuple):
                side = self.model.config.vision_config.image_size[0]
                picture = images.load_image(picture, side, self.model.config.max_dynamic_patch)
            pixels, grid = picture

            def load(pixels=pixels, name=name):
                self.loads.append(name)
                return pixels

            opened.append(OpenedPicture(name, tuple(grid), load))
        if isinstance(messages, str):
            parts = [{"type": "image"}] * len(shown) + [{"type": "text", "text": messages}]
            messages = [{"role": "user", "content": parts}]
        read = self.reader.read(messages, opened)
        sampling = Sampling(**{"max_tokens": 12} | sampling)
        return Work(
            namespace, read.prompt, read.transcript, read.pictures, sampling, look, deadline
        )

    def submit(self, work):
        """Queue a request; returns its ticket and the queue of its events."""
        events = queue.SimpleQueue()
        return self.engine.submit(work, events.put), events

    def ask(self, *works):
        """Submit all, then wait for all."""
        waiting = [self.submit(work)[1] for work in works]
        found = [collect(events) for events in waiting]
        return found[0] if len(found) == 1 else found


def collect(events):
    """All events of a request."""
    answered = Answered()
    while True:
        event = events.get(timeout=LONG)
        if isinstance(event, Begun):
            answered.begun = event
        elif isinstance(event, Piece):
            choice = event.choice
            answered.texts[choice] = answered.texts.get(choice, "") + event.text
            answered.tokens.setdefault(choice, []).append(event.token.id)
            answered.facts.append(event.token)
        elif isinstance(event, Ended):
            answered.ended[event.choice] = event
        elif isinstance(event, Looked):
            answered.looked[event.choice] = event
        elif isinstance(event, Failed):
            answered.error = event.error
            return answered
        elif isinstance(event, Finished):
            return answered


def first_pieces(events, count):
    """The first pieces of an answer that goes on."""
    found = []
    while len(found) < count:
        event = events.get(timeout=LONG)
        assert not isinstance(event, (Failed, Finished))
        found += [event] if isinstance(event, Piece) else []
    return found


@contextlib.contextmanager
def client_of(*args, **kwargs):
    """A client whose engine is closed at the end."""
    client = Client(*args, **kwargs)
    try:
        yield client
    finally:
        client.engine.close(0)


def user(*parts):
    """A message of the user: texts, and None for a picture."""
    shown = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": shown}


def assistant(text):
    """A message of the assistant."""
    return {"role": "assistant", "content": text}
