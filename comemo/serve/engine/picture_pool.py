"""The image memory of all requests: one buffer for each mixin layer, a segment for each sequence.

A prompt reads one span, so the pictures of a prompt are in one piece: a sequence of pictures. The
same picture in two sequences is copied, not computed again. Sequences that nobody reads stay until
their room is needed, the least recently used first. Nothing is shared between namespaces.

Letters: C image tokens that the buffers hold, M image tokens of a sequence, d width of the language
model.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import comemo_kernels as ops
from comemo.decode.interface import GeneratingModel
from comemo.serve.engine.segments import Segment, Segments
from comemo.serve.work import Picture
from comemo.store.store import MemoryStore
from comemo_kernels import ImageMemory

Key = tuple[str, tuple[str, ...]]  # namespace, keys of the pictures in their order


def bytes_per_image_token(model: GeneratingModel) -> int:
    """Bytes of one image token: keys and values of all mixin layers, embedding, id."""
    config = model.config
    mixin = config.mixin_config
    heads = 2 * len(config.mixin_layers) * mixin.num_heads * mixin.head_dim
    return (heads + config.text_config.hidden_size) * model.dtype.itemsize + 4


@dataclass(eq=False)
class Shown:
    """A sequence of pictures in the pool.

    Attributes:
        key: namespace and pictures.
        segment: of the M image tokens.
        sizes: image tokens of each picture.
        ids: int32 [M] on the CPU, index of each token in its picture.
        built: pictures that can be read.
        tiles: tiles of the next picture whose embeddings are there.
        users: requests that hold it.
        found: pictures that were not computed for it, but copied or read from a store.
    """

    key: Key
    segment: Segment
    sizes: tuple[int, ...]
    ids: Tensor
    built: int = 0
    tiles: int = 0
    users: int = 0
    found: int = 0
    pixels: Tensor | None = field(default=None, repr=False)

    @property
    def complete(self) -> bool:
        return self.built == len(self.sizes)


class PicturePool:
    """Keys, values and embeddings of pictures, allocated once.

    Args:
        model: a `CoMemoForConditionalGeneration` with position-free memories.
        capacity: C.
        store_of: the `MemoryStore` of a namespace, or None.

    Attributes:
        memory: an `ImageMemory` over all C places, for a step that reads some of them.
    """

    def __init__(
        self,
        model: GeneratingModel,
        capacity: int,
        store_of: Callable[[str], MemoryStore | None] = lambda namespace: None,
    ) -> None:
        config, device = model.config, model.device
        mixin = config.mixin_config
        self._model, self._store_of = model, store_of
        table = ops.distance_table(
            mixin.head_dim, mixin.rope_theta, 2 * mixin.max_position_embeddings, device
        )
        self.memory = ImageMemory(table=table)
        layers, shape = config.mixin_layers, (capacity, mixin.num_heads, mixin.head_dim)
        held = ops.memory_buffers(len(layers), *shape, model.dtype, device, zeros=True)
        for layer, keys, values in zip(layers, *held, strict=True):
            self.memory.update(layer, keys, values)
        self.memory.sizes = (capacity,)
        width = config.text_config.hidden_size
        self._media = torch.zeros(capacity, width, dtype=model.dtype, device=device)
        self.segments = Segments(capacity)
        self._shown: OrderedDict[Key, Shown] = OrderedDict()
        self.computed = 0  # pictures that went through the vision tower

    def claim(self, namespace: str, pictures: Sequence[Picture]) -> tuple[Shown, bool] | None:
        """Hold a sequence of pictures.

        Args:
            namespace: whose pictures may be found.
            pictures: in the order of the prompt, at least one.

        Returns:
            The sequence, and whether it was there, or others are computing it; None if there is no
            room now.
        """
        key = namespace, tuple(picture.key for picture in pictures)
        shown = self._shown.get(key)
        known = shown is not None
        if shown is None:
            segment = self._room_for(sum(picture.tokens for picture in pictures))
            if segment is None:
                return None
            ids = torch.cat([picture.ids for picture in pictures])
            shown = Shown(key, segment, tuple(picture.tokens for picture in pictures), ids.int())
            self._shown[key] = shown
        self._shown.move_to_end(key)
        shown.users += 1
        return shown, known

    def release(self, shown: Shown) -> None:
        """Hold it no longer. What was not complete is forgotten with its last user."""
        shown.users -= 1
        if not shown.users and not shown.complete:
            self.drop(shown)

    def drop(self, shown: Shown) -> None:
        """Forget a sequence, and overwrite it: it may be incomplete, or hold NaN."""
        if self._shown.pop(shown.key, None) is not None:
            for held in (*self.memory.keys.values(), *self.memory.values.values()):
                held[shown.segment.start : shown.segment.end].zero_()
            self.segments.give_back(shown.segment)

    def holds(self, namespace: str, key: str) -> bool:
        """Whether a picture can be read now, so that its pixels are not needed."""
        return self._find(namespace, key) is not None

    def next_tiles(self, shown: Shown, pictures: Sequence[Picture]) -> int:
        """Tiles that are still to be computed, at most; 0 if all pictures are built."""
        rest = pictures[shown.built :]
        return sum(picture.tiles for picture in rest) - shown.tiles

    @torch.no_grad()
    def build(self, shown: Shown, pictures: Sequence[Picture], tiles: int) -> int:
        """Take the next picture from where it is known, or compute some of its tiles.

        Args:
            shown: what `claim` returned, not complete.
            pictures: of that call.
            tiles: most tiles to compute.

        Returns:
            Tiles that were computed.

        Raises:
            ValueError, OSError: a picture that cannot be read any more.
        """
        index = shown.built
        picture, namespace = pictures[index], shown.key[0]
        if shown.tiles == 0 and (known := self._find(namespace, picture.key)) is not None:
            self._copy(known, shown, index)
            shown.found += 1
            return 0
        store = self._store_of(namespace)
        if shown.pixels is None:
            shown.pixels = picture.load()
            if store is not None:
                memory = store.find(self._model.model, shown.pixels, picture.ids)
                if memory is not None:
                    self._write(shown, index, memory)
                    shown.found += 1
                    return 0
        part = shown.pixels[shown.tiles : shown.tiles + tiles]
        core = self._model.model
        media = core.project_images(part.to(core.device, core.dtype)).flatten(0, 1)
        begin = self._place(shown, index).start + shown.tiles * core.config.tokens_per_tile
        self._media[begin : begin + len(media)].copy_(media)
        shown.tiles += len(part)
        if shown.tiles == len(shown.pixels):
            memory = self._memory_of(self._media[self._place(shown, index)], picture.ids)
            if store is not None:
                store.add(core, shown.pixels, picture.ids, memory)
            self._write(shown, index, memory)
            self.computed += 1
        return len(part)

    def read(self, shown: Shown) -> ImageMemory:
        """The memory of a complete sequence, over the buffers, read by nobody yet."""
        rows = slice(shown.segment.start, shown.segment.end)
        device = self._media.device
        starts = torch.tensor((0, *shown.sizes)).cumsum(0)[:-1].int().to(device)
        return ImageMemory(
            media=self._media[rows],
            ids=shown.ids.to(device),
            sizes=shown.sizes,
            starts=starts,
            biases=torch.zeros(1, len(shown.sizes), dtype=torch.int32, device=device),
            keys={layer: keys[rows] for layer, keys in self.memory.keys.items()},
            values={layer: values[rows] for layer, values in self.memory.values.items()},
            table=self.memory.table,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.memory.nbytes + self._media.nbytes

    def _room_for(self, size: int) -> Segment | None:
        """A segment, after forgetting as much unused as it takes, and moving the rest together."""
        if (segment := self.segments.take(size)) is not None:
            return segment
        for shown in [shown for shown in self._shown.values() if not shown.users]:
            del self._shown[shown.key]
            self.segments.give_back(shown.segment)
            if (segment := self.segments.take(size)) is not None:
                return segment
        if self.segments.free >= size:
            held = self.memory
            buffers = (*held.keys.values(), *held.values.values(), self._media)
            self.segments.close_holes((one.segment for one in self._shown.values()), buffers)
        return self.segments.take(size)

    def _find(self, namespace: str, key: str) -> tuple[Shown, int] | None:
        """A built picture of a namespace, in any sequence."""
        for shown in self._shown.values():
            if shown.key[0] == namespace and key in shown.key[1][: shown.built]:
                return shown, shown.key[1].index(key)
        return None

    def _place(self, shown: Shown, index: int) -> slice:
        start = shown.segment.start + sum(shown.sizes[:index])
        return slice(start, start + shown.sizes[index])

    def _copy(self, known: tuple[Shown, int], shown: Shown, index: int) -> None:
        source, target = self._place(*known), self._place(shown, index)
        held = self.memory
        for buffer in (*held.keys.values(), *held.values.values(), self._media):
            buffer[target].copy_(buffer[source])
        self._finish(shown)

    def _write(self, shown: Shown, index: int, memory: ImageMemory) -> None:
        target = self._place(shown, index)
        for layer in self.memory.keys:
            self.memory.keys[layer][target].copy_(memory.keys[layer])
            self.memory.values[layer][target].copy_(memory.values[layer])
        assert memory.media is not None
        if memory.media.data_ptr() != self._media[target].data_ptr():
            self._media[target].copy_(memory.media)
        self._finish(shown)

    @staticmethod
    def _finish(shown: Shown) -> None:
        shown.pixels, shown.tiles = None, 0
        shown.built += 1

    def _memory_of(self, media: Tensor, ids: Tensor) -> ImageMemory:
        memory = ImageMemory.from_media(media, ids, [len(ids)], [len(ids)], self.memory.table)
        if not self._model.model.build_memory(memory):
            raise ValueError(
                "PicturePool: keys and values of all mixin layers must be built at once, which"
                " this model's mixin layers do not allow (adapters or hooks)"
            )
        return memory
