"""Products x weight^T on a CPU, each by the library that is fastest on this machine.

PyTorch's own path, MKL in float32, can read a weight at half of the memory's speed or less, and in
float16 can do without matrix instructions. Which way is fastest depends on the machine, the dtype
and the number of rows. `DEFAULTS` were measured on an AMD with AVX-512, and hold there. On another
CPU each way is timed once per process, when a large weight meets its number of rows for the first
time; the default is replaced by a way that is faster by MARGIN. While other work takes the cores,
times say nothing, and defaults hold. The environment variable COMEMO_LINEAR leaves no choice:
"defaults" measures nothing, "torch" is PyTorch's own path.
"""

import functools
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comemo_kernels._writes import needs_gradient

ELEMENTS = 2**18  # of a weight; below, the host's time for a call decides, and PyTorch's is least
MARGIN = 1.2
QUIET = 0.9  # processor time of a measurement that counts, as a share of the time on the clock
PIECE = 2**20  # elements of a weight that are converted at once: in float32 they stay in the cache
ROWS = (1, 7, 23, 255)  # most rows of each class but the last
_MEASURED = (1, 4, 16, 64, 512)  # rows that stand for a class
_SHAPE, _BYTES = (2048, 2048), 2**26  # of a measured weight; bytes of all, more than caches hold
_PLAIN = (Tensor, nn.Parameter)

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # from torch 2.7 on
_choices: dict[tuple[torch.dtype, int], str] = {}
_lock = threading.Lock()
_onednn_op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and _onednn_op is not None


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product that torch.compile calls; PyTorch has no public function for it."""
    return _onednn_op(x, weight, bias, "none", [], "")  # type: ignore[misc]


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(weight x^T)^T: oneDNN then reads the weight as it lies, and packs the few rows of x."""
    y = _onednn(weight, x, None).t()
    return y.contiguous() if bias is None else torch.add(y, bias, out=x.new_empty(y.shape))


def _doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row as two: oneDNN reads a weight in bfloat16 slower for one row than for two."""
    return F.linear(x.expand(2, -1), weight, bias)[:1]


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32 and rounded, by pieces of the weight: for CPUs without units for the dtype."""
    multiply = _onednn if _HAS_ONEDNN else _torch
    wide, out = x.float(), x.new_empty(len(x), len(weight))
    size = max(PIECE // weight.shape[1], 1)
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        added = None if bias is None else bias[part].float()
        out[:, part] = multiply(wide, weight[part].float(), added)
    return out


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "torch": _torch,
    "onednn": _onednn,
    "turned": _turned,
    "doubled": _doubled,
    "widened": _widened,
}
# For each class of ROWS the ways that may be chosen. The first is the fastest on two cores of an
# AMD EPYC, which has AVX-512 and units for bfloat16 (`python -m bench linear`).
DEFAULTS: dict[torch.dtype, tuple[tuple[str, ...], ...]] = {
    torch.float32: (
        ("onednn", "torch"),
        ("onednn", "turned", "torch"),
        ("turned", "onednn", "torch"),
        ("turned", "onednn", "torch"),
        ("onednn", "torch"),
    ),
    torch.bfloat16: (("doubled", "torch", "widened"), *(("torch", "widened"),) * 4),
    torch.float16: (("torch", "widened"),) * 2 + (("widened", "torch"),) * 3,
}


def cpu_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias by the fastest way; with gradients or unusual tensors `F.linear`.

    Args:
        x: [..., d].
        weight: [O, d].
        bias: [O] or None.

    Returns:
        [..., O].
    """
    if not (
        x.device.type == "cpu"
        and weight.numel() >= ELEMENTS
        and x.dtype == weight.dtype
        and x.dtype in DEFAULTS
        and weight.is_contiguous()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not torch.is_autocast_enabled("cpu")
        and not needs_gradient(x, weight, bias)
    ):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():  # a graph must not depend on what was measured
        if _is_exporting():  # a program for any machine
            return F.linear(x, weight, bias)
        return torch.ops.comemo.cpu_linear(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()  # oneDNN is slow with strides
    if not len(flat):
        return F.linear(x, weight, bias)
    way = WAYS[way_of(x.dtype, len(flat))]
    return way(flat, weight, bias).view(*x.shape[:-1], len(weight))


def way_of(dtype: torch.dtype, rows: int) -> str:
    """The name of the way that products with a large weight take, measured if it has to be.

    Args:
        dtype: one of `DEFAULTS`.
        rows: of x.

    Raises:
        ValueError: COMEMO_LINEAR is neither "auto", "defaults" nor "torch".
    """
    key = dtype, bisect_left(ROWS, rows)
    if key not in _choices:
        with _lock:  # two measurements at a time would disturb each other
            if key not in _choices:
                _choices[key] = _choose(*key)
    return _choices[key]


def _choose(dtype: torch.dtype, group: int) -> str:
    how = os.environ.get("COMEMO_LINEAR", "auto")
    if how not in ("auto", "defaults", "torch"):
        raise ValueError(
            f"linear: COMEMO_LINEAR must be 'auto', 'defaults' or 'torch', got {how!r}"
        )
    names = [
        name for name in DEFAULTS[dtype][group] if _HAS_ONEDNN or name not in ("onednn", "turned")
    ]
    if how == "torch" or len(names) == 1:
        return "torch"
    if how == "defaults" or is_known():
        return names[0]
    wall, processor = time.perf_counter(), time.process_time()
    seconds = measure(dtype, _MEASURED[group], names)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    if processor < QUIET * wall:  # other work takes the cores: then it says nothing
        return names[0]
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] * MARGIN < seconds[names[0]] else names[0]


@functools.cache
def is_known() -> bool:
    """Whether `DEFAULTS` were measured on a CPU of this kind."""
    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False
    return vendor and torch.backends.cpu.get_cpu_capability() == "AVX512"


@torch.no_grad()
def measure(dtype: torch.dtype, rows: int, names: list[str]) -> dict[str, float]:
    """Seconds of ways for one product of `rows` rows with a weight of 2048 x 2048 from memory."""
    count = max(_BYTES // (_SHAPE[0] * _SHAPE[1] * dtype.itemsize), 1)
    count = count if rows < 64 else 1  # with more rows the reading does not count
    weights = torch.empty(count, *_SHAPE, dtype=dtype).fill_(0.01).unbind(0)
    x = torch.full((rows, _SHAPE[1]), 0.01, dtype=dtype)
    seconds = dict.fromkeys(names, float("inf"))
    for attempt in range(5):  # the first loads kernels
        for name in names:
            for weight in weights:
                start = time.perf_counter()
                WAYS[name](x, weight, None)
                if attempt:  # the best, because other processes may take a core at any time
                    seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.define(
    "comemo::cpu_linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("comemo::cpu_linear", "CPU", _product)
torch.library.register_fake("comemo::cpu_linear", _fake)
