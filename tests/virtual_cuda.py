"""`torch.cuda` with one virtual GPU, and its CUDA graphs."""

import contextlib
import types
from typing import Any

import torch

CUDA = torch.device("cuda", 0)


class Queue:
    """A stream or an event of a device that executes synchronously."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def nothing(self, *_: Any, **__: Any) -> None:
        """All work is done already."""

    record = synchronize = wait = wait_event = wait_stream = nothing
    record_event = nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class Graph:
    """The captured calls with their results, and the contents of memory before the capture."""

    recording: "Graph | None" = None

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.before: dict[int, tuple[Any, Any]] = {}

    def keep(self, tensors: list[torch.Tensor]) -> None:
        """Save the contents of these tensors: a capture does not execute, so they are restored."""
        for t in tensors:
            storage = t.untyped_storage()
            if storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()

    def replay(self) -> None:
        """Repeat all calls; results are written to the addresses of the capture."""
        from virtual_gpu import replay

        replay(self.calls)

    def reset(self) -> None:
        self.calls.clear()


class recording:
    """`torch.cuda.graph`."""

    def __init__(self, graph: Graph, **_: Any) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        Graph.recording = self.graph

    def __exit__(self, *_: Any) -> None:
        Graph.recording = None
        with torch.inference_mode():
            for storage, before in self.graph.before.values():
                storage.copy_(before)
        self.graph.before.clear()


class autocast(torch.autocast):
    """Autocast of the GPU also enables that of the CPU, where operations are computed."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(device_type, *args, **kwargs)
        self.host = contextlib.nullcontext()
        if device_type == "cuda":
            self.host = torch.autocast("cpu", dtype=self.fast_dtype, enabled=self._enabled)

    def __enter__(self) -> Any:
        self.host.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        super().__exit__(*error)
        return self.host.__exit__(*error)


_H100 = types.SimpleNamespace(
    name="virtual H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)

# Replacements of attributes of torch.cuda.
FACES: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "device": lambda _: contextlib.nullcontext(),
    "get_device_capability": lambda _=None: (9, 0),
    "get_device_name": lambda _=None: _H100.name,
    "get_device_properties": lambda _=None: _H100,
    "is_bf16_supported": lambda including_emulation=True: True,
    "synchronize": lambda _=None: None,
    "_sleep": lambda _: None,
    "empty_cache": lambda: None,
    "memory_allocated": lambda _=None: 0,
    "max_memory_allocated": lambda _=None: 0,
    "reset_peak_memory_stats": lambda _=None: None,
    "mem_get_info": lambda _=None: (_H100.total_memory, _H100.total_memory),
    "is_current_stream_capturing": lambda: Graph.recording is not None,
    "current_stream": lambda _=None: Queue(),
    "default_stream": lambda _=None: Queue(),
    "stream": lambda _: contextlib.nullcontext(),
    "Stream": Queue,
    "Event": Queue,
    "CUDAGraph": Graph,
    "graph": recording,
}
