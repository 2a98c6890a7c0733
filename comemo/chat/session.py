"""A conversation that keeps its KV cache and image memory between questions."""

import itertools
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from comemo import prompts
from comemo.chat.conversation import Conversation, load_images, transcribe
from comemo.chat.conversation_memory import extend_memory, memory_read_by, place_memory
from comemo.chat.driver import check_tokenizer, generate_answer
from comemo.chat.options import text_options
from comemo.chat.streamers import PieceStreamer, StopOnEvent, TokenClock, TurnReport
from comemo.chat.transcript import HeldTokens, Transcript
from comemo.decode.cache import ROOM_FOR_ANSWER
from comemo.decode.interface import GeneratingModel, Prefilled
from comemo.decode.prefill import prefill
from comemo.memory.protocols import KeepsMemories
from comemo.processor import CoMemoProcessor
from comemo_kernels import ImageMemory


@dataclass(frozen=True)
class _State:
    """What a session knows. Replaced as a whole, so that its parts agree after any interrupt.

    Attributes:
        conversation: turns and images.
        memory: of all its images.
        report: of its last answer.
    """

    conversation: Conversation
    memory: ImageMemory | None = None
    report: TurnReport | None = None


class ChatSession:
    """A conversation about images that computes only new tokens.

    Each answer is exactly that of the whole conversation read at once. Only tokens that the KV
    cache does not hold are computed: the new question, and the part of the last answer that differs
    as part of a prompt (with `decode_positions="raw"` all of it). Text before a first image is read
    again, because mixin layers are skipped where there are no images.

    Use it from one thread at a time; `stop` may be called from any.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        processor: of its checkpoint.
        system_message: instead of the template's own.
        rope: "dhr" or "original" (recommended for reading text in images).
        visibility: which tokens read an image. "causal": those of its own question and all later
            ones. "all": all tokens, as in the published model, so that a later image makes the
            session read the whole conversation again.
        prefill_chunk_size: tokens of one prefill pass; bounds memory.
        memory_store: a `MemoryStore` to look images up in.
        options: of `generate`, for every answer.

    Raises:
        ValueError: an unknown choice, or a tokenizer without CoMemo's control tokens.
    """

    def __init__(
        self,
        model: GeneratingModel,
        processor: CoMemoProcessor,
        *,
        system_message: str | None = None,
        rope: str = "dhr",
        visibility: str = "causal",
        prefill_chunk_size: int | None = 4096,
        memory_store: KeepsMemories | None = None,
        **options: Any,
    ) -> None:
        self._state = _State(Conversation(system_message, rope, visibility))
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.prefill_chunk_size, self.memory_store = prefill_chunk_size, memory_store
        self.options = options
        self._options_for("ChatSession", {})
        self._stop = prompts.stop_text(model.config.template)
        check_tokenizer(self.tokenizer, self._stop)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._held = HeldTokens(model.config.text_config.num_hidden_layers)

    @property
    def history(self) -> list[tuple[str, str]]:
        """(question, answer) pairs so far, as a new list."""
        return list(self._state.conversation.turns)

    @property
    def report(self) -> TurnReport | None:
        """Cost of the last answer; None before the first."""
        return self._state.report

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache and of the image memory, media included."""
        memory, media = self._state.memory, 0
        if memory is not None and memory.media is not None:
            media = memory.media.nbytes
        return self._held.cache.nbytes + media + (0 if memory is None else memory.nbytes)

    def ask(
        self,
        question: str,
        images: Any = None,
        *,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> str:
        """Answer a question.

        Args:
            question: text; `<image>` marks the position of an image. Without marks the images go
                before it. Names of control tokens in it remain text.
            images: new images, one or a list: PIL image, path, bytes, file, uint8 array, or
                (pixel_values, grid) from `load_image`.
            streamer: receives tokens as they are generated.
            options: of `generate`, in addition to those of the session and overriding them, as far
                as they give one text.

        Returns:
            The answer, or its beginning if `stop` was called.

        Raises:
            ValueError: images and marks that disagree, a prompt beyond the position range, an
                option that does not give one text.
            RuntimeError: another thread uses this session. After any exception the session is as it
                was before the question.
        """
        with self._alone("ask"):
            self._stopped.clear()
            return self._ask(question, images, streamer, options)

    def stream(self, question: str, images: Any = None, **options: Any) -> Iterator[str]:
        """Answer a question piece by piece.

        Args:
            question, images, options: see `ask`.

        Yields:
            Parts of the answer; `report` and `history` are updated when it is complete. Leaving the
            loop early stops the answer; its beginning is kept as the answer.
        """
        pieces: queue.SimpleQueue = queue.SimpleQueue()
        streamer = PieceStreamer(self.tokenizer, self._stop, pieces.put)

        def work() -> None:
            end: BaseException | None = None
            try:
                self.ask(question, images, streamer=streamer, **options)
            except BaseException as error:  # raised in the thread that reads the pieces
                end = error
            pieces.put(end)

        worker = threading.Thread(target=work, daemon=True)
        try:
            worker.start()
            while isinstance(piece := pieces.get(), str):
                yield piece
        except BaseException:  # the caller left the loop, or was interrupted while waiting
            while worker.is_alive():  # `ask` clears an earlier stop when it begins
                self.stop()
                worker.join(0.01)
            raise
        worker.join()
        if piece is not None:
            raise piece

    def regenerate(self, *, streamer: BaseStreamer | None = None, **options: Any) -> str:
        """Answer the last question again; only its last token is read again.

        Args:
            streamer, options: see `ask`.

        Raises:
            ValueError: nothing was asked yet.
            RuntimeError: see `ask`. The earlier answer is kept.
        """
        with self._alone("regenerate"):
            self._stopped.clear()
            verb = "ChatSession.regenerate"
            options = self._options_for(verb, options)
            clock = TokenClock(streamer)
            conversation = self._state.conversation
            if not conversation.turns:
                raise ValueError(f"{verb}: nothing was asked yet")
            *turns, (question, _) = conversation.turns
            conversation = replace(conversation, turns=tuple(turns))
            return self._answer(conversation, question, clock, options)

    def stop(self) -> None:
        """End the current answer after its next token."""
        self._stopped.set()

    def fork(self) -> "ChatSession":
        """A copy of the session, to continue differently; both share the image memory.

        Raises:
            RuntimeError: see `ask`.
        """
        with self._alone("fork"):
            other = ChatSession(
                self.model,
                self.processor,
                prefill_chunk_size=self.prefill_chunk_size,
                memory_store=self.memory_store,
                **self.options,
            )
            other._state, other._held = replace(self._state, report=None), self._held.fork()
            other._numbers = itertools.count(next(self._numbers))
            return other

    def reset(self, keep_images: bool = False) -> None:
        """Forget the conversation.

        Args:
            keep_images: show the images again with the next question; their memory is kept.

        Raises:
            ValueError: `keep_images` with absolute memory positions, which are valid for one
                prompt only.
            RuntimeError: see `ask`.
        """
        with self._alone("reset"):
            conversation, memory = self._state.conversation, self._state.memory
            if keep_images and memory is not None and memory.absolute:
                raise ValueError(
                    "ChatSession.reset: keep_images must be False with"
                    " config.memory_positions='absolute', got True"
                )
            images = conversation.images if keep_images else ()
            images = tuple(replace(image, turn=0) for image in images)
            conversation = replace(conversation, turns=(), images=images)
            self._state = _State(conversation, memory if keep_images else None, self.report)
            self._held = HeldTokens(len(self._held.cache.layers))

    def _alone(self, verb: str) -> threading.Lock:
        """The lock, for a `with` statement, which releases it after any interrupt.

        Another thread may take it between this check and the `with`: then this one waits.
        """
        if self._lock.locked():
            raise RuntimeError(
                f"ChatSession.{verb}: another thread uses this session: wait for it, or fork() the"
                " session first"
            )
        return self._lock

    def _options_for(self, verb: str, options: dict[str, Any]) -> dict[str, Any]:
        """Options of `generate`, checked before any work."""
        options = text_options(verb, self.options | options, self.model, self.tokenizer)
        chosen = options.get("generation_config") or self.model.generation_config
        kept = options.get("cache_implementation") or chosen.cache_implementation
        if kept is not None:
            raise ValueError(
                f"{verb}: the session keeps the KV cache, got cache_implementation={kept!r}: pass"
                " a DecodeLoop as decode_loop for static buffers"
            )
        return options

    def _ask(
        self, question: str, images: Any, streamer: BaseStreamer | None, options: dict[str, Any]
    ) -> str:
        options = self._options_for("ChatSession.ask", options)
        clock = TokenClock(streamer)
        conversation, config = self._state.conversation, self.model.config
        new = load_images(
            images, len(conversation.turns), self._numbers, self.processor.image_processor, config
        )
        conversation = replace(conversation, images=(*conversation.images, *new))
        return self._answer(conversation, conversation.mark(question), clock, options)

    @torch.no_grad()
    def _answer(
        self,
        conversation: Conversation,
        question: str,
        clock: TokenClock,
        options: dict[str, Any],
    ) -> str:
        """Answer, and replace the state only then: an exception leaves the session as it was."""
        model, device, held = self.model, self.model.device, self._held
        transcript, prompt = conversation.prompt(question, model, self.tokenizer)
        prompt, visible, memory = prompt.to(device), transcript.visible, self._state.memory
        memory = extend_memory(memory, conversation, prompt, model.model, self.memory_store)
        memory = place_memory(memory, transcript, device)
        kept = held.go_back(transcript)
        longest = options.get("max_new_tokens") or 0
        held.cache.reserve(len(transcript) + min(longest, ROOM_FOR_ANSWER))
        whole = memory_read_by(visible.new_tensor([len(conversation.images)]), memory, device)
        output = prefill(
            model,
            lambda first, last: model.model.embed(
                prompt.input_ids, prompt.image_mask, whole, first, last
            ),
            prompt.position_ids,
            held.cache,
            start=kept,
            chunk=self.prefill_chunk_size,
            memory=lambda first, last: memory_read_by(visible[first:last], memory, device),
        )
        held.claim(transcript)
        prefilled = Prefilled(
            output.logits,
            held.cache,
            prompt.position_ids,
            memory_read_by(visible[-1:], memory, device),
        )
        tokens, answer = self._generate(prefilled, transcript, clock, options)
        report = TurnReport(
            prompt_tokens=len(transcript),
            read_tokens=len(transcript) - kept,
            new_tokens=len(tokens),
            first_s=clock.first,
            per_token_s=clock.per_token,
        )
        self._state = _State(conversation.built().answered(question, answer), memory, report)
        return answer

    def _generate(
        self,
        prefilled: Prefilled,
        transcript: Transcript,
        clock: TokenClock,
        options: dict[str, Any],
    ) -> tuple[Tensor, str]:
        """Answer a prompt that the cache holds; what the cache holds after it is recorded."""
        tokenizer = self.tokenizer
        options = {"pad_token_id": tokenizer.pad_token_id} | options
        options = {"eos_token_id": tokenizer.convert_tokens_to_ids(self._stop)} | options
        chosen = options.get("generation_config") or self.model.generation_config
        beams = options.get("num_beams")
        beams = (getattr(chosen, "num_beams", None) if beams is None else beams) or 1
        criteria = [*options.pop("stopping_criteria", ()), StopOnEvent(self._stopped)]
        inputs = {
            "prefilled": prefilled,
            "stopping_criteria": StoppingCriteriaList(criteria),
            "streamer": clock if beams == 1 else None,
        }
        tokens, answer = generate_answer(self.model, tokenizer, inputs, options)
        if beams == 1:  # beams have copies of the cache, which still holds the prompt alone
            self._held.claim(transcript + transcribe(tokens, transcript, self.model))
        return tokens, answer
