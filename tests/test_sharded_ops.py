"""Public operations on DTensors: results and gradients of one process, and refusals by name."""

import re
import sys
import traceback

import pytest
import torch
from rank_processes import run_ranks
from sharded_calls import (
    CASES,
    FLOAT8,
    GRID_CASES,
    GRIDS,
    HALVES,
    HEADS,
    MEMORY,
    PROMPTS,
    QUARTERS,
    ROWS,
    SUM,
    TOKENS,
    WHOLE,
    DTensor,
    attended,
    built,
    changed,
    linear,
    place,
    projected,
    residual,
    rotary,
    table,
    tensor,
    tiles,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import comemo_kernels as ops

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_virtual_gpu("forks")]


def learning(name, x):
    """A leaf that requires grad if the operations have a gradient for it."""
    fixed = not x.is_floating_point() or x.dtype == FLOAT8 or "." in name or name in ("cos", "sin")
    return x.clone() if fixed else x.clone().requires_grad_()


def leaves(args):
    found = []
    for name, value in args.items():
        changed(name, value, lambda path, x: found.append((path, x)) if x.requires_grad else None)
    return found


def flat(result):
    return [t for part in result for t in flat(part)] if isinstance(result, tuple) else [result]


class Collectives(TorchDispatchMode):
    """Collects names of collectives. (PyTorch's CommDebugMode imports its compiler: 4 s.)"""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # then its operations on local tensors come here
        if "c10d" in func.namespace:
            self.names.append(str(func))
        return func(*args, **kwargs or {})


def compare(verb, make, places, wanted, mesh):
    """Results and gradients with DTensors are those of whole tensors."""

    def set_place(path, x):
        if path.rpartition(".")[2] in ("cos", "sin") and path not in places:
            return x  # a plain tensor is whole
        held = places.get(path, WHOLE)
        return place(x, mesh, held if isinstance(held, tuple) else (held,) * mesh.ndim)

    torch.manual_seed(0)
    args = {name: changed(name, x, learning) for name, x in make().items()}
    ours = {name: changed(name, x, set_place) for name, x in args.items()}
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    function = getattr(ops, verb)
    whole = flat(function(**args))
    with Collectives() as collectives:
        found = flat(function(**ours))
    assert not collectives.names
    losses = []
    for results in (whole, found):
        loss, generator = 0, torch.Generator().manual_seed(1)
        for t in results:
            if t is not None:
                t = t.full_tensor() if isinstance(t, DTensor) else t
                loss = loss + (t * torch.randn(t.shape, generator=generator)).sum()
        losses.append(loss)
    for ours_t, t in zip(found, whole, strict=True):
        assert (ours_t is None) == (t is None)
        if t is not None:
            assert ours_t.placements == wanted
            assert ours_t.shape == t.shape
            assert ours_t.full_tensor().shape == t.shape
            assert_close(ours_t.full_tensor(), t)
    named = leaves(args)
    if not named:
        return
    for loss in losses:
        loss.backward()
    for (path, t), (_, ours_t) in zip(named, leaves(ours), strict=True):
        held, got = ours_t.placements, ours_t.grad.placements
        for placement, grad in zip(held, got, strict=True):
            assert grad == placement or (placement in (WHOLE, SUM) and grad in (WHOLE, SUM)), path
        assert_close(ours_t.grad.full_tensor(), t.grad, msg=lambda told, path=path: path + told)


def outcomes(cases, shape):
    """For each case "" or what went wrong, on this rank."""
    torch.manual_seed(0)
    mesh, told = tensor.init_device_mesh("cpu", shape), {}
    for name, case in cases.items():
        try:
            compare(name.split()[0], *case, mesh)
            told[name] = ""
        except Exception:
            told[name] = traceback.format_exc()
    return told


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """DTensor imports PyTorch's compiler, for 2 s: here, and not in every rank."""
    import torch._dynamo  # noqa: F401


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(2, outcomes, CASES, (2,))


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_one_process(name, on_two_ranks):
    assert [told[name] for told in on_two_ranks] == ["", ""]


def test_each_dimension_of_a_mesh_has_a_split_of_its_own():
    for told in run_ranks(4, outcomes, GRID_CASES, (2, 2)):
        assert set(told.values()) == {""}, told


def test_keys_and_values_are_built_in_place():
    """`build_memory` writes into the ranks' parts of the buffers."""

    def build():
        mesh = tensor.init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        args = built()
        places = {"kv_weights": HALVES, "keys": TOKENS, "values": TOKENS}
        ours = {
            name: changed(name, x, lambda path, t: place(t, mesh, (places.get(path, WHOLE),)))
            for name, x in args.items()
        }
        assert ops.build_memory(**args) is None
        assert ops.build_memory(**ours) is None
        for name in ("keys", "values"):
            for found, wanted in zip(ours[name], args[name], strict=True):
                assert wanted.any()
                assert_close(found.full_tensor(), wanted)

    run_ranks(2, build)


# --- refusals ---

REFUSALS = {
    "a placement without a rule": (
        "attend_spans",
        attended,
        {"q": HEADS},
        r"attend_spans: k must be a DTensor with Shard\(dim=1\) on dimension 0 \('ranks'\) of the"
        r" mesh, beside the other arguments, got placements \(Replicate\(\),\): redistribute it to"
        r" \[Shard\(dim=1\)\], or pass local tensors \(.to_local\(\)\)",
    ),
    "spans of all prompts": (
        "attend_spans",
        attended,
        PROMPTS | {"spans": WHOLE},
        r"attend_spans: spans must be a DTensor with Shard\(dim=0\) .* got placements \(Rep",
    ),
    "a memory that is split by tokens": (
        "attend_spans",
        attended,
        {"k": ROWS, "v": ROWS},
        r"attend_spans: k must be a DTensor with Replicate\(\) .* got placements \(Shard\(dim=0\)",
    ),
    "keys and values that a rank does not have both of": (
        "project_memory",
        projected,
        {"kv_weights": ROWS},
        r"project_memory: kv_weights\[0\] must be a DTensor with _StridedShard\(dim=0, .*=2\) on",
    ),
    "quarters of keys and values": (
        "project_memory",
        projected,
        {"kv_weights": QUARTERS},
        r"project_memory: kv_weights\[0\] must be a DTensor with _Str.*=2\) .* \(_Str.*=4\),\): re",
    ),
    "a maximum in place of a sum": (
        "gated_residual",
        residual,
        {"x": tensor.Partial("max"), "a": HEADS, "weight": TOKENS},
        r"gated_residual: x must be a DTensor with .* got placements \(Partial\(max\),\)",
    ),
    "a sum where terms do not add up": (
        "norm_linear",
        linear,
        {"x": SUM},
        r"norm_linear: x must be a DTensor with .* got placements \(Partial\(sum\),\): redist",
    ),
    "a weight that is split by its inputs": (
        "norm_linear",
        linear,
        {"weight": TOKENS},
        r"norm_linear: weight must be a DTensor with Shard\(dim=0\) .* \(Shard\(dim=1\),\)",
    ),
    "heads that cannot be split equally": (
        "apply_rotary",
        lambda: rotary(k=torch.randn(2, 4, 3, 16)),
        {"q": HEADS, "k": HEADS},
        "apply_rotary: dimension 2 of k must be a multiple of 2, the ranks that split it, got 3",
    ),
    "grids by prompts": (
        "apply_rotary",
        lambda: rotary(positions=GRIDS),
        {"q": ROWS, "k": ROWS},
        r"apply_rotary: q must be a DTensor with .* got placements \(Shard\(dim=0\),\)",
    ),
    "writing in place": (
        "apply_rotary",
        lambda: rotary(inplace=True),
        {"q": HEADS, "k": HEADS},
        "apply_rotary: inplace must be False beside a DTensor, which is not written in place: pass",
    ),
    "a workspace": (
        "attend_spans",
        lambda: attended(workspace=ops.attention_workspace(*list(attended().values())[:2])),
        MEMORY,
        "attend_spans: workspace must be None beside a DTensor",
    ),
    "destinations": (
        "project_tiles",
        lambda: tiles() | {"embeds": torch.zeros(9, 8)},
        {"tokens": ROWS},
        "project_tiles: embeds must be None beside a DTensor",
    ),
    "an operation without a rule": (
        "fold_tiles",
        lambda: {"tokens": torch.zeros(2, 4, 4, 4), "ratio": 0.5},
        {"tokens": ROWS},
        r"fold_tiles: tokens must be a plain tensor, because fold_tiles has no rule for a DTensor,"
        r" got one with placements \(Shard\(dim=0\),\): pass tokens.to_local\(\)",
    ),
    "another kind of argument": (
        "norm_linear",
        lambda: linear() | {"weight": 3},
        {"x": ROWS},
        "norm_linear: weight must be a dense tensor with values, got 3",
    ),
}


def message(verb, args):
    try:
        getattr(ops, verb)(**args)
    except ValueError as error:
        return str(error)
    return "no error"


def refuse():
    """The error of each case, with DTensors of these placements; then of some other mixtures."""
    mesh = tensor.init_device_mesh("cpu", (2,), mesh_dim_names=("ranks",))
    other = tensor.init_device_mesh("cpu", (2, 1))
    told = {}
    torch.manual_seed(0)
    for name, (verb, make, places, _) in REFUSALS.items():

        def set_place(path, x, places=places):
            return place(x, mesh, (places.get(path, WHOLE),))

        told[name] = message(verb, {n: changed(n, x, set_place) for n, x in make().items()})
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    ours = place(x, mesh, (ROWS,))
    told["plain"] = message("norm_linear", {"x": ours, "norm_weight": None, "weight": weight})
    right = rotary(k=None)
    q, cos = place(right["q"], mesh, (HEADS,)), right["cos"].requires_grad_()
    told["learns"] = message("apply_rotary", right | {"q": q, "cos": cos})
    right = attended(rotation=None)
    places = {"q": (ROWS,), "k": (WHOLE,), "v": (WHOLE,)}
    split = {name: place(right[name], mesh, held) for name, held in places.items()}
    told["spans"] = message("attend_spans", right | split)
    split = place(weight, other, (ROWS, WHOLE))
    told["mesh"] = message("norm_linear", {"x": ours, "norm_weight": None, "weight": split})
    cos, sin = (place(t, mesh, (WHOLE,)) for t in table())
    right = attended()
    right["rotation"] = right["rotation"]._replace(cos=cos, sin=sin)
    told["rotation"] = message("attend_spans", right)
    memory = ops.ImageMemory(keys={3: place(torch.zeros(4, 2, 16), mesh, (TOKENS,))})
    told["memory"] = message("split_images", {"memory": memory})
    return told


@pytest.fixture(scope="module")
def refused():
    first, second = run_ranks(2, refuse)
    assert first == second
    return first


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_rule_is_refused_by_name(name, refused):
    assert re.match(REFUSALS[name][-1], refused[name]), refused[name]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("plain", "norm_linear: weight must be a DTensor like x, which has placements .*Shard"),
        ("learns", "apply_rotary: cos must be a DTensor like q, .* a plain tensor: distribute it"),
        ("spans", r"attend_spans: spans must be a DTensor with Shard.*=0\) .* taken for whole: re"),
        (
            "mesh",
            r"norm_linear: weight must be on the mesh of x, .*, got placements \(Shard.* on D",
        ),
        ("rotation", "attend_spans: q must be a DTensor like rotation.cos, .* got a plain tensor"),
        ("memory", r"split_images: memory.keys\[3\] must be a plain tensor, because split_images"),
    ],
)
def test_mixtures_are_refused(name, told, refused):
    assert re.match(told, refused[name]), refused[name]


def test_plain_tensors_need_no_torch_distributed(monkeypatch):
    """A build without it has no such module."""
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", None)
    monkeypatch.delitem(sys.modules, "comemo_kernels._sharded", raising=False)
    assert ops.norm_linear(**linear()).shape == (2, 3, 6)
    with pytest.raises(ValueError, match="norm_linear: weight must be a dense tensor"):
        ops.norm_linear(**linear() | {"weight": 3})
