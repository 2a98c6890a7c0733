"""An image memory in static buffers, for a decode step that is captured once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from comemo_kernels import ImageMemory

CAPACITY, IMAGES = 1024, 16  # of the smallest bucket, in tokens and in images


def capacity_for(wanted: int, least: int = CAPACITY) -> int:
    """Capacity of a bucket: `least`, doubled until `wanted` tokens fit.

    Everything that fits the same capacity shares buffers and captured steps. A bucket is at most
    twice as large as needed.
    """
    return least << max(0, (max(wanted, 1) - 1) // least).bit_length()


@dataclass(frozen=True)
class MemoryKind:
    """Everything about an image memory that a captured step depends on.

    Attributes:
        capacity: tokens that the buffers hold.
        images: number of images that fit, 0 if keys are rotated by ids of the prompt.
        rows: B, prompts that read.
        bias_rows: B, or 1 if images have the same ids in every prompt.
        masked: whether some prompt may have no image.
        layers, heads, head_dim, dtype, device: of keys and values.
        tile: tokens that share a scale, 0 without scales.
        table: shape and dtype of the table of angles.
        absolute: see `ImageMemory`.
    """

    capacity: int
    images: int
    rows: int
    bias_rows: int
    masked: bool
    layers: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    tile: int
    table: tuple[torch.Size, torch.dtype]
    absolute: bool

    @classmethod
    def of(cls, memory: ImageMemory, rows: int) -> "MemoryKind":
        """The kind of a memory that `rows` prompts have read in their prefill."""
        layers = tuple(sorted(memory.keys))
        key, images, bias_rows = memory.keys[layers[0]], 0, 1
        if memory.starts is not None and memory.biases is not None and not memory.absolute:
            images, bias_rows = capacity_for(len(memory.starts), IMAGES), len(memory.biases)
        assert memory.table is not None
        return cls(
            capacity=capacity_for(len(memory)),
            images=images,
            rows=rows,
            bias_rows=bias_rows,
            masked=memory.active is not None,
            layers=layers,
            heads=key.shape[1],
            head_dim=key.shape[2],
            dtype=key.dtype,
            device=key.device,
            tile=next((scale.tile for scale in memory.scales.values()), 0),
            table=(memory.table[0].shape, memory.table[0].dtype),
            absolute=memory.absolute,
        )


class MemoryArena:
    """Static buffers for memories of one kind.

    Args:
        kind: sizes of the buffers.

    Attributes:
        memory: the `ImageMemory` that steps read; its tensors are the buffers.
    """

    def __init__(self, kind: MemoryKind) -> None:
        self.kind, device, M = kind, kind.device, kind.capacity
        cos, sin = (torch.zeros(kind.table[0], dtype=kind.table[1], device=device) for _ in "cs")
        self._table_of: Tensor | None = None
        self.memory = memory = ImageMemory.allocate(
            M,
            kind.layers,
            kind.heads,
            kind.head_dim,
            (cos, sin),
            kind.dtype,
            kind.tile or 1,
            kind.absolute,
        )
        for held in (*memory.keys.values(), *memory.values.values()):
            held.zero_()
        memory.sizes = (M,)
        memory.spans = torch.zeros(kind.rows, 1, 2, dtype=torch.int64, device=device)
        # Starts of unused images: ascending, and after the memory, so that no token reaches them.
        self._beyond = M + torch.arange(kind.images, dtype=torch.int32, device=device)
        if kind.masked:
            memory.active = torch.ones(kind.rows, 1, 1, dtype=torch.bool, device=device)
        if kind.images:
            memory.starts = self._beyond.clone()
            memory.biases = torch.zeros(
                kind.bias_rows, kind.images, dtype=torch.int32, device=device
            )

    def fill(self, memory: ImageMemory) -> None:
        """Copy a memory of this kind in; nothing after its tokens can be read."""
        mine, M = self.memory, len(memory)
        assert mine.spans is not None
        assert mine.table is not None
        assert memory.spans is not None
        assert memory.table is not None
        mine.spans.copy_(memory.spans)
        for layer in self.kind.layers:
            mine.keys[layer][:M].copy_(memory.keys[layer][:M])
            mine.values[layer][:M].copy_(memory.values[layer][:M])
            if self.kind.tile:
                tiles = -(-M // self.kind.tile)
                for held, factor in zip(
                    mine.scales[layer][:2], memory.scales[layer][:2], strict=True
                ):
                    held[:tiles].copy_(factor[:tiles])
        if mine.active is not None and memory.active is not None:
            mine.active.copy_(memory.active)
        if mine.starts is not None and mine.biases is not None:
            assert memory.starts is not None
            assert memory.biases is not None
            images = len(memory.starts)
            mine.starts.copy_(self._beyond)
            mine.starts[:images].copy_(memory.starts)
            mine.biases.zero_()
            mine.biases[:, :images].copy_(memory.biases)
        if self._table_of is not memory.table[0]:
            self._table_of = None  # until the copy is complete
            for table, given in zip(mine.table, memory.table, strict=True):
                table.copy_(given)
            self._table_of = memory.table[0]

    def adopt(self, other: "MemoryArena") -> None:
        """Copy the memory of another arena of this kind."""
        self.fill(other.memory)
