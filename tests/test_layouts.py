"""Every tensor argument of every operation in other layouts: a correct result, or an error.

A launcher passes few strides; it must check those that it does not pass.
"""

import functools
import math
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, GPU, INTERPRET, SLOW
from harness import assert_relative

import comemo_kernels as ops
from comemo_kernels import MemoryScales, QueryRotation

pytestmark = pytest.mark.kernel(reference=True)


def spread(t, dim):
    """`t` with stride 2 along `dim`, and NaN or the largest integer between its elements."""
    poison = math.nan
    if not t.is_floating_point():
        poison = True if t.dtype == torch.bool else torch.iinfo(t.dtype).max
    shape = (*t.shape[:dim], 2 * t.shape[dim], *t.shape[dim + 1 :])
    wide = torch.zeros(shape, dtype=t.dtype, device=t.device).fill_(poison)
    narrow = wide[(slice(None),) * dim + (slice(None, None, 2),)]
    return narrow.copy_(t)


def turned(t):
    """`t` with its dimensions in the opposite order in memory."""
    order = tuple(reversed(range(t.ndim)))
    return t.permute(order).contiguous().permute(order)


def layouts(t):
    """Name -> `t` in another layout: other strides, the same values."""
    found = {f"spread along {dim}": functools.partial(spread, t, dim) for dim in range(t.ndim)}
    if t.ndim > 1:
        found["turned"] = functools.partial(turned, t)
    return {name: make() for name, make in found.items()}


def draw(*shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=g).to(DEVICE, dtype)


def table(P, half):
    cos, sin = ops.rotary_table(torch.arange(P, device=DEVICE)[None], 2 * half, theta=100.0)
    return cos[0], sin[0]


def integers(high, *shape, dtype=torch.int64):
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randint(high, shape, generator=g).to(DEVICE, dtype)


# --- one function for each operation: its tensors by name, and how to call it ---


def rotary(kind):
    cos, sin = table(20, 8)
    tensors = {"q": draw(2, 6, 4, 16), "k": draw(2, 6, 2, 16), "cos": cos, "sin": sin}
    if kind == "ids":
        tensors["positions"] = integers(20, 2, 6)
    elif kind == "grids":
        grids = ops.ImageGrids.pack([(2, 1), (1, 1)], [1, 6], [2, 4], side=1, device=DEVICE)
        tensors["positions"] = grids.table
    else:
        tensors |= {"cos": cos[integers(20, 2, 6)], "sin": sin[integers(20, 2, 6)]}

    def run(q, k, cos, sin, positions=None, inplace=False):
        if kind == "grids":
            positions = replace(grids, table=positions)
        return ops.apply_rotary(q, k, cos, sin, positions, inplace=inplace)

    return tensors, run


def rotary_in_place():
    tensors, run = rotary("ids")

    def run_in_place(q, k, **rest):
        # Copies in the same layouts, because the operation writes them.
        copies = [t.clone(memory_format=torch.preserve_format) for t in (q, k)]
        return run(*copies, **rest, inplace=True)

    return tensors, run_in_place


def numbering():
    image = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    image[0, 2:6] = image[1, 4:8] = True
    attention = torch.ones(2, 9, dtype=torch.int64, device=DEVICE)
    attention[1, :2] = 0

    def run(image_mask, attention_mask, grids):
        return (ops.rope_dhr_positions(image_mask, attention_mask, grids, side=2),)

    grids = torch.tensor([[1, 1], [1, 1]])  # on the CPU, where it is read
    return {"image_mask": image, "attention_mask": attention, "grids": grids}, run


def attention(kind):
    M, (cos, sin) = 64, table(90, 8)
    tensors = {"q": draw(2, 3, 4, 16), "k": draw(M, 2, 16), "v": draw(M, 2, 16)}
    tensors["spans"] = integers(M, 2, 3, 2).sort(-1).values
    tensors |= {"cos": cos, "sin": sin, "positions": integers(30, 2, 3)}
    tensors["starts"] = torch.tensor([0, 16, 32], dtype=torch.int32, device=DEVICE)
    tensors["biases"] = integers(30, 2, 3, dtype=torch.int32)
    written = ("out", "lse", "parts", "part_lse", "counts")
    if kind == "float8":
        # In float8 from the start, so that copies are exact.
        for name in "kv":
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = draw(M // 16, 2).abs()
    elif kind == "workspace":
        workspace = ops.attention_workspace(tensors["q"], tensors["k"], splits=2)
        tensors |= dict(zip(written, workspace, strict=True))

    def run(q, k, v, spans, cos, sin, positions, starts, biases, **rest):
        rotation = QueryRotation(cos, sin, positions, starts, biases)
        scales = MemoryScales(rest["k_scale"], rest["v_scale"], 16) if kind == "float8" else None
        workspace = None
        if kind == "workspace":
            rest["counts"].zero_()
            workspace = ops.AttentionWorkspace(*(rest[name] for name in written))
        options = {"scales": scales, "return_lse": True, "workspace": workspace}
        return ops.attend_spans(q, k, v, spans, rotation, **options)

    return tensors, run


def memory(dtype, exact=True):
    M, d, G, D = 32, 24, 2, 16
    cos, sin = table(40, 8)
    tensors = {"media": draw(M, d), "weight": draw(2 * G * D, d), "cos": cos, "sin": sin}
    tensors["ids"] = integers(40, M, dtype=torch.int32)
    if exact:
        tensors["norm"] = draw(d)
    held = torch.zeros(M, G, D, device=DEVICE).to(dtype)
    tensors |= {"keys": held, "values": held.clone()}
    if dtype != torch.float32:
        tensors |= {name: torch.ones(M // 16, G, device=DEVICE) for name in ("k_scale", "v_scale")}

    def run(media, weight, cos, sin, ids, keys, values, norm=None, k_scale=None, v_scale=None):
        scales = None if k_scale is None else [MemoryScales(k_scale, v_scale, 16)]
        norms = None if norm is None else [norm]
        ops.build_memory(media, [weight], norms, cos, sin, ids, [keys], [values], scales)
        return keys.float(), values.float(), *(() if scales is None else (k_scale, v_scale))

    return tensors, run


def rows(verb):
    R, K, outputs = 3, 24, 16
    x, weight = draw(R, K), draw(outputs, K)
    if verb == "norm_linear":
        tensors = {"x": x, "norm_weight": draw(K), "weight": weight}
    elif verb == "norm_swiglu":
        tensors = {"x": x, "norm_weight": draw(K), "gate_weight": weight, "up_weight": weight + 1}
    else:
        tensors = {"x": draw(R, outputs), "a": x, "weight": weight, "gate": draw(1)}
    return tensors, lambda **tensors: (getattr(ops, verb)(**tensors),)


def tiles(kind):
    T, C, d, n = 3, 8, 16, 2
    W, count = C * n * n, 3 * 4
    names = ("norm_weight", "norm_bias", "weight1", "bias1", "weight2", "bias2")
    shapes = ((W,), (W,), (d, W), (d,), (d, d), (d,))
    tensors = {"tokens": draw(T, 1 + 16, C)}
    tensors |= {name: draw(*shape) for name, shape in zip(names, shapes, strict=True)}
    if kind == "places":
        tensors["embeds"] = torch.zeros(20, d, device=DEVICE)
        tensors["rows"] = torch.arange(20, device=DEVICE)[3 : 3 + count].clone()
    elif kind == "media":
        tensors["media"] = torch.zeros(count, d, device=DEVICE)

    def run(**tensors):
        found = ops.project_tiles(**tensors, version="v2")
        return found, *(tensors[name] for name in ("embeds", "media") if name in tensors)

    return tensors, run


def tiles_gradients():
    tensors, run = tiles("")

    def gradients(**tensors):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        (found,) = run(**leaves)
        return torch.autograd.grad((found * draw(*found.shape)).sum(), list(leaves.values()))

    return tensors, gradients


def gated_gradients():
    tensors, _ = attention("")
    tensors |= {name: tensors[name][:16].clone() for name in ("k", "v")}
    tensors["spans"] = tensors["spans"] // 4
    tensors["q"] = draw(2, 3, 2, 16)
    tensors |= {"x": draw(2, 3, 8), "weight": draw(8, 32), "gate": draw(1)}
    learning = ("x", "q", "k", "v", "weight", "gate")

    def gradients(cos, sin, positions, starts, biases, **tensors):
        rotation = QueryRotation(cos, sin, positions, starts, biases)
        tensors |= {name: tensors[name].detach().requires_grad_() for name in learning}
        found = ops.attend_gated(**tensors, rotation=rotation)
        return torch.autograd.grad(
            (found * draw(*found.shape)).sum(), [tensors[name] for name in learning]
        )

    return tensors, gradients


def memory_gradients(exact):
    tensors, _ = memory(torch.float32, exact=exact)
    for name in ("keys", "values"):
        del tensors[name]

    def gradients(cos, sin, ids, **tensors):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        norms = [leaves["norm"]] if exact else None
        G = leaves["weight"].shape[0] // (4 * cos.shape[1])
        built = ops.project_memory(leaves["media"], [leaves["weight"]], norms, cos, sin, ids, G)
        loss = sum((held[0] * draw(*held[0].shape)).sum() for held in built)
        return torch.autograd.grad(loss, list(leaves.values()))

    return tensors, gradients


CASES = {
    "apply_rotary by table": functools.partial(rotary, "table"),
    "apply_rotary by ids": functools.partial(rotary, "ids"),
    "apply_rotary by grids": functools.partial(rotary, "grids"),
    "apply_rotary in place": rotary_in_place,
    "rope_dhr_positions": numbering,
    "attend_spans with a workspace": functools.partial(attention, "workspace"),
    "attend_spans float8": functools.partial(attention, "float8"),
    "attend_gated gradients": gated_gradients,
    "build_memory": functools.partial(memory, torch.float32),
    "build_memory folded": functools.partial(memory, torch.float32, exact=False),
    "project_memory gradients": functools.partial(memory_gradients, True),
    "project_memory gradients folded": functools.partial(memory_gradients, False),
    "build_memory float8": functools.partial(memory, torch.float8_e4m3fn),
    "norm_linear": functools.partial(rows, "norm_linear"),
    "norm_swiglu": functools.partial(rows, "norm_swiglu"),
    "gated_residual": functools.partial(rows, "gated_residual"),
    "project_tiles": functools.partial(tiles, ""),
    "project_tiles into embeds": functools.partial(tiles, "places"),
    "project_tiles into media": functools.partial(tiles, "media"),
    "project_tiles gradients": tiles_gradients,
}


# On a CPU the order of a sum depends on the layout, which may change a float8 by one step.
ON_KERNELS = pytest.mark.skipif(not (GPU or INTERPRET), reason="only for kernels")


LONG = {"attend_gated gradients": SLOW}  # its parts are cases of their own


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=ON_KERNELS if "memory float8" in c else LONG.get(c, ())) for c in CASES],
)
def test_a_layout_gives_a_correct_result_or_an_error(case):
    verb = case.split()[0]
    tensors, run = CASES[case]()
    wanted = [t.clone() for t in run(**{name: t.clone() for name, t in tensors.items()})]
    handled = 0
    for name in tensors:
        for layout, t in layouts(tensors[name]).items():
            if t.stride() == tensors[name].stride():
                continue
            given = {other: x.clone() for other, x in tensors.items()} | {name: t}
            refusal, found = "", ()
            try:
                found = run(**given)
            except ValueError as error:
                refusal = str(error)
            assert found or refusal.startswith(f"{verb}: "), f"{name}, {layout}: {refusal}"
            handled += bool(found)
            for ours, theirs in zip(found, wanted, strict=False):
                assert_relative(ours.double(), theirs.double(), f"{name}, {layout}")
    assert handled
