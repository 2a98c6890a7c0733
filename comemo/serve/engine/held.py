"""What requests have left in the KV cache, by namespace; the least recently used goes first."""

from collections.abc import Iterator
from dataclasses import dataclass

from comemo.chat.transcript import Transcript
from comemo.serve.engine.key_pool import KeyPool
from comemo.serve.engine.segments import Segment


@dataclass(eq=False)
class Held:
    """Tokens in the KV cache.

    Attributes:
        namespace: whose requests may find them.
        segment: where they are.
        transcript: of the tokens that it holds, at most.
        used: whether a request works in it.
    """

    namespace: str
    segment: Segment
    transcript: Transcript
    used: bool = True


class HeldPrefixes:
    """Segments of the KV cache, of requests at work and of those before.

    Args:
        keys: the pool that they are in.
    """

    def __init__(self, keys: KeyPool) -> None:
        self._keys = keys
        self._held: list[Held] = []  # least recently used first

    def take(self, namespace: str, wanted: Transcript, size: int) -> tuple[Held, int] | None:
        """A segment for a prompt, with the tokens of it that are held already.

        Args:
            namespace: whose tokens may be used.
            wanted: of the prompt.
            size: tokens of prompt and answer.

        Returns:
            The segment, and how many tokens of the prompt it holds; None if there is no room now.
        """
        best = self._longest(namespace, wanted)
        # Most of it is of this conversation: continue in place, and forget the rest.
        continued = (
            best is not None
            and not best.used
            and 2 * self._shared(best, wanted) >= len(best.transcript)
        )
        if best is not None and continued and self._keys.segments.resize(best.segment, size):
            shared = self._shared(best, wanted)
            best.transcript, best.used = wanted.first(shared), True
            self._touch(best)
            return best, shared
        segment = self._room_for(size, keep=best)
        if segment is None:
            segment = self._room_for(size, keep=None)
            best = None if best is None or not len(best.segment) else best
        if segment is None:
            return None
        held = Held(namespace, segment, wanted.first(0))
        self._held.append(held)
        shared = 0 if best is None else self.share(held, wanted, best)
        if best is not None and continued:  # moved, because there was no room after it
            self.drop(best)
        return held, shared

    def improve(self, held: Held, wanted: Transcript) -> int:
        """Copy what others have read of a prompt in the meantime; returns how many it has."""
        best = self._longest(held.namespace, wanted, but=held)
        if best is None or self._shared(best, wanted) <= len(held.transcript):
            return len(held.transcript)
        return self.share(held, wanted, best)

    def share(self, held: Held, wanted: Transcript, source: Held) -> int:
        """Copy what a source has of a prompt; returns how many tokens `held` has then."""
        shared = self._shared(source, wanted)
        self._keys.copy(source.segment, held.segment, shared)
        held.transcript = wanted.first(shared)
        return shared

    def leave(self, held: Held) -> None:
        """Nobody works in it any more; its tokens may be found until its room is needed."""
        held.used = False
        if not len(held.transcript):
            self.drop(held)
            return
        self._keys.segments.resize(held.segment, len(held.transcript))
        self._touch(held)

    def drop(self, held: Held, clear: bool = False) -> None:
        """Forget it.

        Args:
            clear: overwrite it, because it may hold NaN.
        """
        if held in self._held:
            if clear:
                self._keys.clear(held.segment)
            self._held.remove(held)
            self._keys.segments.give_back(held.segment)

    def _longest(self, namespace: str, wanted: Transcript, but: Held | None = None) -> Held | None:
        known = [held for held in self._of(namespace) if held is not but]
        best = max(known, key=lambda held: self._shared(held, wanted), default=None)
        return best if best is not None and self._shared(best, wanted) else None

    def _of(self, namespace: str) -> Iterator[Held]:
        return (held for held in self._held if held.namespace == namespace)

    @staticmethod
    def _shared(held: Held, wanted: Transcript) -> int:
        """Tokens in common, without the last one: its logits begin the answer."""
        return min(held.transcript.common(wanted), len(wanted) - 1)

    def _room_for(self, size: int, keep: Held | None) -> Segment | None:
        if (segment := self._keys.segments.take(size)) is not None:
            return segment
        for held in [held for held in self._held if not held.used and held is not keep]:
            self.drop(held)
            if (segment := self._keys.segments.take(size)) is not None:
                return segment
        if keep is None and self._keys.segments.free >= size:
            self._keys.close_holes(held.segment for held in self._held)
        return self._keys.segments.take(size)

    def _touch(self, held: Held) -> None:
        self._held.remove(held)
        self._held.append(held)
