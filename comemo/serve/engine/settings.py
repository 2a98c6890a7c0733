"""How much an engine may hold and how long it may make others wait."""

from dataclasses import dataclass

LONGEST = 32768  # tokens of a request, if nothing else is asked for


@dataclass(frozen=True)
class EngineSettings:
    """Limits of an engine.

    Attributes:
        memory: bytes of KV cache and image memory; None for half of what is free, at most what
            `answers` of 4,096 tokens, or one of the longest, need.
        answers: most answers at the same time.
        waiting: most requests that wait.
        waiting_each: most of one namespace.
        stall_s: seconds that a part of a prompt, or some tiles of a picture, may delay the next
            token of others, about.
        chunk: most tokens of a prompt that are read at once; bounds memory.
        longest: most tokens of a prompt and its answer.

    Raises:
        ValueError: a number that is not positive.
    """

    memory: float | None = None
    answers: int = 16
    waiting: int = 64
    waiting_each: int = 16
    stall_s: float = 0.25
    chunk: int = 4096
    longest: int = LONGEST

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"EngineSettings: {name} must be above 0, got {value!r}")
