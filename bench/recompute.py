"""The published way to decode: keys and values of all image tokens, again for every token.

With an ordinary image memory they are built once. Benchmarks and tests compare both ways.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from comemo.model import CoMemoModel
from comemo_kernels import ImageMemory


class RecomputedMemory(ImageMemory):
    """An image memory that stores no keys and values; read it inside `recomputing`."""

    @classmethod
    def of(cls, memory: ImageMemory) -> "RecomputedMemory":
        """The same images without keys and values.

        Args:
            memory: one with media.

        Returns:
            A memory that shares all other tensors.

        Raises:
            ValueError: `memory.media` is None.
        """
        if memory.media is None:
            raise ValueError("RecomputedMemory.of: wanted a memory with its media, got None")
        held = {field.name: getattr(memory, field.name) for field in fields(ImageMemory)}
        return cls(**{**held, "keys": {}, "values": {}})

    def update(self, layer: int, key: object, value: object) -> None:
        """Store nothing: the next forward builds them again."""


@contextmanager
def recomputing(model: CoMemoModel) -> Iterator[None]:
    """Let mixin layers project a `RecomputedMemory` in every forward, as the published code does.

    Inside the `with` block `build_memory` of this model's decoder, which builds all layers at
    once, skips such memories. It builds any other memory as usual.

    Args:
        model: without its head, `CoMemoForConditionalGeneration.model`.
    """
    text: Any = model.language_model
    build = text.build_memory

    def build_memory(memory: ImageMemory) -> bool:
        return not isinstance(memory, RecomputedMemory) and build(memory)

    vars(text)["build_memory"] = build_memory  # of this instance, not of its class
    try:
        yield
    finally:
        del vars(text)["build_memory"]
