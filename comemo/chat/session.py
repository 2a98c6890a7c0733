"""A conversation that goes on from where it is: cache and image memory stay between questions."""

import itertools
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import comemo_kernels as ops
from comemo import prompts
from comemo.chat.conversation import Conversation, load_pictures, scaled_length
from comemo.chat.options import text_options
from comemo.chat.published import check_tokenizer
from comemo.chat.transcript import HeldTokens, Transcript
from comemo.cli.progress import PieceStreamer, TokenClock
from comemo.decode.cache import ROOM_FOR_ANSWER
from comemo.decode.prefill import read_prompt
from comemo.outputs import CACHE
from comemo_kernels import ImageMemory


@dataclass(frozen=True)
class TurnReport:
    """What an answer took.

    Attributes:
        prompt_tokens: of the whole conversation up to the answer.
        read_tokens: of them, those that were not in the cache already.
        new_tokens: of the answer.
        first_s: seconds to its first token, everything included.
        per_token_s: median seconds from one token to the next; not a number for a single one.
    """

    prompt_tokens: int
    read_tokens: int
    new_tokens: int
    first_s: float
    per_token_s: float


@dataclass(frozen=True)
class _State:
    """What a session knows, replaced as a whole: whatever interrupts, its parts agree.

    Attributes:
        said: the conversation.
        memory: of all its pictures.
        report: of its last answer.
    """

    said: Conversation
    memory: ImageMemory | None = None
    report: TurnReport | None = None


class ChatSession:
    """A conversation about pictures that reads only what is new.

    Each question is answered exactly as if the whole conversation were read at once, and of that
    only the tokens are computed that the cache does not hold yet: the new question, and of the
    last answer what reads otherwise as part of a prompt (with `decode_positions="raw"` all of it).
    Text that a first picture follows is read once more, for without any picture the mixin layers
    are left out.

    One thread at a time; `stop` may be called from any.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        processor: the `CoMemoProcessor` of its checkpoint.
        system_message: instead of the template's own.
        rope: "dhr" or "original" (recommended for text in pictures).
        visibility: who sees a picture. "causal": its own question and everything later. "all":
            everything, as in the published model, so that a later picture makes the session read
            all of the conversation again.
        prefill_chunk_size: tokens that are read at a time, a bound on memory.
        memory_store: a `MemoryStore` to look pictures up in.
        options: what `generate` takes, for every answer.

    Raises:
        ValueError: an unknown choice, or a tokenizer without CoMemo's control tokens.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        system_message: str | None = None,
        rope: str = "dhr",
        visibility: str = "causal",
        prefill_chunk_size: int | None = 4096,
        memory_store: Any = None,
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
        """(question, answer) pairs so far; a list of the caller's own."""
        return list(self._state.said.turns)

    @property
    def report(self) -> TurnReport | None:
        """What the last answer took; None before any."""
        return self._state.report

    @property
    def nbytes(self) -> int:
        """Bytes of the self-attention's cache and of the image memory, media included."""
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
            question: text; `<image>` marks where a picture goes, without any mark the pictures go
                before it. Names of control tokens in it stay text.
            images: pictures that come with it, one or a list: PIL image, path, bytes, file, uint8
                array, or (pixel_values, grid) as of `load_image`.
            streamer: receives tokens as they come.
            options: what `generate` takes, beside and before those of the session, as far as it
                gives one text.

        Returns:
            The answer, or as much of it as there was when `stop` was called.

        Raises:
            ValueError: pictures and marks that disagree, a prompt beyond the position range, an
                option that does not give one text.
            RuntimeError: another thread is at work on this session. Whatever is raised, here or
                while the answer is made, the session is as it was before the question.
        """
        with self._alone("ask"):
            self._stopped.clear()
            return self._ask(question, images, streamer, options)

    def stream(self, question: str, images: Any = None, **options: Any) -> Iterator[str]:
        """Answer a question piece by piece.

        Args:
            question, images, options: as of `ask`.

        Yields:
            Parts of the answer; `report` and `history` follow when it is complete. Whoever leaves
            the loop early stops the answer, which then counts as far as it came.
        """
        pieces: queue.SimpleQueue = queue.SimpleQueue()
        streamer = PieceStreamer(self.tokenizer, self._stop, pieces.put)

        def work() -> None:
            end: BaseException | None = None
            try:
                self.ask(question, images, streamer=streamer, **options)
            except BaseException as error:  # for the thread that reads the pieces
                end = error
            pieces.put(end)

        worker = threading.Thread(target=work, daemon=True)
        try:
            worker.start()
            while isinstance(piece := pieces.get(), str):
                yield piece
        except BaseException:  # whoever asked has left, or was interrupted while waiting
            while worker.is_alive():  # `ask` forgets what is said before it begins
                self.stop()
                worker.join(0.01)
            raise
        worker.join()
        if piece is not None:
            raise piece

    def regenerate(self, *, streamer: BaseStreamer | None = None, **options: Any) -> str:
        """Answer the last question again; nothing but its last token is read anew.

        Args:
            streamer, options: as of `ask`.

        Raises:
            ValueError: nothing was asked yet.
            RuntimeError: as of `ask`. The earlier answer stands then.
        """
        with self._alone("regenerate"):
            self._stopped.clear()
            verb = "ChatSession.regenerate"
            options = self._options_for(verb, options)
            clock = TokenClock(streamer)
            said = self._state.said
            if not said.turns:
                raise ValueError(f"{verb}: nothing was asked yet")
            *turns, (question, _) = said.turns
            said = replace(said, turns=tuple(turns))
            return self._answer(said, question, clock, options)

    def stop(self) -> None:
        """End the answer that is being made after its next token."""
        self._stopped.set()

    def fork(self) -> "ChatSession":
        """The same conversation, to go on otherwise; the image memory is shared.

        Raises:
            RuntimeError: as of `ask`.
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

    def reset(self, keep_pictures: bool = False) -> None:
        """Forget everything that was said and shown.

        Args:
            keep_pictures: whether the pictures go with the next question, as if shown anew; their
                memory stays.

        Raises:
            ValueError: pictures of a memory of absolute positions: it serves one place alone.
            RuntimeError: as of `ask`.
        """
        with self._alone("reset"):
            said, memory = self._state.said, self._state.memory
            if keep_pictures and memory is not None and memory.absolute:
                raise ValueError(
                    "ChatSession.reset: keep_pictures must be False with"
                    " config.memory_positions='absolute', got True"
                )
            pictures = said.pictures if keep_pictures else ()
            pictures = tuple(replace(picture, turn=0) for picture in pictures)
            said = replace(said, turns=(), pictures=pictures)
            self._state = _State(said, memory if keep_pictures else None, self.report)
            self._held = HeldTokens(len(self._held.cache.layers))

    def _alone(self, verb: str) -> threading.Lock:
        """The lock, to be held by `with`, which no interrupt can part from its release.

        Between the look at it and that, another thread may take it: then this one waits.
        """
        if self._lock.locked():
            raise RuntimeError(
                f"ChatSession.{verb}: another thread is at work on this session: wait for it, or"
                " fork() the session before"
            )
        return self._lock

    def _options_for(self, verb: str, options: dict[str, Any]) -> dict[str, Any]:
        """What `generate` is called with, checked before any work."""
        options = text_options(verb, self.options | options, self.model, self.tokenizer)
        chosen = options.get("generation_config") or self.model.generation_config
        kept = options.get("cache_implementation") or chosen.cache_implementation
        if kept is not None:
            raise ValueError(
                f"{verb}: the session keeps the cache, got cache_implementation={kept!r}: hand it"
                " a DecodeLoop as decode_loop for one that stays where it is"
            )
        return options

    def _ask(
        self, question: str, images: Any, streamer: BaseStreamer | None, options: dict[str, Any]
    ) -> str:
        options = self._options_for("ChatSession.ask", options)
        clock = TokenClock(streamer)
        said, config = self._state.said, self.model.config
        new = load_pictures(
            images, len(said.turns), self._numbers, self.processor.image_processor, config
        )
        said = replace(said, pictures=(*said.pictures, *new))
        shown = sum(text.count(prompts.IMAGE_MARK) for text, _ in said.turns)
        marks, wanted = question.count(prompts.IMAGE_MARK), len(said.pictures) - shown
        if marks == 0:
            question = f"{prompts.IMAGE_MARK}\n" * wanted + question
        elif marks != wanted:
            raise ValueError(
                f"ChatSession.ask: the question must have a {prompts.IMAGE_MARK} mark for each of"
                f" its {wanted} images, or none, got {marks}"
            )
        return self._answer(said, question, clock, options)

    @torch.no_grad()
    def _answer(
        self,
        said: Conversation,
        question: str,
        clock: TokenClock,
        options: dict[str, Any],
    ) -> str:
        """Answer, and only then note what was said: whatever fails leaves the session as it was."""
        wanted, ids = said.prompt(question, self.model, self.tokenizer)
        input_ids = torch.tensor([ids], device=self.model.device)
        image_mask = (wanted.tokens < 0)[None].to(input_ids.device)
        position_ids = wanted.positions[None].to(input_ids.device)
        self.model._check_range(position_ids, torch.ones_like(input_ids), bool(said.pictures))
        memory = self._place(self._remember(said, image_mask, position_ids), wanted)
        held = self._held
        kept = held.go_back(wanted)
        longest = options.get("max_new_tokens") or 0
        held.cache.reserve(len(wanted) + min(longest, ROOM_FOR_ANSWER))
        core, shown = self.model.model, wanted.visible.new_tensor([len(said.pictures)])
        whole = self._reading(memory, shown)
        output = read_prompt(
            self.model,
            lambda first, last: core.embed(input_ids, image_mask, whole, first, last),
            position_ids,
            held.cache,
            start=kept,
            chunk=self.prefill_chunk_size,
            memory=lambda first, last: self._reading(memory, wanted.visible[first:last]),
        )
        held.claim(wanted)
        sequences = self._generate(output, wanted, memory, clock, options)
        tokens = sequences[0, 1:].tolist()
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        answer = text.split(self._stop)[0].strip()
        report = TurnReport(
            prompt_tokens=len(wanted),
            read_tokens=len(wanted) - kept,
            new_tokens=len(tokens),
            first_s=clock.first,
            per_token_s=clock.per_token,
        )
        self._state = _State(said.built().answered(question, answer), memory, report)
        return answer

    def _remember(
        self, said: Conversation, image_mask: Tensor, position_ids: Tensor
    ) -> ImageMemory | None:
        """The memory of all pictures; what is known of it is not computed again."""
        new = [picture for picture in said.pictures if picture.pixel_values is not None]
        tiles = [picture.pixel_values for picture in new if picture.pixel_values is not None]
        memory = self._state.memory
        if not new:
            return memory
        known = sum(picture.tokens for picture in said.pictures[: -len(new)])
        later = image_mask & (image_mask.long().cumsum(1) > known)
        core = self.model.model
        pixel_values = torch.cat([t.to(tiles[0].device) for t in tiles])
        found = core.build_image_memory(
            pixel_values, later, position_ids, [p.grid for p in new], self.memory_store
        )
        core.language_model.build_memory(found)
        return found if memory is None else _join(memory, found)

    def _place(self, memory: ImageMemory | None, wanted: Transcript) -> ImageMemory | None:
        """The memory where the pictures stand in this prompt."""
        if memory is None:
            return None
        device = self.model.device
        spans = torch.tensor([[[0, len(memory)]]], device=device)
        places = torch.tensor([place for _, place in wanted.pictures], device=device)
        return memory.reading(spans, None if memory.absolute else places)

    def _reading(self, memory: ImageMemory | None, visible: Tensor) -> ImageMemory | None:
        """The memory as tokens read it that see so many pictures, [n]."""
        if memory is None:
            return None
        borders = torch.tensor((0, *memory.sizes)).cumsum(0)
        if bool((visible == visible[0]).all()):
            visible = visible[:1]
        ends = borders[visible]
        spans = torch.stack([torch.zeros_like(ends), ends], -1)[None]  # [1, n or 1, 2]
        return memory.reading(spans.to(self.model.device))

    def _generate(
        self,
        output: Any,
        wanted: Transcript,
        memory: ImageMemory | None,
        clock: TokenClock,
        options: dict[str, Any],
    ) -> Tensor:
        """Go on from the prompt's last logits; what the cache then holds is noted."""
        N, device = len(wanted), self.model.device
        options = {"pad_token_id": self.tokenizer.pad_token_id} | options
        chosen = options.get("generation_config") or self.model.generation_config
        stop = self.tokenizer.convert_tokens_to_ids(self._stop)
        criteria = [*options.pop("stopping_criteria", ()), _Stopped(self._stopped)]
        beams = options.get("num_beams")
        rows = (getattr(chosen, "num_beams", None) if beams is None else beams) or 1
        cache = self._held.cache
        if rows > 1:  # beams go their own ways, the session stays at the prompt
            cache = cache.fork(N)
            cache.batch_repeat_interleave(rows)
            output.logits = output.logits.repeat_interleave(rows, 0)
            setattr(output, CACHE, cache)
        sequences = self.model.generate(
            torch.tensor([[self.tokenizer.bos_token_id]], device=device),
            attention_mask=torch.ones(1, N, dtype=torch.long, device=device),
            position_ids=wanted.positions[None].to(device),
            **{CACHE: cache},
            image_memory=self._reading(memory, wanted.visible[-1:]),
            prompt_output=output,
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=clock if rows == 1 else None,
            **{"eos_token_id": stop} | options,
        )
        if rows == 1:
            self._held.claim(wanted + self._note(sequences[0, 1:], wanted, memory is not None))
        return sequences

    def _note(self, tokens: Tensor, wanted: Transcript, pictures: bool) -> Transcript:
        """The transcript of generated tokens."""
        count = len(wanted) + torch.arange(len(tokens))
        positions = wanted.positions[-1] + 1 + torch.arange(len(tokens))
        raw = pictures and self.model.config.decode_positions == "raw"
        queries = count if raw else positions
        scaling = scaled_length(self.model, positions, count + 1)
        rows = tokens.cpu(), positions, queries, wanted.visible[-1], scaling
        return Transcript.of(*rows, wanted.pictures)


class _Stopped(StoppingCriteria):
    """Ends all sequences once it is asked to."""

    def __init__(self, asked: threading.Event) -> None:
        self.asked = asked

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


def _join(memory: ImageMemory, new: ImageMemory) -> ImageMemory:
    """Both behind each other; built again by the layers where one of them is not built."""
    if memory.keys.keys() != new.keys.keys():
        memory, new = replace(memory, keys={}, values={}), replace(new, keys={}, values={})
    return ops.join_images([memory, new])
