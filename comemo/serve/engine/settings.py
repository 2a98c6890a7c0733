"""How much an engine may hold and how long it may make others wait."""

from dataclasses import dataclass

from comemo.decode.interface import GeneratingModel
from comemo.device import free_memory
from comemo.serve.engine.key_pool import bytes_per_token
from comemo.serve.engine.picture_pool import bytes_per_image_token

LONGEST = 32768  # tokens of a request, if nothing else is asked for
ROOM = 4096  # tokens that are set aside for each answer, if there is memory
SHARE = 0.5  # of the free memory that an engine takes


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


@dataclass(frozen=True)
class PoolSizes:
    """Tokens that the pools of an engine hold, computed before they are allocated.

    Attributes:
        keys: tokens of the KV cache.
        pictures: image tokens of the image memory.
        nbytes: of both.
    """

    keys: int
    pictures: int
    nbytes: int

    @classmethod
    def plan(cls, model: GeneratingModel, settings: EngineSettings) -> "PoolSizes":
        """Divide the memory: as many image tokens as tokens, since prompts are mostly images.

        Args:
            model: a `CoMemoForConditionalGeneration` on its device.
            settings: of the engine.

        Raises:
            ValueError: memory for fewer than two tiles and their tokens.
        """
        each = bytes_per_token(model) + bytes_per_image_token(model)
        memory = settings.memory
        if memory is None:
            enough = max(settings.answers * ROOM, settings.longest) * each
            memory = min(SHARE * free_memory(model.device), enough)
        tokens = int(memory // each)
        least = 2 * model.config.tokens_per_tile
        if tokens < least:
            raise ValueError(
                f"PoolSizes.plan: memory must be at least {least * each:,} bytes, for {least}"
                f" tokens, got {int(memory):,}"
            )
        return cls(tokens, tokens, tokens * each)
