"""The image memory: keys and values of images, built once and read by every token."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._op import check, check_count, to_device
from comemo_kernels.attention_types import MemoryScales, QueryRotation
from comemo_kernels.memory_tensors import Table, memory_buffers
from comemo_kernels.reference.dtypes import FLOAT8, INTEGERS
from comemo_kernels.reference.memory_checks import (
    check_biases,
    check_narrow,
    check_sizes,
    check_spans,
)


@dataclass
class ImageMemory:
    """Keys and values of images, one pair per mixin layer, and the spans that may be read.

    A plain object that the caller owns and passes to every forward call; no module keeps it. All
    images are concatenated along M.

    Keys are rotated by the index of a token in its image, so that the same bytes serve every prompt
    and every place in it; queries are rotated by their id minus the image's bias. With `absolute`
    keys are rotated by the ids of the prompt, as in the published model.

    Attributes:
        spans: integers [B, 1, 2] or [B, N, 2], half-open: what each prompt, or each token, may
            read; None before any prompt reads.
        active: bool [B, 1, 1] or [B, N, 1], False for a prompt without images, which passes the
            mixin layers unchanged; None if there is no such prompt.
        media: [M, d] projected image tokens, from which keys and values are built and which are the
            embeddings of a prompt's image tokens; None if they are not kept.
        ids: int32 [M], index of each token in its image; with `absolute` its id in the prompt.
        sizes: tokens of each image.
        starts: int32 [I], first row of each image.
        biases: int32 [B or 1, I], id of each image's first token in each prompt.
        keys, values: mixin layer index -> [C, G, D], of which the first M rows are images.
        scales: mixin layer index -> scales of a float8 memory.
        table: cos, sin [P, D/2] by distance of ids.
        absolute: see above.
    """

    spans: Tensor | None = None
    active: Tensor | None = None
    media: Tensor | None = None
    ids: Tensor | None = None
    sizes: tuple[int, ...] = ()
    starts: Tensor | None = None
    biases: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    scales: dict[int, MemoryScales] = field(default_factory=dict)
    table: Table | None = None
    absolute: bool = False

    @classmethod
    @public
    def from_media(
        cls,
        media: Tensor,
        position_ids: Tensor,
        lengths: Sequence[int],
        sizes: Sequence[int] | None = None,
        table: Table | None = None,
        absolute: bool = False,
    ) -> "ImageMemory":
        """Memory of B prompts whose images are concatenated in `media`, without keys and values.

        Args:
            media: [M, d] projected image tokens.
            position_ids: [M] ids of the image tokens in their prompts.
            lengths: image tokens of each prompt, 0 for a prompt without images.
            sizes: tokens of each image; None takes all images of a prompt as one, which then can
                be reused only together.
            table: cos, sin [P, D/2] by distance of ids; None to set it later.
            absolute: rotate keys by `position_ids`, as published.

        Raises:
            ValueError: lengths or sizes that do not sum to M, an image across prompts, or another
                number of ids.
        """
        if media.ndim != 2 or position_ids.dtype not in INTEGERS:
            raise ValueError(
                "ImageMemory.from_media: media must be [M, d] and position_ids int32 or int64 [M],"
                f" got {tuple(media.shape)} and {position_ids.dtype} {tuple(position_ids.shape)}"
            )
        check_sizes("ImageMemory.from_media", "lengths", lengths, 0)
        check_sizes("ImageMemory.from_media", "sizes", sizes or (), 0)
        M, device = media.shape[0], media.device
        ends = torch.tensor(list(lengths), dtype=torch.int64).cumsum(0)
        sizes = tuple(int(size) for size in (lengths if sizes is None else sizes) if size)
        borders = torch.tensor((0, *sizes)).cumsum(0)
        check(
            sum(lengths) == M
            and position_ids.shape == (M,)
            and set(ends.tolist()) <= {0, *borders.tolist()}
            and int(borders[-1]) == M,
            f"ImageMemory.from_media: media {tuple(media.shape)}, position_ids"
            f" {tuple(position_ids.shape)}, lengths {list(lengths)} and sizes {list(sizes)} must"
            " agree on the number of image tokens",
        )
        check_narrow("ImageMemory.from_media", "position_ids", position_ids)
        starts = to_device(borders[:-1], device)
        position_ids = position_ids.to(device)
        biases = position_ids[starts]  # [I]
        ids = position_ids
        if not absolute and sizes:
            repeats = to_device(torch.tensor(sizes), device)
            ids = ids - biases.repeat_interleave(repeats, output_size=M)
        spans = torch.stack([ends - torch.tensor(list(lengths)), ends], dim=-1)[:, None]
        active = None if all(lengths) else to_device(spans[..., 1:] > spans[..., :1], device)
        return cls(
            spans=to_device(spans, device),
            active=active,
            media=media,
            ids=ids.int(),
            sizes=sizes,
            starts=starts.int(),
            biases=biases.int()[None],
            table=table,
            absolute=absolute,
        )

    @classmethod
    @public
    def allocate(
        cls,
        capacity: int,
        layers: Sequence[int],
        heads: int,
        head_dim: int,
        table: Table,
        dtype: torch.dtype = torch.bfloat16,
        tile: int = 256,
        absolute: bool = False,
    ) -> "ImageMemory":
        """An empty memory on the device of `table`, which `append_images` fills.

        Args:
            capacity: C, the largest number of image tokens.
            layers: indices of the mixin layers.
            heads, head_dim: G and D.
            table: cos, sin [P, D/2] by distance of ids.
            dtype: of keys and values; float8_e4m3fn has a scale for each tile and head.
            tile: tokens that share a scale.
            absolute: whether keys are rotated by the ids of the prompt, as published.

        Raises:
            ValueError: no layers, sizes below 1, or a table of another width.
        """
        check(
            len(layers) > 0 and len({operator.index(layer) for layer in layers}) == len(layers),
            f"ImageMemory.allocate: layers must be integers, each once, got {list(layers)}",
        )
        counts = {"capacity": capacity, "heads": heads, "head_dim": head_dim, "tile": tile}
        for name, count in counts.items():
            check_count("ImageMemory.allocate", name, count, 1)
        check(
            len(table) == 2
            and table[0].shape == table[1].shape
            and table[0].shape[1:] == (head_dim // 2,)
            and table[0].device == table[1].device,
            f"ImageMemory.allocate: table must be cos and sin [P, {head_dim}/2] on one device, got"
            f" {[(tuple(t.shape), str(t.device)) for t in table]}",
        )
        device = table[0].device
        held = memory_buffers(len(layers), capacity, heads, head_dim, dtype, device)
        memory = cls(table=table, absolute=absolute)
        memory.keys = dict(zip(layers, held[0].unbind(0), strict=True))
        memory.values = dict(zip(layers, held[1].unbind(0), strict=True))
        if dtype == FLOAT8:
            # Scales of unused tiles are read too and must not be NaN.
            shape = (2, len(layers), -(-capacity // tile), heads)
            scales = torch.ones(shape, device=device)
            memory.scales = {
                layer: MemoryScales(scales[0, i], scales[1, i], tile)
                for i, layer in enumerate(layers)
            }
        return memory

    @public
    def update(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Set the rotated keys and the values [C, G, D] of a mixin layer.

        Raises:
            ValueError: keys and values of different shapes, or of other dimensions.
        """
        if key.ndim != 3 or key.shape != value.shape:
            raise ValueError(
                "ImageMemory.update: key and value must have one shape [C, G, D], got"
                f" {tuple(key.shape)} and {tuple(value.shape)}"
            )
        self.values[layer] = value  # before the key, which marks a layer as built
        self.keys[layer] = key

    @public
    def key_table(self) -> Table:
        """cos, sin [M, D/2] of the angles by which keys are rotated.

        Raises:
            ValueError: a memory without ids or table.
        """
        if self.ids is None or self.table is None:
            raise ValueError("ImageMemory.key_table: the memory has no ids or no table of angles")
        cos, sin = self.table
        distance = self.ids.long().abs()
        row = distance.clamp(max=len(cos) - 1)
        beyond = (distance >= len(cos))[:, None]
        cos, sin = cos[row], sin[row] * self.ids.sign()[:, None].to(sin.dtype)
        return cos.masked_fill(beyond, float("nan")), sin.masked_fill(beyond, float("nan"))

    @public
    def reading(self, spans: Tensor | None, biases: Tensor | None = None) -> "ImageMemory":
        """The same memory, with shared keys and values, for other prompts.

        Args:
            spans: integers [B, 1, 2] or [B, N, 2]; None for no readers yet.
            biases: integers [I] or [B, I] on any device, ids of the images' first tokens in these
                prompts; None leaves them.

        Raises:
            ValueError: spans of another shape, biases of another number of images, biases on a CPU
                that do not fit 32 bits, or biases for a memory of absolute ids.
        """
        check_spans("ImageMemory.reading", spans)
        if biases is None:
            return replace(self, spans=spans)
        check(
            not self.absolute,
            "ImageMemory.reading: biases must be for a memory that is not absolute, got"
            " absolute=True",
        )
        biases = check_biases("ImageMemory.reading", biases, len(self.sizes))
        if self.starts is not None:
            biases = biases.to(self.starts.device)
        return replace(self, spans=spans, biases=biases)

    @public
    def rotation(self, positions: Tensor) -> QueryRotation:
        """How `attend_spans` rotates queries at `positions` [B, N] for this memory.

        Raises:
            ValueError: a memory without a table.
        """
        if self.table is None:
            raise ValueError("ImageMemory.rotation: the memory has no table of angles")
        cos, sin = self.table
        if self.absolute or self.starts is None or self.biases is None or not self.sizes:
            return QueryRotation(cos, sin, positions)
        return QueryRotation(cos, sin, positions, self.starts, self.biases)

    @property
    def position_ids(self) -> Tensor | None:
        """int64 [M], or [B, M] where prompts differ: ids of the image tokens in the prompts."""
        if self.ids is None or self.absolute or self.biases is None:
            return None if self.ids is None else self.ids.long()
        repeats = to_device(torch.tensor(self.sizes, dtype=torch.int64), self.ids.device)
        biases = self.biases.repeat_interleave(repeats, 1, output_size=len(self.ids))
        found = (self.ids + biases).long()
        return found[0] if len(found) == 1 else found

    @public
    def repeat_interleave(self, times: int) -> "ImageMemory":
        """The memory with each prompt repeated (beams); keys and values are shared."""
        check_count("ImageMemory.repeat_interleave", "times", times, 1)
        spans, active, biases = (
            t if t is None or (shared and len(t) == 1) else t.repeat_interleave(times, 0)
            for t, shared in ((self.spans, False), (self.active, False), (self.biases, True))
        )
        return replace(self, spans=spans, active=active, biases=biases)

    def __len__(self) -> int:
        """M, the number of image tokens."""
        return sum(self.sizes)

    @property
    def capacity(self) -> int:
        """C, number of image tokens for which keys and values are allocated; 0 if not built."""
        return next((t.shape[0] for t in self.keys.values()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their scales."""
        held = [*self.keys.values(), *self.values.values()]
        held += [t for scale in self.scales.values() for t in scale[:2]]
        return sum(t.nbytes for t in held)
