"""What decoding needs of a model, and what a prefill leaves for it.

Letters: B prompts, N tokens of a prompt, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from comemo.config import CoMemoConfig
from comemo.decode.cache import RoomyCache
from comemo.model import CoMemoModel
from comemo.outputs import CACHE, CoMemoOutput
from comemo_kernels import ImageMemory

# Options of `generate` for speculative decoding.
DRAFTS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")


class GeneratingModel(Protocol):
    """A CoMemo model with a language modelling head, as decoding and conversations use it.

    `CoMemoForConditionalGeneration` is one.
    """

    config: CoMemoConfig
    generation_config: GenerationConfig
    model: CoMemoModel
    training: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, **inputs: Any) -> CoMemoOutput: ...

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


if TYPE_CHECKING:

    class ModelMixin(GeneratingModel):
        """Base of classes that are mixed into such a model."""

else:
    ModelMixin = object


@dataclass(frozen=True)
class Prefilled:
    """Prompts that a KV cache holds, to be continued by `generate(prefilled=...)`.

    Attributes:
        logits: [B, 1, V] of the last tokens; the first new tokens are chosen from them.
        cache: KV cache of the N tokens. `generate` appends the new tokens, except the last one;
            with beams or several return sequences it leaves the cache as it is.
        position_ids: int64 [B, N].
        image_memory: as new tokens read it; None without images.
        attention_mask: [B, N], 0 at padding; None without padding.
    """

    logits: Tensor
    cache: Any
    position_ids: Tensor
    image_memory: ImageMemory | None = None
    attention_mask: Tensor | None = None

    def inputs(self, copies: int) -> dict[str, Any]:
        """Keyword arguments of transformers' `generate`.

        Args:
            copies: beams or sequences of each prompt. Several get a copy of the cache.
        """
        prompt, mask = self, self.attention_mask
        if mask is None:
            mask = torch.ones_like(self.position_ids)
        if copies > 1:
            cache = RoomyCache.copy_of(self.cache, self.position_ids.shape[1])
            cache.batch_repeat_interleave(copies)
            prompt = replace(self, cache=cache, logits=self.logits.repeat_interleave(copies, 0))
        return {
            "prefilled": prompt,
            "position_ids": self.position_ids,
            "attention_mask": mask,
            "image_memory": self.image_memory,
            CACHE: prompt.cache,
        }
