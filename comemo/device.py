"""Choose the device and the dtype to run in. The model itself never does."""

import functools
import os
import time
from pathlib import Path

import torch

from comemo.safety import settings

_CGROUP, _OF_CGROUP = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in settings.DTYPES}


def default_device() -> torch.device:
    """The first of CUDA, MPS and the CPU that this machine has."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@functools.cache
def default_dtype(device: torch.device) -> torch.dtype:
    """Choose the fastest dtype for a device.

    Args:
        device: where the model will run.

    Returns:
        On an accelerator bfloat16, or float16 if it has no bfloat16. On a CPU bfloat16 if a GEMM
        is faster in it than in float32: without bfloat16 units it takes several times as long.
        Measured once per process.
    """
    if device.type == "cpu":
        seconds = _gemm_seconds(torch.float32)
        faster = _gemm_seconds(torch.bfloat16, give_up=2 * seconds) < seconds
        return torch.bfloat16 if faster else torch.float32
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = _can_compute(device, torch.bfloat16)
    return torch.bfloat16 if supported else torch.float16


def parse_device(name: str | None) -> torch.device:
    """Read a device's name.

    Args:
        name: such as "cpu", "cuda", "cuda:1"; None for `default_device`.

    Returns:
        The device.

    Raises:
        ValueError: this machine has no such device.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"parse_device: this machine has no device {name!r}") from error
    if device.type == "meta":
        raise ValueError("parse_device: 'meta' computes nothing")
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device, about.

    Args:
        device: a GPU or the CPU. On a CPU, and on an MPS, which shares its memory: what the system
            calls available, or half of all where it does not say; at most what a container's limit
            (cgroup v2) leaves.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    try:
        with open("/proc/meminfo") as file:
            facts = dict(line.split(":", 1) for line in file)
        available = int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in _OF_CGROUP)
    except (OSError, ValueError):  # no limit is "max"
        return available
    return min(available, max(limit - used, 0))


def device_of_rank(local: int, name: str | None = None) -> torch.device:
    """The device of one of several processes of a machine; a GPU becomes the current one.

    Args:
        local: index of the process among those of its machine.
        name: see `parse_device`. A GPU without a number is that of the process, in turns.

    Raises:
        ValueError: as `parse_device`.
    """
    device = parse_device(name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def parse_dtype(name: str, device: torch.device) -> torch.dtype:
    """Read a dtype's name.

    Args:
        name: a key of `DTYPES`, or "auto" for `default_dtype`.
        device: where the model will run.

    Returns:
        The dtype.

    Raises:
        ValueError: an unknown name, or the device cannot compute in this dtype.
    """
    if name == "auto":
        return default_dtype(device)
    if name not in DTYPES:
        raise ValueError(f"parse_dtype: dtype must be auto or one of {list(DTYPES)}, got {name!r}")
    if not _can_compute(device, DTYPES[name]):
        raise ValueError(f"parse_dtype: {device} cannot compute in {name}: omit --dtype")
    return DTYPES[name]


def _can_compute(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        x = torch.ones(2, 2, device=device, dtype=dtype)
        (x @ x).softmax(-1).sum().item()
    except (RuntimeError, TypeError):  # a missing kernel; an MPS without bfloat16
        return False
    return True


def _gemm_seconds(dtype: torch.dtype, give_up: float = float("inf")) -> float:
    """The best time of a few GEMMs on the CPU; stops at the first that takes over `give_up`."""
    a, b = torch.ones(256, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    best = float("inf")
    for attempt in range(6):  # the first warms up
        start = time.perf_counter()
        a @ b
        seconds = time.perf_counter() - start
        if attempt:
            best = min(best, seconds)
            if seconds > max(give_up, 0.05):
                break
    return best
