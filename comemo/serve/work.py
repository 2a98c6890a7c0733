"""What clients ask of an engine, and what it tells them: an interface that knows nothing of HTTP.

An engine answers any number of requests at once. How it does so is its own affair: another engine
can replace `ContinuousEngine` without a change in `comemo.serve.http`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from comemo.chat.driver import Prompt
from comemo.chat.transcript import Transcript


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen and where it ends.

    Attributes:
        max_tokens: most tokens of an answer; the limit is a stop of its own.
        min_tokens: tokens before which an answer does not end by itself.
        temperature: 0 for the most likely token.
        top_p: tokens are drawn among the most likely ones with this probability together.
        top_k: tokens are drawn among as many; 0 for all.
        repetition_penalty: divides the logits of tokens that the answer has (1: none).
        frequency_penalty: times the number of times that the answer has a token, subtracted.
        presence_penalty: subtracted once for a token that the answer has.
        seed: of drawn tokens; None for another answer each time.
        stop: texts that end the answer and are not part of it.
        n: number of answers.
        logprobs: None, or how many alternatives are reported with the probability of each token.

    Raises:
        ValueError: no token or no answer.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "n"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"Sampling: {name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Picture:
    """A picture of a prompt.

    Attributes:
        key: the same for the same file read in the same way, and for no other.
        grid: (cols, rows) of its tiles.
        tiles: number of tiles, the thumbnail included.
        tokens: image tokens.
        load: reads its tiles [t, 3, side, side]; may raise what `load_image` raises.
        ids: int [tokens], position ids of its tokens minus that of the first.
    """

    key: str
    grid: tuple[int, int]
    tiles: int
    tokens: int
    load: Callable[[], Tensor] = field(repr=False)
    ids: Tensor = field(repr=False)


@dataclass(frozen=True)
class Work:
    """A request.

    Attributes:
        namespace: requests see what those of the same namespace have left, and of no other.
        prompt: up to the answer.
        transcript: of the prompt; its images are numbered by their keys.
        pictures: in the order of the prompt.
        sampling: how to answer.
        look: whether to tell where the memory path looks.
        deadline: seconds of `time.monotonic` at which it is given up.
    """

    namespace: str
    prompt: Prompt
    transcript: Transcript
    pictures: tuple[Picture, ...]
    sampling: Sampling
    look: bool = False
    deadline: float = float("inf")

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.transcript)


class Refused(Exception):
    """A request that is not, or no longer, answered.

    Args:
        kind: "too_large", "busy", "closing", "timeout", "failed" or "internal".
        text: the reason, for the client.
        limit: name of the limit that was exceeded, if any.
    """

    def __init__(self, kind: str, text: str, limit: str | None = None) -> None:
        super().__init__(text)
        self.kind, self.text, self.limit = kind, text, limit


@dataclass(frozen=True)
class TokenFacts:
    """A token of an answer.

    Attributes:
        id: of the vocabulary.
        logprob: of the model, before temperature and penalties; None if nobody asked.
        others: (id, logprob) of the most likely tokens, most likely first.
    """

    id: int
    logprob: float | None = None
    others: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Begun:
    """The prompt is read, and the first token follows.

    Attributes:
        prompt_tokens: of the prompt.
        cached_tokens: how many of them an earlier request had left.
        pictures, found_pictures: of the prompt, and how many did not have to be computed.
        waited_s: seconds in the queue.
        read_s: seconds from there to here.
    """

    prompt_tokens: int
    cached_tokens: int
    pictures: int
    found_pictures: int
    waited_s: float
    read_s: float


@dataclass(frozen=True)
class Piece:
    """The next part of an answer.

    Attributes:
        choice: which answer, from 0.
        text: what can no longer change; may be empty.
        token: the token that was chosen; None where text was held back until the end.
        step_s: seconds since the token before; None for the first.
    """

    choice: int
    text: str
    token: TokenFacts | None
    step_s: float | None = None


@dataclass(frozen=True)
class Ended:
    """An answer is complete.

    Attributes:
        choice: which answer.
        reason: "stop" or "length".
        tokens: of the answer, its stop token included.
    """

    choice: int
    reason: str
    tokens: int


@dataclass(frozen=True)
class Looked:
    """Where the memory path looked.

    Attributes:
        choice: which answer.
        words: texts of the words of the answer.
        heat: for each picture float32 [words, cells down, cells across], which over all pictures
            sum to 1 for each word.
    """

    choice: int
    words: list[str]
    heat: list[Tensor]


@dataclass(frozen=True)
class Failed:
    """The request is given up; nothing follows."""

    error: Refused


@dataclass(frozen=True)
class Finished:
    """All answers are complete; nothing follows."""


Event: TypeAlias = Begun | Piece | Ended | Looked | Failed | Finished


@dataclass(frozen=True)
class EngineState:
    """What an engine does now, and what it has done since it was made.

    Attributes:
        healthy: whether it accepts requests.
        reason: why not.
        waiting, reading, answering: requests in the queue, in their prefill, in their answer.
        key_tokens, key_capacity: of the KV cache, in tokens; what is kept for later counts.
        picture_tokens, picture_capacity: of the image memory, in image tokens.
        totals: counters by name.
    """

    healthy: bool
    reason: str
    waiting: int
    reading: int
    answering: int
    key_tokens: int
    key_capacity: int
    picture_tokens: int
    picture_capacity: int
    totals: dict[str, float]


class Engine(Protocol):
    """What answers requests.

    Attributes:
        longest: most tokens of a prompt and its answer.
    """

    longest: int

    def submit(self, work: Work, deliver: Callable[[Event], None]) -> Any:
        """Queue a request.

        Args:
            work: the request.
            deliver: called with each event, from a thread of the engine; must return at once. The
                last event is a `Finished` or a `Failed`.

        Returns:
            A ticket for `cancel`.

        Raises:
            Refused: too large for this engine, or too many wait.
        """

    def cancel(self, ticket: Any) -> None:
        """Give a request up before its next step, and deliver nothing more. From any thread."""

    def holds(self, namespace: str, key: str) -> bool:
        """Whether a picture's pixels are probably not needed. From any thread."""

    def state(self) -> EngineState:
        """From any thread."""

    def close(self, grace_s: float) -> None:
        """Refuse new requests, finish those that began within some seconds, and end."""
