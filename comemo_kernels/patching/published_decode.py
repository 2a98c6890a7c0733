"""Decode steps of a call of the published `generate`: which are fused, and their CUDA graph.

transformers drives: it calls `forward` of the view for each token. A forward of one token per row
that goes on from the cache of the one before runs a `DecodeStep`; on a GPU it is captured once and
then replayed. Anything else runs the model's forward, patched as it is, whose modules are called.
"""

import threading
from collections.abc import Callable
from itertools import chain
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from comemo_kernels.graphs import HostFlag, capture, runs_ahead
from comemo_kernels.patching.published_block import Reading
from comemo_kernels.patching.published_step import DecodeStep, Weights, weights_of
from comemo_kernels.plain import has_global_hook

DEVICES = frozenset(("cuda",))  # types of devices whose steps are fused
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of the kernels
WIDEST_HEAD = 256
FEWEST = 8  # tokens to come for which a graph is captured
LEAST, MOST = 64, 1024  # tokens that the first buffers have room for, behind the prompt
_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values"}
_FLAGS = {"use_cache": (True,), "return_dict": (True, None)}
_capturing = threading.Lock()  # each capture waits for the GPU and frees cached memory


class Watch:
    """Whether the modules below one are as they were: hooks, forwards, children and weights.

    It is asked for every token, so it is loops in C over lists that are made once.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.modules())
        self._attributes = [vars(module) for module in self._modules]
        held = {
            name: [part for each in self._attributes if (part := each[name])]
            for name in ("_modules", "_parameters", "_buffers")
        }
        self._held = list(chain.from_iterable(held.values()))
        self._weights = [
            p for part in held["_parameters"] for p in part.values() if type(p) is nn.Parameter
        ]
        self._hooks = [
            each[name]
            for each in self._attributes
            for name in (
                "_forward_hooks",
                "_forward_pre_hooks",
                "_backward_hooks",
                "_backward_pre_hooks",
            )
        ]
        self._alive = [list(part.values()) for part in self._held]  # so that no id is used again
        self._below = self._attributes[1:]  # generate may set attributes of the root
        self._before = self._state()

    def _state(self) -> list[int]:
        return [
            *map(len, self._below),
            *map(len, self._hooks),
            *map(id, map(type, self._modules)),
            *map(id, map(methodcaller("get", "forward"), self._attributes)),
            *map(id, chain.from_iterable(map(methodcaller("values"), self._held))),
            *map(Tensor.data_ptr, self._weights),
        ]

    def sees_change(self) -> bool:
        """Whether anything has changed since."""
        return has_global_hook() or self._state() != self._before


class Decoding:
    """The decode steps of one call of `generate`.

    Args:
        room: tokens that may come, if known.

    Attributes:
        fused, captures: steps that ran fused, and graphs that were captured.
    """

    def __init__(self, room: int | None) -> None:
        self._room = room
        self.fused = self.captures = 0
        self._last: Any = None  # the cache that the forward before has returned
        self._output: Any = None  # the class of its result
        self._ended = False  # no further step is fused
        self._watch: Watch | None = None
        self._step: DecodeStep | None = None
        self._replay: Callable[[], object] | None = None

    def forward(
        self, own: Callable[..., Any], view: Any, reading: Reading, *args: Any, **given: Any
    ) -> Any:
        """A forward of the view, whose own is `own`."""
        last, self._last = self._last, None
        past = given.get("past_key_values")
        if past is not None:
            if past is last and not args and not self._ended and _is_step(given):
                out = self._take(view, reading, last, given)
                if out is not None:
                    return out
            self._drop(past is last)
        out = own(*args, **given)
        if not self._ended and getattr(out, "past_key_values", None) is not None:
            self._last, self._output = out.past_key_values, type(out)
        return out

    def _take(self, view: Any, reading: Reading, past: Any, given: dict[str, Any]) -> Any:
        """The result of a fused step, in the class of the model's own; None if that has to run."""
        if self._step is None:
            self._step = self._begin(view, reading, past, given)
            if self._step is None:
                return None
            self._watch = Watch(view)
        assert self._watch is not None
        step, ids = self._step, given["input_ids"]
        if step.held >= step.weights.longest or len(ids) != len(step.token):
            return None
        if step.held == step.capacity:
            step = self._grow(step)
        if self._replay is None:
            if self._watch.sees_change():
                return None
            step.set(ids, given.get("position_ids"))
            self._replay = self._recorded(step)
        else:
            step.set(ids, given.get("position_ids"))
        self._replay()
        logits = step.logits.to(torch.float32, copy=True)
        # Asked while the GPU works. If so, nobody has seen the result, and it is computed again.
        if self._watch.sees_change():
            return None
        step.advance()
        self.fused += 1
        self._last = step.past()
        return self._output(logits=logits, past_key_values=self._last)

    def _grow(self, step: DecodeStep) -> DecodeStep:
        """The same with twice the room, to be captured anew."""
        larger = DecodeStep(step.weights, step.memory_spans, len(step.token), 2 * step.capacity)
        larger.adopt(step)
        self._wait()
        self._step, self._replay = larger, None
        return larger

    def _begin(
        self, view: Any, reading: Reading, past: Any, given: dict[str, Any]
    ) -> DecodeStep | None:
        ids = given["input_ids"]
        weights = weights_of(view, reading) if ids.device.type in DEVICES else None
        if weights is None or not _is_supported(weights, past):
            return None
        rows, held = len(ids), past[0][0].shape[2]
        if held >= weights.longest or len(past[0][0]) != rows or ids.device != past[0][0].device:
            return None
        mask, start = given.get("attention_mask"), None
        if mask is not None:
            start = _padding_of(mask, rows, held + 1)
            if start is None:
                return None
        spans = None if reading.vision_x is None else reading.spans(ids)
        more = LEAST if self._room is None else min(max(self._room, 1), MOST)
        step = DecodeStep(weights, spans, rows, held + more)
        step.begin(past, start)
        return step

    def _recorded(self, step: DecodeStep) -> Callable[[], object]:
        """The step itself, or its graph where that is worth a capture."""
        device = step.token.device
        if not runs_ahead(device) or (self._room is not None and self._room - self.fused < FEWEST):
            return step.run
        with _capturing:
            replay = capture(step.run, device, warmups=1)
        self.captures += 1
        return replay

    def _wait(self) -> None:
        """A graph must not be freed while it runs."""
        if self._step is not None and self._replay is not None:
            flag = HostFlag(self._step.token)
            flag.post(self._step.token)
            flag.read()

    def _drop(self, ends: bool) -> None:
        """No step: the model's own forward goes on, `ends`: for the rest of the call."""
        self._wait()
        self._ended |= ends or self._step is not None
        self._step = self._replay = self._watch = None

    def close(self) -> None:
        """At the end of the call, also after an error."""
        try:
            self._wait()
        finally:
            self._step = self._replay = self._watch = self._last = None
            self._ended = True


def _is_step(given: dict[str, Any]) -> bool:
    """Whether a forward is one new token for each row and nothing else is asked for."""
    ids, positions = given.get("input_ids"), given.get("position_ids")
    if ids is None or ids.ndim != 2 or ids.shape[1] != 1:
        return False
    if positions is not None and positions.shape not in (ids.shape, (1, 1)):
        return False
    for name, value in given.items():
        if name in _FLAGS:
            if value not in _FLAGS[name]:
                return False
        elif name not in _INPUTS and value is not None and value is not False:
            return False
    return (
        given.get("use_cache") is True
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(ids.device.type)
        and not torch.compiler.is_compiling()
    )


def _is_supported(weights: Weights, past: Any) -> bool:
    """Whether the kernels support these dtypes and sizes; a CPU supports all."""
    like, layers = weights.embedding, weights.layers
    key = past[0][0]
    sizes = {(layer.out.shape[1], layer.head_dim, layer.groups) for layer in layers}
    return (
        len(sizes) == 1
        and len(past) == len(layers)
        and (key.device, key.dtype) == (like.device, like.dtype)
        and (not runs_ahead(like.device) or like.dtype in DTYPES)
        and layers[0].head_dim <= WIDEST_HEAD
    )


def _padding_of(mask: Tensor, rows: int, length: int) -> Tensor | None:
    """Padding tokens [B] before each row of a mask [B, length]; None if it masks others.

    Once per call, with one sync.
    """
    if mask.shape != (rows, length):
        return None
    start = length - mask.bool().sum(1)
    seen = torch.arange(length, device=mask.device) >= start[:, None]
    return start if bool((mask.bool() == seen).all()) else None


def room_of(settings: Any, options: dict[str, Any], default: Any, length: int) -> int | None:
    """Tokens that a call of `generate` may produce, None if it does not tell.

    Args:
        settings: its generation_config.
        options: its keyword arguments.
        default: generation_config of the model.
        length: tokens of the prompt.
    """
    for source in (options, getattr(settings, "__dict__", {}), getattr(default, "__dict__", {})):
        most, longest = source.get("max_new_tokens"), source.get("max_length")
        if most is not None:
            return int(most)
        if longest is not None:
            return max(int(longest) - length, 0)
    return None
