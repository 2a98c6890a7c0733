"""One small launch of every kernel for compute-sanitizer: `python -m bench.sanitize`.

The tool makes each memory access many times slower. So shapes are just large enough for every loop
and every mask of a kernel.
"""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import comemo_kernels as ops
from bench.cases import Prompt
from comemo_kernels import ImageMemory, QueryRotation
from comemo_kernels._descriptors import AVAILABLE
from comemo_kernels._op import INTERPRET, has_float8

HALF = torch.bfloat16


def cases(device: str) -> dict[str, Callable[[], Any]]:
    """Name -> a call that returns the outputs of its kernels."""
    draw = functools.partial(_draw, device=device)
    found: dict[str, Callable[[], Any]] = {
        "rotary": lambda: rotate(draw),
        "positions": lambda: number(device),
        "norm_linear": lambda: ops.norm_linear(draw(2, 72), draw(72), draw(40, 72)),
        "norm_swiglu": lambda: ops.norm_swiglu(draw(2, 72), draw(72), draw(40, 72), draw(40, 72)),
        "gated_residual": lambda: ops.gated_residual(
            draw(2, 40), draw(2, 72), draw(40, 72), draw(1)
        ),
        "norms and networks, gradients": lambda: learn(draw),
        "norm of wide rows, gradient": lambda: norm_wide(draw),
        "attend, one query": lambda: attend_one(draw),
        "attend, a batch": lambda: attend(draw, 9, 260),
        "attend, a prompt": lambda: attend(draw, 66, 70),
        "attend, float32": lambda: attend(functools.partial(draw, dtype=torch.float32), 20, 70),
        "attend, gradient": lambda: attend_to_learn_by_all(draw),
        "attend, gradient of prompts": lambda: attend_to_learn(draw, 32, prompts=2, N=9),
        "attend, gradient of wide heads": lambda: attend_to_learn(draw, 200),
        "attend, gradient in float32": lambda: attend_to_learn(
            functools.partial(draw, dtype=torch.float32), 16, N=9, M=20
        ),
        "build": lambda: build(draw, HALF),
        "build, float32": lambda: build(
            functools.partial(draw, dtype=torch.float32), torch.float32
        ),
        "build and its gradient": lambda: build_to_learn(draw),
        "project and its gradient": lambda: project(draw),
        "project, float32": lambda: project(functools.partial(draw, dtype=torch.float32)),
        "fold of wide tokens and its gradient": lambda: fold_wide(draw),
    }
    if INTERPRET or has_float8(0):
        found["build, float8"] = lambda: build(draw, torch.float8_e4m3fn)
    found = {name: functools.partial(without_descriptors, call) for name, call in found.items()}
    if AVAILABLE and (INTERPRET or torch.cuda.get_device_capability() == (9, 0)):
        found["attend, by descriptors"] = lambda: attend_by_descriptors(draw)
        found["build, by descriptors"] = lambda: build_by_descriptors(draw)
    return found


def without_descriptors(call: Callable[[], Any]) -> Any:
    """Run the call on the kernels that load by pointers."""
    from comemo_kernels import attention, memory_build

    with (
        mock.patch.object(attention, "USE_TMA", False),
        mock.patch.object(memory_build, "USE_TMA", False),
    ):
        return call()


def _draw(*shape: int, device: str, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape).to(device, dtype)


def _table(device: torch.device, count: int, dim: int) -> tuple[Tensor, Tensor]:
    return ops.distance_table(dim, 1e4, count, device)


def rotate(draw: Callable[..., Tensor]) -> Any:
    q, k = draw(1, 9, 4, 32), draw(1, 9, 2, 32)
    cos, sin = _table(q.device, 50, 32)
    return ops.apply_rotary(q, k, cos, sin, torch.arange(9, device=q.device)[None])


def number(device: str) -> Any:
    prompt = Prompt([(5, [(2, 1), (1, 1)], 3)])
    image, mask = prompt.masks(device)
    return ops.rope_dhr_positions(image, mask, prompt.grids, tile_order="column")


def learn(draw: Callable[..., Tensor]) -> Any:
    """More rows than are one launch; every gradient."""
    leaves = [draw(20, 72), draw(72), draw(40, 72), draw(40, 72), draw(72, 40), draw(1)]
    leaves = [t.requires_grad_() for t in leaves]
    out = ops.gated_swiglu(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def norm_wide(draw: Callable[..., Tensor]) -> Any:
    """Rows wide enough for configurations with more warps."""
    from comemo_kernels._rms_norm_gradient import rms_norm_gradient_op

    found: list[Tensor] = []
    for d in (2056, 8200):
        dy, x, added = (draw(3, d) for _ in range(3))
        found += rms_norm_gradient_op(dy, x, draw(d), added, 1e-5, True, True)
    return found


def attend(draw: Callable[..., Tensor], N: int, M: int) -> Any:
    """Two images; split-K if there are few queries."""
    q, k, v = draw(1, N, 4, 64), draw(M, 2, 64), draw(M, 2, 64)
    return _attend(q, k, v, [0, M // 3])


def attend_one(draw: Callable[..., Tensor]) -> Any:
    """In every configuration: some combine split-K parts in the same launch."""
    from comemo_kernels import attention

    found = []
    for config in attention.attend_one.configs:
        with attention.attend_one.using(config):
            found.append(attend(draw, 1, 260))
    return found


def _attend(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Any:
    cos, sin = _table(q.device, 150, 64)
    first_keys = torch.tensor([starts], dtype=torch.int32, device=q.device)  # [1, I]
    ids = torch.arange(q.shape[1], device=q.device)[None]
    rotation = QueryRotation(cos, sin, ids, first_keys[0], first_keys % 7)
    spans = torch.tensor([[[3, len(k)]]], device=q.device)
    return ops.attend_spans(q, k, v, spans, rotation)


def attend_to_learn(
    draw: Callable[..., Tensor], D: int, prompts: int = 1, N: int = 70, M: int = 150
) -> Any:
    """Two images, at ids of their own in each prompt; each token reads another part of them."""
    shapes = {"x": (prompts, N, 8), "q": (prompts, N, 4, D), "k": (M, 2, D), "v": (M, 2, D)}
    shapes |= {"weight": (8, 4 * D), "gate": (1,)}
    leaves = {name: draw(*shape).requires_grad_() for name, shape in shapes.items()}
    device = leaves["q"].device
    starts = torch.tensor([0, M // 3], dtype=torch.int32, device=device)
    biases = torch.arange(2 * prompts, dtype=torch.int32, device=device).view(prompts, 2)
    ids = torch.arange(N, device=device).expand(prompts, -1)
    rotation = QueryRotation(*_table(device, 150, D), ids, starts, biases)
    first = torch.arange(N, device=device) // 9 * 9
    spans = torch.stack([first, first + M // 2], -1).expand(prompts, -1, -1)
    out = ops.attend_gated(**leaves, spans=spans, rotation=rotation)
    return torch.autograd.grad(out.sum(), list(leaves.values()))


def attend_to_learn_by_all(draw: Callable[..., Tensor]) -> Any:
    """In every configuration, and by the kernel for GPUs without warp groups."""
    from comemo_kernels import _attend_gradient as gradient

    found: list[Tensor] = []
    with mock.patch.object(gradient, "has_warp_groups", return_value=False):
        found += attend_to_learn(draw, 32)
    for kernel in (gradient.gradient_queries, gradient.gradient_keys):
        for config in kernel.configs:
            if INTERPRET and config is not kernel.configs[0]:  # tests run them all
                continue
            with kernel.using(config):
                found += attend_to_learn(draw, 32)
    return found


def attend_by_descriptors(draw: Callable[..., Tensor]) -> Any:
    """In every configuration, with one image and with two."""
    from comemo_kernels import _attend_tma, attention

    found = []
    for config in _attend_tma.attend_tma.configs:
        for starts in ([0], [0, 30]):
            with (
                _attend_tma.attend_tma.using(config),
                mock.patch.object(attention, "USE_TMA", True),
                mock.patch.object(attention, "_choose_splits", return_value=1),
            ):
                found.append(_attend(draw(1, 70, 2, 64), draw(70, 1, 64), draw(70, 1, 64), starts))
    return found


def build(draw: Callable[..., Tensor], stored: torch.dtype) -> Any:
    """Two layers of 40 tokens."""
    media, weights = draw(40, 72), [draw(2 * 2 * 32, 72) for _ in range(2)]
    table = _table(media.device, 99, 32)
    memory = ImageMemory.allocate(40, range(2), 2, 32, table, stored)
    keys, values = list(memory.keys.values()), list(memory.values.values())
    scales = list(memory.scales.values()) or None
    ids = torch.arange(40, dtype=torch.int32, device=media.device)
    norms = [draw(72) for _ in range(2)]
    ops.build_memory(media, weights, norms, *table, ids, keys, values, scales)
    return [*keys, *values, *(t for s in scales or () for t in (s.keys, s.values))]


def build_to_learn(draw: Callable[..., Tensor]) -> Any:
    """Of one layer keys and values are read, of one only values."""
    media, weights = draw(40, 72), [draw(2 * 3 * 32, 72) for _ in range(2)]
    table, ids = _table(media.device, 99, 32), torch.arange(-9, 31, dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (media, *weights, draw(72), draw(72))]
    built = (leaves[1:3], leaves[3:], *table, ids.to(media.device), 3)
    keys, values = ops.project_memory(media, *built)
    read = [keys[0], *values]
    return torch.autograd.grad(read, leaves, [torch.ones_like(t) for t in read])


def build_by_descriptors(draw: Callable[..., Tensor]) -> Any:
    """In every configuration; more blocks than programs, all of them partial."""
    from comemo_kernels import _memory_build_tma, memory_build

    found = []
    for config in _memory_build_tma.project_tma.configs:
        with (
            _memory_build_tma.project_tma.using(config),
            mock.patch.object(memory_build, "USE_TMA", True),
            mock.patch.object(_memory_build_tma, "multiprocessors", return_value=3),
        ):
            found += build(draw, HALF)
    return found


def project(draw: Callable[..., Tensor]) -> Any:
    """One tile of 4 tokens, wide enough for a split-K GEMM."""
    tokens, W, d = draw(1, 17, 256), 1024, 40
    weights = [draw(W), draw(W), draw(d, W) / 32, draw(d), draw(d, d) / 6, draw(d)]
    leaves = [t.requires_grad_() for t in (tokens, *weights)]
    media = ops.project_tiles(*leaves)
    return [media.detach(), *torch.autograd.grad(media, leaves, torch.ones_like(media))]


def fold_wide(draw: Callable[..., Tensor]) -> Any:
    """Tokens wide enough for configurations with more warps, without the GEMMs after the fold."""
    from comemo_kernels import _unshuffle_norm

    tokens, W = draw(1, 17, 2056), 4 * 2056
    normed, stats = draw(4, W), draw(4, 2).float()
    norm = draw(W), draw(W)
    _unshuffle_norm.launch_fold_norm(normed, stats, tokens, *norm, 2, False, 1e-5)
    gradients = _unshuffle_norm.fold_norm_gradient_op(
        draw(4, W), tokens, norm[0], stats, 2, False, True, True
    )
    return [normed, stats, *gradients]


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("python -m bench.sanitize: needs a GPU, torch sees none")
    for name, run in cases("cuda").items():
        print(name, flush=True)
        run()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
