"""Which image tokens each token reads in one forward pass of Mllama, as spans.

Transformers repeats the mask of tiles for each vision token and hands [B, 1, N, S] numbers to every
cross-attention layer. Here the layers get `Seen` beside the arguments that they have. A token whose
tiles are one run reads one span; one with tiles of other images between has several spans.

Letters: B batch, N tokens, T tiles of all images, S vision tokens of them.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from comemo_kernels.patching.replacement import Replacement

SEEN = "comemo_kernels_seen"  # keyword argument of the text model, which hands it to its layers


class Seen(NamedTuple):
    """The image tokens that the tokens of a forward pass read.

    Attributes:
        spans: int64 [B, N, 2] each, disjoint; a token reads all of them. Most are one tensor.
        rows: bool [B, N, 1], tokens that any tile is for; None if those are all. To the others
            transformers shows everything, and leaves out their feed-forward network.
        tiles: bool [B, N, T], the mask.
        patches: vision tokens of a tile.
        dtype: of the model.
    """

    spans: tuple[Tensor, ...]
    rows: Tensor | None
    tiles: Tensor
    patches: int
    dtype: torch.dtype

    @property
    def keys(self) -> int:
        """S, the length of the keys that the spans are for."""
        return self.tiles.shape[2] * self.patches

    def dense(self) -> tuple[Tensor, Tensor]:
        """What transformers makes of the mask: [B, 1, N, S] to add, and factors [B, 1, N, 1]."""
        some = self.tiles.any(-1, keepdim=True)
        hidden = torch.zeros(self.tiles.shape, dtype=self.dtype, device=self.tiles.device)
        hidden = hidden.masked_fill(~self.tiles & some, torch.finfo(self.dtype).min)
        return hidden.repeat_interleave(self.patches, -1)[:, None], some[:, None].to(self.dtype)


def see(tiles: Tensor, patches: int, dtype: torch.dtype) -> Seen:
    """Spans of a mask of tiles; one sync with a GPU, for the number of spans.

    torch.compile cannot read that number; then it is the largest that T tiles can have.

    Args:
        tiles: bool [B, N, T], not empty.
        patches: vision tokens of a tile.
        dtype: of the model.
    """
    T = tiles.shape[2]
    first = tiles.clone()
    first[..., 1:] &= ~tiles[..., :-1]  # where a run of tiles begins
    rank = first.cumsum(-1)  # number of a tile's run, from 1
    silent = ~tiles.any(-1)
    most, some_silent = -(-T // 2), True
    if not torch.compiler.is_compiling():
        most, some_silent = torch.stack([rank[..., -1].amax(), silent.any().long()]).tolist()
    spans = []
    for number in range(1, max(most, 1) + 1):
        run = tiles & (rank == number)
        count = run.sum(-1)
        if number == 1:
            count = count.masked_fill(silent, T)
        start = run.int().argmax(-1)  # 0 if there is none
        spans.append(torch.stack([start, start + count], -1) * patches)
    return Seen(tuple(spans), ~silent[..., None] if some_silent else None, tiles, patches, dtype)


def slices_by_index(model: nn.Module) -> bool:
    """Whether a model takes the rows of its mask by index, as transformers before 5.20."""
    forward: Any = inspect.unwrap(type(model).forward)
    return "current_pos" in forward.__code__.co_varnames


def model_forward(call: Replacement, *args: Any, **kwargs: Any) -> Any:
    """The model with spans in place of the mask, where all layers that need it are replaced."""
    return _forward(call, False, args, kwargs)


def model_forward_by_index(call: Replacement, *args: Any, **kwargs: Any) -> Any:
    """The same for transformers before 5.20."""
    return _forward(call, True, args, kwargs)


def _forward(
    call: Replacement, by_index: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if args:
        given = inspect.signature(call.original).bind(*args, **kwargs).arguments
        kwargs = given.pop("kwargs", {}) | given
    mask = kwargs.get("cross_attention_mask")
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if mask is None or mask.ndim != 4 or tokens is None or not (mask.numel() and tokens.numel()):
        return call.original(**kwargs)
    reason = _why_dense(call.module.language_model)
    if reason is not None:
        return call.refuse(reason, **kwargs)
    rows = _rows(mask, tokens.shape[1], cache_of(kwargs), by_index)
    tiles = (1.0 - rows.flatten(2)).to(call.module.dtype) == 0
    seen = see(tiles, call.module.vision_model.num_patches, call.module.dtype)
    return call.original(**kwargs | {"cross_attention_mask": None, SEEN: seen})


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The KV cache; transformers 5.24 has another name for it."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def _rows(mask: Tensor, tokens: int, cache: Any, by_index: bool) -> Tensor:
    """The rows of a mask [B, all tokens, images, tiles] for the tokens of this call."""
    if not by_index and mask.shape[1] == tokens:
        return mask
    past = 0 if cache is None else cache.get_seq_length()
    if by_index:
        return mask[:, torch.arange(tokens, device=mask.device) + past]
    return mask[:, int(past) : int(past) + tokens]


def _why_dense(text: nn.Module) -> str | None:
    """Why the layers cannot get spans, or None."""
    if _sees_arguments(text):
        return "a hook reads the arguments of the text model"
    for layer in vars(text)["_modules"]["layers"]:
        attention = vars(layer)["_modules"].get("cross_attn")
        if attention is not None and not is_replaced(layer):
            return "a cross-attention layer is not replaced"
        if _sees_arguments(layer) or (attention is not None and _sees_arguments(attention)):
            return "a hook reads the arguments of a layer"
    return None


def is_replaced(module: nn.Module) -> bool:
    """Whether a module's forward is ours, perhaps under hooks of accelerate: it knows `Seen`."""
    attributes = vars(module)
    forward = attributes.get("_old_forward" if "_hf_hook" in attributes else "forward")
    return type(forward) is Replacement and forward.active


def _sees_arguments(module: nn.Module) -> bool:
    attributes = vars(module)
    return bool(
        attributes["_forward_pre_hooks_with_kwargs"] or attributes["_forward_hooks_with_kwargs"]
    )
