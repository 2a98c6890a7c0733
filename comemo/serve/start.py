"""From a checkpoint to an engine and an app, for the command and for Ray Serve."""

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from comemo import prompts
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.device import parse_device, parse_dtype
from comemo.processor import CoMemoProcessor
from comemo.safety.regular import check_settings_files
from comemo.safety.settings import GENERATION, check_settings
from comemo.serve.engine.continuous import ContinuousEngine
from comemo.serve.engine.reader import OpenedPicture, PromptReader
from comemo.serve.engine.settings import EngineSettings
from comemo.serve.http.settings import ServerSettings
from comemo.serve.work import Failed, Finished, Sampling, Work
from comemo.store.store import MemoryStore
from comemo.weights.quantising import chosen_weights


@dataclass(frozen=True)
class Served:
    """What is served, and how.

    Attributes:
        model: directory of a checkpoint.
        device, dtype: see `parse_device` and `parse_dtype`.
        quantize: see `chosen_weights`.
        rope: "dhr" or "original".
        visibility: "causal" or "all", see `ChatSession`.
        store: directory of image memories, with a folder for each namespace; None for none.
        store_bytes: most bytes of the files of a namespace; None for no limit.
        engine, server: limits.
    """

    model: str
    server: ServerSettings
    engine: EngineSettings = field(default_factory=EngineSettings)
    device: str | None = None
    dtype: str = "auto"
    rope: str = "dhr"
    visibility: str = "causal"
    store: str | None = None
    store_bytes: float | None = None
    quantize: str | None = None


@dataclass(frozen=True)
class Ready:
    """An engine at work, and what reads its prompts."""

    engine: ContinuousEngine
    reader: PromptReader
    model: CoMemoForConditionalGeneration
    processor: CoMemoProcessor

    def app(self, settings: ServerSettings) -> Any:
        """The ASGI app in front of the engine."""
        from comemo.serve.http.app import make_app  # needs the packages of the extra "serve"

        return make_app(
            self.engine, self.reader, self.model.config, self.processor.tokenizer, settings
        )


def start_engine(served: Served) -> Ready:
    """Load a checkpoint and start an engine.

    Args:
        served: what and how.

    Raises:
        ValueError, OSError: it is not a whole checkpoint of this model, or not enough memory.
    """
    check_settings_files(served.model)
    processor = CoMemoProcessor.from_pretrained(served.model)
    dtype = parse_dtype(served.dtype, device := parse_device(served.device))
    loaded: Any = CoMemoForConditionalGeneration.from_pretrained(
        served.model, dtype=dtype, **chosen_weights(served.quantize, served.model)
    )
    model: Any = loaded.to(device).eval()
    check_settings("generation_config", GENERATION, vars(model.generation_config))
    reader = PromptReader(model, processor, served.rope, served.visibility)
    engine = ContinuousEngine(
        model,
        processor.tokenizer,
        prompts.stop_text(model.config.template),
        served.engine,
        stores_in(served.store, served.store_bytes),
    )
    return Ready(engine, reader, model, processor)


def stores_in(
    directory: str | None, most: float | None = None
) -> Callable[[str], MemoryStore | None]:
    """A store for each namespace, in a folder of its own. Nothing is held in memory: the engine
    does that.

    Args:
        directory: of the folders; None for no stores.
        most: bytes of the files of a namespace.
    """
    if directory is None:
        return lambda namespace: None

    @cache
    def store_of(namespace: str) -> MemoryStore:
        return MemoryStore(0, Path(directory) / namespace, most)

    return store_of


def warm_up(ready: Ready, timeout_s: float = 600.0) -> None:
    """Answer one small request, so that the first user does not wait for what is done once.

    Raises:
        ValueError: the model cannot answer.
    """
    side = ready.model.config.vision_config.image_size[0]
    blank = OpenedPicture("blank", (1, 1), lambda: torch.zeros(1, 3, side, side))
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    read = ready.reader.read([{"role": "user", "content": content}], [blank])
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sampling = Sampling(max_tokens=2)
    work = Work("warm-up", read.prompt, read.transcript, read.pictures, sampling)
    ready.engine.submit(work, events.put)
    while not isinstance(event := events.get(timeout=timeout_s), (Failed, Finished)):
        pass
    if isinstance(event, Failed):
        raise ValueError(f"warm_up: the model must answer, got: {event.error.text}")
