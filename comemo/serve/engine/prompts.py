"""Prompts are admitted and read: pictures tile by tile, tokens chunk by chunk."""

import time

import torch

from comemo.decode.interface import GeneratingModel
from comemo.outputs import CACHE
from comemo.serve.engine.held import HeldPrefixes
from comemo.serve.engine.key_pool import KeyPool
from comemo.serve.engine.picture_pool import PicturePool
from comemo.serve.engine.request import Request
from comemo.serve.work import Refused

_SHORTEST = 32  # tokens of a chunk: below it a pass costs the same


class Pace:
    """Seconds that one unit of work takes, by what it took lately.

    Args:
        guess: seconds, before anything was measured.
    """

    def __init__(self, guess: float) -> None:
        self.seconds = guess
        self._known = False

    def learn(self, units: int, seconds: float) -> None:
        """Take a measurement into account."""
        if units:
            measured = seconds / units
            self.seconds = 0.5 * (self.seconds + measured) if self._known else measured
            self._known = True

    def units(self, seconds: float) -> int:
        """How many units fit in some seconds."""
        return int(seconds / max(self.seconds, 1e-9))


class PromptSteps:
    """Admits requests, and reads their prompts in parts.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        keys, pictures, held: where it works.
        chunk: most tokens that are read at once.
    """

    def __init__(
        self,
        model: GeneratingModel,
        keys: KeyPool,
        pictures: PicturePool,
        held: HeldPrefixes,
        chunk: int,
    ) -> None:
        self._model, self._keys, self._pictures, self._held = model, keys, pictures, held
        self._chunk = chunk
        self._per_tile, self._per_token = Pace(0.01), Pace(0.0001)

    def check(self, request: Request, longest: int) -> None:
        """Refuse what can never be admitted.

        Raises:
            Refused: names the limit.
        """
        n, size = request.work.sampling.n, request.size
        image_tokens = sum(picture.tokens for picture in request.work.pictures)
        got = f"{request.work.tokens:,} and max_tokens={request.work.sampling.max_tokens:,}"
        keys, pictures = self._keys.segments.capacity, self._pictures.segments.capacity
        limits = (
            ("tokens of a prompt and its answer", size, longest, got),
            ("tokens of all answers of a request", n * size, keys, f"n={n} times {got}"),
            ("image tokens of a request", image_tokens, pictures, f"{image_tokens:,}"),
        )
        for name, wanted, most, described in limits:
            if wanted > most:
                raise Refused("too_large", f"at most {most:,}, got {described}", name)

    def admit(self, request: Request) -> bool:
        """Give a request its segments; False, and nothing is held, if there is no room now."""
        work = request.work
        if work.pictures:
            claimed = self._pictures.claim(work.namespace, work.pictures)
            if claimed is None:
                return False
            request.shown, request.shown_before = claimed
        for choice in range(work.sampling.n):
            found = self._held.take(work.namespace, work.transcript, request.size)
            if found is None:
                self.release(request)
                return False
            held, known = found
            request.held.append(held)
            request.cached = known if choice == 0 else request.cached
        request.admitted = time.monotonic()
        return True

    def release(self, request: Request, broken: bool = False) -> None:
        """Give everything back; what was read of the prompt stays for later requests.

        Args:
            request: that has ended, or is given up.
            broken: its tensors may hold NaN: nothing stays.
        """
        for held in request.held:
            if broken:
                self._held.drop(held, clear=True)
            else:
                self._held.leave(held)
        request.held = []
        if request.shown is not None:
            self._pictures.release(request.shown)
            if broken and not request.shown.users:
                self._pictures.drop(request.shown)
            request.shown = None
        request.memory = None

    def seconds(self, request: Request) -> float:
        """Seconds until the prompt of an admitted request is read, about."""
        tiles = 0
        if request.shown is not None:
            tiles = self._pictures.next_tiles(request.shown, request.work.pictures)
        tokens = request.work.tokens - request.read
        return tiles * self._per_tile.seconds + tokens * self._per_token.seconds

    def advance(self, request: Request, stall_s: float) -> torch.Tensor | None:
        """Compute a part of a prompt.

        Args:
            request: admitted, with something to read.
            stall_s: seconds that the part may take, about.

        Returns:
            The logits [1, V] of the prompt's last token if it is read now.

        Raises:
            Exception: of the model, or of a picture that cannot be read.
        """
        if request.shown is not None and not request.shown.complete:
            start = time.perf_counter()
            most = max(1, self._per_tile.units(stall_s))
            tiles = self._pictures.build(request.shown, request.work.pictures, most)
            self._per_tile.learn(tiles, time.perf_counter() - start)
            return None
        return self._read(request, stall_s)

    def place(self, request: Request) -> None:
        """Give a request the memory of its pictures, where it is now."""
        moves = self._pictures.segments.moves
        if request.shown is not None and (request.memory is None or request.moves != moves):
            request.place(self._pictures.read(request.shown), self._model)
            request.moves = moves

    @torch.no_grad()
    def _read(self, request: Request, stall_s: float) -> torch.Tensor | None:
        model, work, held = self._model, request.work, request.held[0]
        first = request.read
        better = self._held.improve(held, work.transcript)  # others may have read the same
        request.cached += better - first
        first = better
        self.place(request)
        start = time.perf_counter()
        size = min(max(self._per_token.units(stall_s), _SHORTEST), self._chunk)
        last = min(first + size, work.tokens)
        prompt, device = work.prompt, model.device
        positions = prompt.position_ids.to(device)
        counts = torch.full((1,), work.tokens, device=device)
        whole = request.memory_for(work.tokens - 1, work.tokens, device)
        output = model(
            inputs_embeds=model.model.embed(
                prompt.input_ids.to(device), prompt.image_mask.to(device), whole, first, last
            ),
            position_ids=positions[:, first:last],
            image_memory=request.memory_for(first, last, device),
            rope_lengths=model.model.rope_lengths(positions, counts),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: self._keys.cache(held.segment, first)},
        )
        held.transcript = work.transcript.first(last)
        if last < work.tokens:
            self._per_token.learn(last - first, time.perf_counter() - start)
            return None
        logits = output.logits[:, -1].float()
        self._per_token.learn(last - first, time.perf_counter() - start)
        return logits

    def share_prompt(self, request: Request) -> None:
        """Copy a prompt that is read into the segments of the other answers."""
        first, *others = request.held
        for held in others:
            self._keys.copy(first.segment, held.segment, request.work.tokens)
            held.transcript = request.work.transcript
