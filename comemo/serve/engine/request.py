"""A request inside the engine: what it holds, how far it is, and what it costs."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from comemo.chat.conversation import transcribe
from comemo.chat.conversation_memory import memory_read_by, place_memory
from comemo.decode.interface import GeneratingModel
from comemo.memory.inputs import queries_at_count
from comemo.serve.engine.answer import Answer
from comemo.serve.engine.held import Held
from comemo.serve.engine.picture_pool import Shown
from comemo.serve.engine.step import Reading
from comemo.serve.work import Begun, Event, Work
from comemo_kernels import ImageMemory


class Request:
    """A request at work, and the ticket that its client has.

    Args:
        work: what is asked.
        deliver: called with each event.

    Attributes:
        shown: its pictures; None without pictures or before it is admitted.
        shown_before: whether they were there, or computed for another request.
        held: segments of the KV cache, one for each answer; the prompt is read into the first.
        cached: tokens of the prompt that did not have to be read.
        answers: once the prompt is read.
        cancelled: whether its client is gone.
        memory: of its pictures, at their positions in the prompt; None without or before.
        moves: of the pool of pictures when the memory was made.
    """

    def __init__(self, work: Work, deliver: Callable[[Event], None]) -> None:
        self.work, self.deliver = work, deliver
        self.arrived = time.monotonic()
        self.admitted: float | None = None
        self.shown: Shown | None = None
        self.shown_before = False
        self.held: list[Held] = []
        self.cached = 0
        self.answers: list[Answer] = []
        self.cancelled = False
        self.memory: ImageMemory | None = None
        self.moves = 0

    @property
    def size(self) -> int:
        """Tokens of the prompt and of one answer. The last token of an answer is not stored."""
        return self.work.tokens + self.work.sampling.max_tokens

    @property
    def read(self) -> int:
        """Tokens of the prompt that are in the KV cache."""
        return len(self.held[0].transcript)

    def place(self, memory: ImageMemory | None, model: GeneratingModel) -> None:
        """Take the memory of all pictures, at their positions in the prompt."""
        self.memory = place_memory(memory, self.work.transcript, model.device)

    def memory_for(self, first: int, last: int, device: torch.device) -> ImageMemory | None:
        """The memory as tokens first to last of the prompt read it."""
        return memory_read_by(self.work.transcript.visible[first:last], self.memory, device)

    def reading(self) -> Reading | None:
        """What its answers read of the image memory."""
        if self.shown is None:
            return None
        images = int(self.work.transcript.visible[-1])
        positions = tuple(position for _, position in self.work.transcript.images[:images])
        return Reading(self.shown, images, positions)

    def begun(self) -> Begun:
        """What it has cost until its first token."""
        now, admitted = time.monotonic(), self.admitted or self.arrived
        found = 0 if self.shown is None else self.shown.found
        return Begun(
            prompt_tokens=self.work.tokens,
            cached_tokens=self.cached,
            pictures=len(self.work.pictures),
            found_pictures=len(self.work.pictures) if self.shown_before else found,
            waited_s=admitted - self.arrived,
            read_s=now - admitted,
        )

    def begin(self, answer: Answer, model: GeneratingModel) -> None:
        """Set where the first token of an answer is: after the prompt."""
        transcript = self.work.transcript
        answer.segment = self.held[answer.choice].segment
        answer.position = int(transcript.positions[-1]) + 1
        answer.count = len(transcript) + 1
        at_count = queries_at_count(model.config, bool(self.work.pictures))
        answer.query = len(transcript) if at_count else answer.position

    def record(self, answer: Answer, model: GeneratingModel) -> None:
        """Let later requests find the tokens of a complete answer; its last one is not stored."""
        tokens = self.tokens_of(answer)[:-1]
        prompt = self.work.transcript
        self.held[answer.choice].transcript = prompt + transcribe(tokens, prompt, model)

    @staticmethod
    def tokens_of(answer: Answer) -> Tensor:
        """int64 [n]."""
        return torch.tensor(answer.tokens, dtype=torch.long)
