"""What model files ask of objects from the packages that import them."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from comemo.memory.parts import StorableModel
from comemo_kernels import ImageMemory


class KeepsMemories(Protocol):
    """What looks up image memories and keeps new ones, such as a `MemoryStore`."""

    def image_memory(
        self,
        model: StorableModel,
        pixel_values: Tensor,
        position_ids: Tensor,
        lengths: Sequence[int],
        sizes: Sequence[int] | None = None,
    ) -> ImageMemory:
        """The memory of a batch of prompts; see `MemoryStore.image_memory`."""
        ...
