"""The decode loop: one CUDA graph replay per token, without a sync after every step."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer

import comemo_kernels as ops
from comemo.attention import attention_of
from comemo.config_parts import OWN_ATTENTION
from comemo.decode.answer import Answer
from comemo.decode.arena import MemoryKind, capacity_for
from comemo.decode.cache import ROOM_FOR_ANSWER, RoomyLayer
from comemo.decode.interface import DRAFTS, GeneratingModel
from comemo.decode.step import DecodeStep, StepKind
from comemo.memory.inputs import queries_at_count
from comemo.outputs import CACHE, CoMemoOutput
from comemo.parallel.stages import Elsewhere
from comemo_kernels import ImageMemory

LAYERS = (DynamicLayer, RoomyLayer, StaticLayer)
# Options of `generate` that need its own loops.
ELSEWHERE = (
    *DRAFTS,
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "compile_config",
    "custom_generate",
    "synced_gpus",
    "output_attentions",
    "output_hidden_states",
)


def why_not(model: GeneratingModel, option: Callable[[str], Any]) -> list[str]:
    """Reasons why a `DecodeLoop` does not support a call of `generate`.

    Args:
        model: that generates.
        option: returns the value of an argument of `generate` by name, None if unset.

    Returns:
        The reasons; empty if it does.
    """
    reasons = [name for name in ELSEWHERE if option(name)]
    if (option("num_beams") or 1) > 1:
        reasons.append(f"num_beams={option('num_beams')}")
    if option("use_cache") is False:
        reasons.append("use_cache=False")
    if option("cache_implementation") not in (None, "dynamic", "static"):
        reasons.append(f"cache_implementation={option('cache_implementation')!r}")
    mixin = attention_of(model.config.mixin_config)
    if mixin != OWN_ATTENTION:  # a mask does not keep NaN in spare rows out
        reasons.append(f"attention of mixin_config {mixin!r}")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        reasons.append("layers on several devices")
    if any(isinstance(module, Elsewhere) for module in model.modules()):
        reasons.append("layers on other ranks")
    if any(weight.is_meta for weight in model.parameters()):
        reasons.append("offloaded weights")
    return reasons


class DecodeLoop:
    """Decodes token by token in static buffers; on a GPU a step is one replay of a CUDA graph.

    Pass it to any number of calls, `generate(..., decode_loop=loop)`. Prompts, images and answers
    of other lengths share buffers and graph if they fit the same bucket. Tokens, logits and the
    resulting KV cache are those of `generate` without it.

    A graph repeats what the model did when it was captured. New weights, modules and hooks are
    detected at the next call. Any other change of the forward needs a new loop.

    Args:
        model: a `CoMemoForConditionalGeneration`, all on one device.
        keep: number of buckets whose buffers and graphs are kept, most recently used first.

    Attributes:
        captures: number of captured steps so far.

    Raises:
        ValueError: `keep` below 1.
    """

    def __init__(self, model: GeneratingModel, keep: int = 4) -> None:
        if keep < 1:
            raise ValueError(f"DecodeLoop: keep must be at least 1, got {keep}")
        self.model, self.keep, self.captures = model, keep, 0
        self._steps: OrderedDict[StepKind, DecodeStep] = OrderedDict()
        self._state: tuple[Any, ...] = ()
        self._lock = threading.Lock()

    @property
    def buckets(self) -> int:
        """Number of buckets that have buffers."""
        return len(self._steps)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values in all buffers."""
        arenas = [step.arena for step in self._steps.values() if step.arena is not None]
        return sum(step.buffers.nbytes for step in self._steps.values()) + sum(
            arena.memory.nbytes for arena in arenas
        )

    @torch.no_grad()
    def answer(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any,
        model_kwargs: dict[str, Any],
        prefill: Callable[[], CoMemoOutput],
    ) -> Any:
        """Prefill, then decode; called by `generate` with everything it has prepared.

        Args:
            input_ids: [B, n].
            logits_processor, stopping_criteria, generation_config, streamer: of the call.
            model_kwargs: inputs of the model.
            prefill: reads the prompts into the cache of `model_kwargs` and returns their logits.

        Returns:
            See `generate`.

        Raises:
            ValueError: a cache, mask or image memory that the loop does not support; NaN
                probabilities.
            RuntimeError: another call uses this loop.
        """
        if self._lock.locked():
            raise RuntimeError(
                "DecodeLoop: another call uses this loop: wait for it, or make a second loop"
            )
        with self._lock:  # released after any interrupt
            self._drop_stale_steps()
            prompt = _Prompt(self.model, model_kwargs)
            prompt.take_output(prefill())
            answer = Answer(input_ids, logits_processor, stopping_criteria, generation_config)
            with self._begin(prompt, answer) as run:
                self._decode(run, answer, streamer)
                if streamer is not None:
                    streamer.end()
            return answer.result(prompt.cache)

    def _decode(self, run: "_Run", answer: Answer, streamer: Any) -> None:
        """One token after another until every answer has ended.

        On an asynchronous device a step is queued before the host knows whether it is needed. The
        result of an unneeded last step is discarded.
        """
        ahead = ops.runs_ahead(run.step.kind.device)
        flag = ops.HostFlag(run.step.report)
        answer.choose(run.step, chosen=False)
        while True:
            flag.post(run.step.report)
            more = answer.length < answer.limit
            if early := ahead and more:
                self._advance(run, answer)
            *_, going, numbers = report = flag.read()
            if not numbers:
                raise ValueError(
                    "DecodeLoop: probabilities must be numbers to sample a token, got NaN"
                )
            if streamer is not None:
                streamer.put(report[:-2].clone())
            if not (going and more):
                return
            if not early:
                self._advance(run, answer)
            run.kept += 1
            answer.choose(run.step, chosen=answer.in_step)

    def _advance(self, run: "_Run", answer: Answer) -> None:
        """One step, in the next larger bucket if this one is full."""
        if run.written == run.step.kind.capacity:
            kind = run.step.kind
            larger = self._step(replace(kind, capacity=capacity_for(kind.capacity + 1)), answer)
            larger.adopt(run.step, run.written)
            run.step = larger
        run.step.run(answer.in_step)
        run.written += 1

    @contextmanager
    def _begin(self, prompt: "_Prompt", answer: Answer) -> Iterator["_Run"]:
        """Fill the buffers with the prompt; at the end the cache gets the new tokens, always."""
        more = min(answer.limit - answer.length - 1, ROOM_FOR_ANSWER)
        step = self._step(prompt.kind(capacity_for(prompt.length + max(more, 1))), answer)
        answer.begin(step)
        prompt.fill(step)
        run = _Run(step, prompt.length)
        try:
            yield run
        finally:
            run.step.give(prompt.cache, prompt.length, prompt.length + run.kept)

    def _step(self, kind: StepKind, answer: Answer) -> DecodeStep:
        """The step of a bucket, captured."""
        if kind not in self._steps:
            while len(self._steps) >= self.keep:
                _, old = self._steps.popitem(last=False)
                last = ops.HostFlag(old.report)  # a graph must not be freed while it runs
                last.post(old.report)
                last.read()
            with torch.inference_mode(False):
                self._steps[kind] = DecodeStep(self.model, kind)
        self._steps.move_to_end(kind)
        self.captures += self._steps[kind].prepare(answer.in_step)
        return self._steps[kind]

    def _drop_stale_steps(self) -> None:
        """Drop all captured steps if the model has changed since."""
        state = _state_of(self.model)
        if state != self._state:
            self._steps.clear()
            self._state = state


def check_loop(verb: str, model: GeneratingModel, loop: Any, option: Callable[[str], Any]) -> None:
    """Raise if a loop does not support a call of this model.

    Args:
        verb: the function to name.
        model, option: see `why_not`.
        loop: the argument that was passed.
    """
    reasons = why_not(model, option)
    if not isinstance(loop, DecodeLoop) or loop.model is not model:
        reasons.append("a loop of another model")
    if reasons:
        raise ValueError(
            f"{verb}: decode_loop must be a DecodeLoop of this model, for plain greedy decoding or"
            f" sampling, got {', '.join(reasons)}"
        )


class _Run:
    """State of an answer: its step, tokens written to the buffers, and how many are kept."""

    def __init__(self, step: DecodeStep, written: int) -> None:
        self.step, self.written, self.kept = step, written, 0


class _Prompt:
    """What the loop takes from a prompt. Unsupported prompts are refused before any work."""

    def __init__(self, model: GeneratingModel, given: dict[str, Any]) -> None:
        cache = given.get(CACHE)
        memory: ImageMemory | None = given.get("image_memory")
        mask, ids = given.get("attention_mask"), given.get("position_ids")
        if cache is None or any(type(layer) not in LAYERS for layer in cache.layers):
            kinds = None if cache is None else {type(layer).__name__ for layer in cache.layers}
            raise ValueError(
                f"DecodeLoop: {CACHE} must be a dynamic, roomy or static cache, got"
                f" {type(cache).__name__} with layers {kinds}"
            )
        if ids is None or ids.ndim != 2:
            raise ValueError("DecodeLoop: position_ids must be [B, N] of whole prompts")
        B, N = ids.shape
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != (B, N) or bool((mask.bool() != mask.cumsum(1).bool()).any()):
            raise ValueError(
                f"DecodeLoop: attention_mask must be {(B, N)} and prompts padded on the left, got"
                f" {tuple(mask.shape)}" + (" with gaps" if mask.shape == (B, N) else "")
            )
        if memory is not None and (memory.spans is None or memory.spans.shape != (B, 1, 2)):
            spans = None if memory.spans is None else tuple(memory.spans.shape)
            raise ValueError(f"DecodeLoop: image_memory must have spans {(B, 1, 2)}, got {spans}")
        self._model, self.cache, self._memory = model, cache, memory
        self.length, count = N, mask.sum(1)  # of the tokens before the first new one
        self._start, self._count = N - count, count + 1
        self._position = self._query = ids[:, -1] + 1
        has_images = memory is not None and given.get("prompt_length") is not None
        if queries_at_count(model.config, has_images):
            self._query = count

    def take_output(self, output: CoMemoOutput) -> None:
        """Take the first logits, and check cache and memory after the prefill."""
        self._logits = output.logits[:, -1]
        held, memory = int(self.cache.get_seq_length()), self._memory
        if held != self.length:
            raise ValueError(
                f"DecodeLoop: {CACHE} must hold the {self.length} tokens of position_ids"
                f" after the prefill, got {held}"
            )
        layers = self._model.model.language_model.mixin_layers.keys()
        if memory is not None and (memory.keys.keys() != layers or memory.table is None):
            raise ValueError(
                f"DecodeLoop: image_memory must keep keys of mixin layers {sorted(layers)} and a"
                f" table of angles, got layers {sorted(memory.keys)} and"
                f" {'no' if memory.table is None else 'a'} table"
            )

    def kind(self, capacity: int) -> StepKind:
        """The bucket of this capacity."""
        key, rows = self.cache.layers[0].keys, len(self._count)
        memory = None if self._memory is None else MemoryKind.of(self._memory, rows)
        return StepKind(
            rows=rows,
            capacity=capacity,
            layers=len(self.cache.layers),
            heads=key.shape[1],
            head_dim=key.shape[3],
            dtype=key.dtype,
            device=key.device,
            vocabulary=self._logits.shape[-1],
            memory=memory,
        )

    def fill(self, step: DecodeStep) -> None:
        """Copy prompt, memory and first logits into a step's buffers."""
        step.logits.copy_(self._logits)
        places = (self._start, self._position, self._query, self._count)
        step.begin(self.cache, self.length, *places)
        if step.arena is not None and self._memory is not None:
            step.arena.fill(self._memory)


def _state_of(model: GeneratingModel) -> tuple[Any, ...]:
    """What a captured step depends on: addresses, modules, hooks, settings."""
    modules = list(model.modules())
    weights = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    addresses = tuple(t.data_ptr() if type(t) in (nn.Parameter, Tensor) else id(t) for t in weights)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    config = model.config
    scaling = tuple(sorted((config.rope_scaling or {}).items()))
    text, limit = config.text_config, config.text_config.max_position_embeddings
    settings = (config.ntk_length, scaling, limit, text.rope_parameters["rope_theta"])
    return addresses, tuple(map(type, modules)), hooks, settings, model.training
