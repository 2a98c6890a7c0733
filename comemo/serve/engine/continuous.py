"""An engine of continuous batching: requests join and leave between any two decode steps.

One thread owns the model. In each round it drops what was cancelled, admits who waits in fair
order, reads a part of one prompt, and decodes one token of every answer in one ragged batch.
"""

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from comemo.batch.answering import describe, is_of_request
from comemo.decode.interface import GeneratingModel
from comemo.decode.loop import why_not
from comemo.serve.engine.answer import Answer, AnswerText
from comemo.serve.engine.decoding import (
    BrokenLogitsError,
    Chosen,
    DecodeSteps,
    Row,
    first_tokens,
)
from comemo.serve.engine.held import HeldPrefixes
from comemo.serve.engine.key_pool import KeyPool
from comemo.serve.engine.looks import LookSteps
from comemo.serve.engine.picture_pool import PicturePool
from comemo.serve.engine.pool_sizes import PoolSizes
from comemo.serve.engine.prompts import PromptSteps
from comemo.serve.engine.request import Request
from comemo.serve.engine.settings import EngineSettings
from comemo.serve.engine.waiting import FairQueue
from comemo.serve.work import Ended, EngineState, Event, Failed, Finished, Refused, TokenFacts, Work
from comemo.store.store import MemoryStore

_log = logging.getLogger("comemo.serve")
_IDLE_S = 0.5  # how often deadlines of waiting requests are looked at if nothing else happens


class ContinuousEngine:
    """Answers requests with a model of its own.

    An answer depends on its request alone: in float32 its tokens are those of the request alone.

    Args:
        model: a `CoMemoForConditionalGeneration` on its device; nobody else may use it.
        tokenizer: of its checkpoint.
        stop_text: that ends an answer.
        settings: limits.
        store_of: the `MemoryStore` of a namespace, or None.

    Raises:
        ValueError: a model that static buffers do not support (on several devices, offloaded, with
            another attention in the mixin layers), with absolute memory positions, or with mixin
            layers that are not plain; too little memory.
    """

    def __init__(
        self,
        model: GeneratingModel,
        tokenizer: Any,
        stop_text: str,
        settings: EngineSettings | None = None,
        store_of: Callable[[str], MemoryStore | None] = lambda namespace: None,
    ) -> None:
        self.settings = settings or EngineSettings()
        _check_model(model)
        self._model, self._tokenizer, self._stop_text = model, tokenizer, stop_text
        self._stop_id = tokenizer.convert_tokens_to_ids(stop_text)
        self.sizes = PoolSizes.plan(model, self.settings)
        self.longest = min(self.settings.longest, self.sizes.keys)
        self._keys = KeyPool(model, self.sizes.keys)
        self._pictures = PicturePool(model, self.sizes.pictures, store_of)
        self._held = HeldPrefixes(self._keys)
        self._prompts = PromptSteps(
            model, self._keys, self._pictures, self._held, self.settings.chunk
        )
        self._looks = LookSteps(model, tokenizer, stop_text, self._keys)
        self._decoding = DecodeSteps(model, self._keys, self._pictures, self.settings.answers)
        self._waiting: FairQueue[Request] = FairQueue()
        self._reading: list[Request] = []
        self._answering: list[Request] = []
        self._looking: list[Request] = []  # their answers are complete
        self._totals: Counter[str] = Counter()
        self._reason, self._stopping = "", False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="comemo-engine", daemon=True)
        self._thread.start()

    def submit(self, work: Work, deliver: Callable[[Event], None]) -> Request:
        """See `Engine.submit`."""
        request = Request(work, deliver)
        self._prompts.check(request, self.longest)
        if work.sampling.n > self.settings.answers:
            raise Refused(
                "too_large",
                f"at most {self.settings.answers}, got n={work.sampling.n}",
                "answers of a request",
            )
        with self._wake:
            if self._reason:
                raise Refused("closing", self._reason)
            limits = (
                ("waiting requests", len(self._waiting), self.settings.waiting),
                (
                    "waiting requests of one key",
                    self._waiting.count(work.namespace),
                    self.settings.waiting_each,
                ),
            )
            for name, count, most in limits:
                if count >= most:
                    raise Refused("busy", f"at most {most} {name}: try again later", name)
            self._waiting.put(work.namespace, request)
            self._totals["requests"] += 1
            self._wake.notify_all()
        return request

    def cancel(self, ticket: Request) -> None:
        """See `Engine.cancel`."""
        with self._wake:
            ticket.cancelled = True
            self._wake.notify_all()

    def holds(self, namespace: str, key: str) -> bool:
        """See `Engine.holds`."""
        with self._wake:
            return self._pictures.holds(namespace, key)

    def state(self) -> EngineState:
        """See `Engine.state`."""
        with self._wake:
            keys, pictures = self._keys.segments, self._pictures.segments
            totals: dict[str, float] = dict(self._totals)
            totals |= {"pictures_computed": self._pictures.computed, "steps": self._decoding.count}
            return EngineState(
                healthy=not self._reason and self._thread.is_alive(),
                reason=self._reason,
                waiting=len(self._waiting),
                reading=len(self._reading),
                answering=len(self._answering) + len(self._looking),
                key_tokens=keys.capacity - keys.free,
                key_capacity=keys.capacity,
                picture_tokens=pictures.capacity - pictures.free,
                picture_capacity=pictures.capacity,
                totals=totals,
            )

    def close(self, grace_s: float = 0.0) -> None:
        """See `Engine.close`."""
        with self._wake:
            self._reason = self._reason or "the server is shutting down"
            self._wake.notify_all()
            self._wake.wait_for(lambda: not self._busy(), grace_s)
            self._stopping = True
            self._wake.notify_all()
        self._thread.join()

    def _busy(self) -> bool:
        return bool(len(self._waiting) or self._at_work())

    def _at_work(self) -> list[Request]:
        return [*self._reading, *self._answering, *self._looking]

    def _run(self) -> None:
        end = Refused("closing", "the server is shutting down")
        try:
            while self._next_round():
                self._round()
        except BaseException as error:  # a fault of the engine: nobody may wait forever
            _log.exception("the engine has stopped")
            end = Refused("internal", f"the engine has stopped: {describe(error)}")
        with self._wake:
            self._reason = self._reason or end.text
            requests = [*self._waiting.items(), *self._at_work()]
            self._waiting, self._reading, self._answering = FairQueue(), [], []
            self._looking = []
            self._wake.notify_all()
        for request in requests:
            self._deliver(request, Failed(end))

    def _next_round(self) -> bool:
        """Wait for something to do; False if the engine is to end."""
        with self._wake:
            while not (self._stopping or self._at_work()):
                self._drop_waiting()
                if self._admit():
                    break
                self._wake.notify_all()  # `close` may wait for this
                self._wake.wait(_IDLE_S)
            return not self._stopping

    def _round(self) -> None:
        with self._wake:
            self._drop_waiting()
            for request in self._at_work():
                if (error := _given_up(request)) is not None:
                    self._end(request, error)
            self._admit()
        if self._reading:
            # Who is done soonest goes first, and who has waited long.
            now = time.monotonic()
            request = min(
                self._reading,
                key=lambda one: self._prompts.seconds(one) - (now - (one.admitted or now)),
            )
            self._read(request)
        if self._answering:
            self._decode()
        if self._looking:
            self._look(self._looking[0])

    def _drop_waiting(self) -> None:
        for request in self._waiting.items():
            if (error := _given_up(request)) is not None:
                self._waiting.remove(request.work.namespace, request)
                self._totals["cancelled" if request.cancelled else "timeouts"] += 1
                self._deliver(request, Failed(error))

    def _admit(self) -> bool:
        """Admit who waits, in fair order, as long as there is room; whether anyone was."""
        admitted = False
        while (request := self._waiting.first()) is not None:
            at_work = self._at_work()
            rows = sum(one.work.sampling.n for one in at_work) + request.work.sampling.n
            if rows > self.settings.answers or not self._prompts.admit(request):
                if at_work:
                    break
                # Nobody will make room.
                self._waiting.pop()
                self._fail(request, Refused("failed", "there is no memory for it"))
                continue
            self._waiting.pop()
            self._reading.append(request)
            admitted = True
        return admitted

    def _read(self, request: Request) -> None:
        try:
            logits = self._prompts.advance(request, self.settings.stall_s)
            if logits is not None:
                self._begin(request, logits)
        except Exception as error:
            self._give_up(request, error)

    def _begin(self, request: Request, logits: torch.Tensor) -> None:
        """The prompt is read: choose the first token of each answer."""
        sampling = request.work.sampling
        self._prompts.share_prompt(request)
        request.answers = [
            Answer(
                choice,
                sampling,
                AnswerText(self._tokenizer, self._stop_text, sampling.stop),
                self._stop_id,
                logits.device,
            )
            for choice in range(sampling.n)
        ]
        for answer in request.answers:
            request.begin(answer, self._model)
        self._reading.remove(request)
        self._answering.append(request)
        begun = request.begun()
        self._totals["prompt_tokens"] += begun.prompt_tokens
        self._totals["cached_tokens"] += begun.cached_tokens
        self._totals["pictures_found"] += begun.found_pictures
        self._deliver(request, begun)
        rows = [(request, answer) for answer in request.answers]
        self._take(rows, first_tokens(request, logits))

    def _take(self, rows: list[Row], chosen: list[Chosen]) -> None:
        """Deliver the next tokens of answers, or fail their requests."""
        for (request, answer), facts in zip(rows, chosen, strict=True):
            if isinstance(facts, Exception):
                self._give_up(request, facts)
            elif request in self._answering:  # another of its answers may have failed
                try:
                    self._add(request, answer, facts)
                except Exception as error:
                    self._give_up(request, error)

    def _add(self, request: Request, answer: Answer, facts: TokenFacts) -> None:
        self._totals["answer_tokens"] += 1
        self._deliver(request, answer.take(facts))
        if answer.reason is None:
            return
        request.record(answer, self._model)
        self._deliver(request, Ended(answer.choice, answer.reason, len(answer.tokens)))
        if all(answer.reason is not None for answer in request.answers):
            self._answering.remove(request)
            if request.work.look:
                self._looking.append(request)
            else:
                self._finish(request)

    def _look(self, request: Request) -> None:
        try:
            self._prompts.place(request)
            looked = self._looks.advance(request, self.settings.stall_s)
        except Exception as error:
            self._give_up(request, error)
            return
        if looked is not None:
            self._deliver(request, looked)
            if all(answer.looked for answer in request.answers):
                self._looking.remove(request)
                self._finish(request)

    def _decode(self) -> None:
        rows = [
            (request, answer)
            for request in self._answering
            for answer in request.answers
            if answer.reason is None
        ]
        self._take(rows, self._decoding.run(rows))

    def _give_up(self, request: Request, error: Exception) -> None:
        """A request failed; the others go on."""
        broken = isinstance(error, BrokenLogitsError)
        if broken:
            refused = Refused("failed", "the model's logits are not numbers")
        elif is_of_request(error):
            refused = Refused("failed", describe(error))
        else:
            _log.error("a request failed", exc_info=error)
            refused = Refused("internal", f"a fault of the server: {type(error).__name__}")
        with self._wake:
            self._end(request, refused, broken)

    def _end(self, request: Request, error: Refused, broken: bool = False) -> None:
        for held in (self._reading, self._answering, self._looking):
            if request in held:
                held.remove(request)
        self._looks.forget(request)
        self._prompts.release(request, broken)
        self._fail(request, error)

    def _fail(self, request: Request, error: Refused) -> None:
        kinds = {"timeout": "timeouts"}
        name = "cancelled" if request.cancelled else kinds.get(error.kind, "failed")
        self._totals[name] += 1
        self._deliver(request, Failed(error))

    def _finish(self, request: Request) -> None:
        with self._wake:
            self._totals["finished"] += 1
            self._prompts.release(request)
        self._deliver(request, Finished())

    @staticmethod
    def _deliver(request: Request, event: Event) -> None:
        if request.cancelled:
            return
        with contextlib.suppress(RuntimeError):  # the loop of its client is closed
            request.deliver(event)


def _given_up(request: Request) -> Refused | None:
    """Why nobody waits for a request any more; None if somebody does."""
    if request.cancelled:
        return Refused("closing", "the client is gone")
    if time.monotonic() > request.work.deadline:
        return Refused("timeout", "the request took longer than the server allows")
    return None


def _check_model(model: GeneratingModel) -> None:
    reasons = why_not(model, lambda name: None)
    if model.config.memory_positions == "absolute":
        reasons.append("config.memory_positions='absolute'")
    if model.model.split is not None:
        reasons.append("layers that ranks divide")
    if model.training:
        reasons.append("training mode")
    if reasons:
        raise ValueError(
            "ContinuousEngine: wanted a model in evaluation mode, whole on one device, with"
            f" position-free image memories, got {', '.join(reasons)}"
        )
