"""How many tokens the pools of an engine hold: its memory, divided."""

from dataclasses import dataclass

from comemo.decode.interface import GeneratingModel
from comemo.device import free_memory
from comemo.serve.engine.key_pool import bytes_per_token
from comemo.serve.engine.picture_pool import bytes_per_image_token
from comemo.serve.engine.settings import EngineSettings

ROOM = 4096  # tokens that are set aside for each answer, if there is memory
SHARE = 0.5  # of the free memory that an engine takes


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
