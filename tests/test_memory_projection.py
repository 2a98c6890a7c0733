"""project_memory: keys and values with gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, DTYPES, GPU, SLOW, TRACED
from harness import assert_matches, assert_relative
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory_build import built, make_inputs
from torch.autograd import gradcheck

from comemo_kernels import build_memory, project_memory, reference
from comemo_kernels.reference.attention_groups import rotate_by_distance
from comemo_kernels.reference.norms import rms_norm

pytestmark = pytest.mark.kernel(reference=True)

NAMES = ("media", "kv_weights", "norm_weights", "cos", "sin", "ids")


def composed(media, kv_weights, norm_weights, cos, sin, ids, heads, eps=1e-5):
    """The definition, layer by layer, with the gradients of PyTorch."""
    keys, values = [], []
    for layer, weight in enumerate(kv_weights):
        norm = None if norm_weights is None else norm_weights[layer]
        kv = F.linear(rms_norm(media, norm, eps), weight)
        k, v = kv.unflatten(1, (2, heads, -1)).unbind(1)
        keys.append(rotate_by_distance(k, ids, cos, sin))
        values.append(v)
    return tuple(keys), tuple(values)


def leaves_of(inputs):
    """The inputs, of which media and weights require grad, and these tensors."""
    lists = {n: inputs[n] for n in ("kv_weights", "norm_weights") if inputs[n] is not None}
    own = {n: [t.detach().clone().requires_grad_() for t in ts] for n, ts in lists.items()}
    given = inputs | own | {"media": inputs["media"].detach().clone().requires_grad_()}
    return given, [given["media"], *(t for ts in own.values() for t in ts)]


def flattened(inputs, heads):
    """Tensors for `assert_matches`, and a function that makes an operation take them."""
    listed = {n: inputs[n] for n in ("kv_weights", "norm_weights")}
    flat = {n: t for n, t in inputs.items() if n not in listed}
    flat |= {f"{n}{i}": t for n, ts in listed.items() for i, t in enumerate(ts or ())}
    for name, t in flat.items():
        t.requires_grad_(name not in ("cos", "sin", "ids"))

    def of(project):
        def op(media, cos, sin, ids, **weights):
            lists = {
                n: None if ts is None else [weights[f"{n}{i}"] for i in range(len(ts))]
                for n, ts in listed.items()
            }
            keys, values = project(media, **lists, cos=cos, sin=sin, ids=ids, heads=heads)
            return (*keys, *values)

        return op

    return flat, of


# In the interpreter an example takes a second.
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(dtype, marks=() if dtype == DTYPES[-2] else SLOW) for dtype in DTYPES],
    ids=str,
)
@settings(max_examples=max(5, settings.default.max_examples // 2))
@given(
    M=st.integers(1, 70),
    d=st.sampled_from([8, 40]),
    L=st.integers(1, 2),
    G=st.integers(1, 3),
    D=st.sampled_from([24, 128] if GPU else [2, 16, 24]),  # each compiles
    exact=st.booleans(),
)
def test_matches_the_composition(M, d, L, G, D, exact, dtype):
    flat, of = flattened(make_inputs(M, d, L, G, D, exact, dtype), G)
    assert_matches(of(project_memory), of(composed), flat)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "folded"])
def test_the_bits_are_those_of_build_memory(exact):
    """Also where media or the table give NaN, with gradients and without."""
    inputs = make_inputs(40, exact=exact, P=64)
    inputs["media"][7, 3] = math.nan
    inputs["ids"][3] = 64
    wanted = built(build_memory, inputs, (2, 16))
    assert wanted[0][:, [3, 7]].isnan().all()
    assert (wanted[1][:, 7] == 0).all()
    for arguments in (inputs, leaves_of(inputs)[0]):
        for ours, held in zip(project_memory(**arguments, heads=2), wanted, strict=True):
            torch.testing.assert_close(
                torch.stack(ours).detach(), held, rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "folded"])
def test_gradients(exact):
    inputs = make_inputs(3, 4, 2, 1, 4, exact, torch.float64, P=20)
    cos, sin = inputs["cos"].double(), inputs["sin"].double()
    leaves = leaves_of(inputs)[1]

    def project(media, *weights):
        norms = weights[2:] if exact else None
        keys, values = reference.project_memory(
            media, weights[:2], norms, cos, sin, inputs["ids"], 1
        )
        return *keys, *values

    assert gradcheck(project, leaves)
    first = torch.autograd.grad(project(*leaves)[0].sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="project_memory: second derivatives are not computed"):
        first.sum().backward()


def test_nothing_is_computed_for_what_needs_no_gradient(monkeypatch):
    """Frozen media, weights and norms; keys and values of a layer that nobody reads."""
    from comemo_kernels.reference import memory_projection

    inputs = make_inputs(20)
    wanted = gradients_of(project_memory, inputs)
    steps, counts = [], []

    def record(name, step):
        def recorded(*args):
            steps.append(name)
            return step(*args)

        return recorded

    original = memory_projection.project

    def project(given, *args):
        watched = {name: record(name, step) for name, step in given._asdict().items()}
        return original(type(given)(**watched), *args)

    module = reference.memory_projection
    if DEVICE == "cuda":
        from comemo_kernels import memory_projection as module
    monkeypatch.setattr(module, "project", project)
    for frozen, count in (
        ((), (1, 2, 1)),
        (("media",), (1, 2, 0)),
        (("kv_weights", "norm_weights"), (0, 2, 1)),
        (("kv_weights",), (1, 2, 1)),
        (("media", "norm_weights"), (1, 2, 0)),
    ):
        steps.clear()
        found = gradients_of(project_memory, inputs, frozen)
        assert found.keys() == {n for n in wanted if not n.startswith(frozen or "-")}
        for name, gradient in found.items():
            assert torch.equal(gradient, wanted[name]), (frozen, name)
        counts = tuple(map(steps.count, ("normalise", "turn_back", "norm_gradient")))
        assert counts == count, frozen
    steps.clear()
    given, leaves = leaves_of(inputs)
    keys, _ = project_memory(**given, heads=2)
    found = torch.autograd.grad(keys[1].sum(), leaves, allow_unused=True)
    assert [g is None for g in found] == [False, True, False, True, False]
    assert steps.count("turn_back") == 1
    others = torch.autograd.grad(composed(**given, heads=2)[0][1].sum(), leaves, allow_unused=True)
    for ours, theirs in zip(found, others, strict=True):
        if ours is not None:
            assert_relative(ours, theirs)


def gradients_of(project, inputs, frozen=(), heads=2):
    """Gradients by name, of a loss that reads all keys and values."""
    given, _ = leaves_of(inputs)
    named = {"media": given["media"]}
    for name in ("kv_weights", "norm_weights"):
        named |= {f"{name}{i}": t for i, t in enumerate(given[name] or ())}
    for name, t in named.items():
        t.requires_grad_(not name.startswith(tuple(frozen) or "-"))
    named = {name: t for name, t in named.items() if t.requires_grad}
    outputs = [t for held in project(**given, heads=heads) for t in held]
    g = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(t.shape, generator=g).to(t) for t in outputs]
    found = torch.autograd.grad(outputs, list(named.values()), cotangents)
    return dict(zip(named, found, strict=True))


def test_only_the_arguments_are_kept():
    """For the gradient; the keys and values are kept by who reads them."""
    inputs, kept = make_inputs(40), []
    given, _ = leaves_of(inputs)

    def pack(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        project_memory(**given, heads=2)
    arguments = [t for n in NAMES for t in (given[n] if isinstance(given[n], list) else [given[n]])]
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in arguments)


@pytest.mark.parametrize("M", [0, 7])
def test_strided_and_empty_media(M):
    inputs = make_inputs(M or 1)
    inputs = inputs | {"media": inputs["media"][:M], "ids": inputs["ids"][:M]}
    wide = torch.randn(M, 60, device=DEVICE)
    strided = wide[:, :48].copy_(inputs["media"]).requires_grad_()
    outputs = [t for held in project_memory(**inputs | {"media": strided}, heads=2) for t in held]
    for ours, theirs in zip(outputs, built(build_memory, inputs, (2, 16)), strict=False):
        assert ours.shape == theirs.shape[1:]
    cotangents = [torch.randn(t.shape, device=DEVICE) for t in outputs]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in cotangents]
    found = [
        torch.autograd.grad(outputs, strided, dys, retain_graph=True)[0]
        for dys in (cotangents, turned)
    ]
    assert found[0].shape == (M, 48)
    assert torch.equal(*found)
    plain = [t for held in composed(**inputs | {"media": strided}, heads=2) for t in held]
    if M:
        assert_relative(found[0], torch.autograd.grad(plain, strided, cotangents)[0])


def test_autocast():
    """Weights in float32 and media in bfloat16; gradients in the dtypes of the leaves."""
    inputs = make_inputs(40)
    inputs["media"] = inputs["media"].bfloat16()
    given, leaves = leaves_of(inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        keys, values = project_memory(**given, heads=2)
        plain = composed(**given, heads=2)
    assert {t.dtype for t in (*keys, *values)} == {torch.bfloat16}
    exact, wanted = leaves_of({n: double(t) for n, t in inputs.items()})
    truth = composed(**exact, heads=2)
    found = torch.autograd.grad([*keys, *values], leaves, [torch.ones_like(k) for k in keys * 2])
    others = torch.autograd.grad(
        [t for held in plain for t in held], leaves, [torch.ones_like(k) for k in keys * 2]
    )
    true = torch.autograd.grad(
        [t for held in truth for t in held], wanted, [torch.ones_like(k) for k in truth[0] * 2]
    )
    for leaf, ours, theirs, right in zip(leaves, found, others, true, strict=True):
        assert ours.dtype == leaf.dtype
        errors = [(g.double() - right).abs().mean().item() for g in (ours, theirs)]
        assert errors[0] <= 3 * errors[1] + 2**-8 * right.abs().mean().item()


def double(value):
    if isinstance(value, list):
        return [t.double() for t in value]
    return value.double() if value.is_floating_point() else value


def test_says_what_is_wrong():
    inputs = make_inputs(16)
    for message, changes in (
        (r"media must be \[M, d\]", {"media": inputs["media"][0]}),
        (r"must be of one length, .* got \[2, 1\]", {"norm_weights": inputs["norm_weights"][:1]}),
        (r"got \[0\]", {"kv_weights": [], "norm_weights": None}),
        ("heads must be an integer from 1", {"heads": 0}),
        (r"kv_weights must be torch.float32 \(96, 48\) .* 3 heads of 16", {"heads": 3}),
        (r"norm_weights must be torch.float32 \(48,\)", {"norm_weights": inputs["kv_weights"]}),
        (r"ids must be int32 \(16,\)", {"ids": inputs["ids"].long()}),
        (r"cos and sin must be \[P, 16/2\]", {"sin": inputs["sin"][1:]}),
        ("cos and sin must not require grad", {"cos": inputs["cos"].clone().requires_grad_()}),
    ):
        with pytest.raises(ValueError, match=f"project_memory: .*{message}"):
            project_memory(**inputs | {"heads": 2} | changes)


@pytest.mark.kernel
def test_says_what_a_kernel_cannot_do():
    inputs = make_inputs(16)
    turned = [weight.t().contiguous().t() for weight in inputs["kv_weights"]]
    strided = inputs["media"].t().contiguous().t()
    for message, arguments in (
        ("float64 has no kernel", {n: double(t) for n, t in inputs.items()}),
        ("weights must be contiguous", inputs | {"kv_weights": turned}),
        (
            "media, cos and sin must be contig",
            inputs | {"media": strided},
        ),
        ("D must be at most 128", make_inputs(4, 8, 1, 1, 136)),
    ):
        heads = 1 if "128" in message else 2
        with pytest.raises(ValueError, match=f"project_memory: on a GPU .*{message}"):
            project_memory(**arguments, heads=heads)


@pytest.mark.kernel
@TRACED
def test_operator_contract(real_device):
    from comemo_kernels import memory_projection
    from comemo_kernels._memory_build_gradient import turn_back_op

    inputs = make_inputs(16, dtype=torch.float16, device=real_device)
    torch.library.opcheck(memory_projection._project, [*(inputs[n] for n in NAMES), 2, 1e-5])
    torch.library.opcheck(memory_projection._normalise, [inputs["media"], 1e-5])
    dk = torch.randn(16, 2, 16, device=real_device).half()
    table = [inputs[n] for n in ("cos", "sin", "ids")]
    for pair in ((dk, dk), (dk, None), (None, dk)):
        torch.library.opcheck(turn_back_op, [*table, *pair])


@TRACED
@pytest.mark.kernel
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "folded"])
def test_compiles_whole(real_device, exact):
    inputs = make_inputs(16, exact=exact, device=real_device)
    compiled = torch.compile(project_memory, fullgraph=True, backend="aot_eager")
    ours, theirs = (gradients_of(project, inputs) for project in (compiled, project_memory))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)
