"""Prompts with pictures for the tests of `MemoryStore`, and how their memories are compared."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from small import place
from torch import Tensor

import comemo
import comemo_kernels as ops
from bench.counting import count_calls
from comemo_kernels import ImageMemory

GRIDS = {"square": (1, 1), "other": (1, 1), "wide": (2, 1)}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@functools.cache
def tiles() -> dict[str, Tensor]:
    """Tiles of pictures by their names."""
    draw = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(ops.image_tokens(grid, 1), 3, 448, 448, generator=draw)
        for name, grid in GRIDS.items()
    }


def batch_of(core: Any, *prompts: list[str | int], grids: bool = True) -> dict[str, Any]:
    """Inputs of prompts, each a list of counts of words and names of pictures."""
    names, rows = [part for prompt in prompts for part in prompt if isinstance(part, str)], []
    for prompt in prompts:
        row: list[int] = []
        for part in prompt:
            if isinstance(part, str):
                row += [core.config.image_token_id] * (256 * len(tiles()[part]))
            else:
                row += range(20, 20 + part)
        rows.append(row)
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    found: dict[str, Any] = {
        "input_ids": torch.tensor([[2] * n + row for n, row in zip(padding, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
    }
    if names:
        found["pixel_values"] = torch.cat([tiles()[name] for name in names])
    found = place(found)
    if names and grids:
        found["tile_grid"] = [GRIDS[name] for name in names]
    return found


def memory_of(core: Any, batch: dict[str, Any], store: Any = None) -> ImageMemory:
    """What `build_image_memory` makes of a batch; built, with or without a store."""
    mask, grids = core.find_image_tokens(batch["input_ids"]), batch.get("tile_grid")
    ids = core.prompt_position_ids(mask, batch["attention_mask"], grids)
    memory = core.build_image_memory(batch["pixel_values"], mask, ids, grids, store)
    if store is None:
        with torch.no_grad():
            memory.media = memory.media.detach()
            assert core.language_model.build_memory(memory)
    return memory


def assert_same(found: ImageMemory, wanted: ImageMemory, exact: bool = True) -> None:
    """Two memories, field by field; not `exact` where they were computed in other company."""
    assert found.sizes == wanted.sizes
    for name in ("spans", "active", "ids", "starts", "biases"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs)), name
    assert list(found.keys) == list(wanted.keys)
    assert list(found.values) == list(wanted.values)
    for ours, theirs in zip(tensors(found), tensors(wanted), strict=True):
        slack = 0 if exact else 1e-4
        torch.testing.assert_close(ours, theirs, rtol=slack, atol=slack)


def tensors(memory: ImageMemory) -> list[Tensor]:
    """What a picture holds: media, ids, keys and values."""
    return [memory.media, memory.ids, *memory.keys.values(), *memory.values.values()]


def memory_bytes(core: Any, name: str) -> int:
    """Bytes of a picture."""
    return sum(tensor.nbytes for tensor in tensors(memory_of(core, batch_of(core, [1, name]))))


@contextmanager
def work_on(core: Any) -> Iterator[Callable[[], tuple[list[int], int]]]:
    """Count what a known picture spares: tiles of each call of the tower, and builds."""
    seen, mixins = [], [core.language_model.layers[i].mixin for i in core.config.mixin_layers]

    def features(pixel_values):
        seen.append(len(pixel_values))
        return type(core).project_images(core, pixel_values)

    vars(core)["project_images"] = features
    try:
        with ExitStack() as stack:
            whole = stack.enter_context(count_calls([ops], "build_memory"))
            layers = stack.enter_context(count_calls(mixins, "build"))
            yield lambda: (list(seen), whole[0] + layers[0])
    finally:
        del vars(core)["project_images"]


def counts(store: Any, *names: str) -> tuple[int, ...]:
    """Some of a store's statistics."""
    return tuple(getattr(store.stats, name) for name in names)


def key_of(core: Any, batch: dict[str, Any]) -> str:
    """The key of a prompt's only picture."""
    store = comemo.MemoryStore()
    memory_of(core, batch, store)
    (key,) = store
    return key


def files_of(directory: Path) -> list[Path]:
    """The files that a directory holds as pictures."""
    return sorted(Path(directory).glob("*.safetensors"))
