"""Patching instances: what is replaced, and that everything is put back."""

import copy
import inspect
import io
import pickle
import threading
import types
import warnings

import pytest
import torch
from conftest import TRACED
from patching import unchanged
from torch import nn

import comemo_kernels as ops
from comemo_kernels.patching import growing, media, patch, plain
from comemo_kernels.patching.replacement import Replacement


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, factor=1):
        return self.linear(x) * factor


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Scale(), Scale()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, factor=2)
        return x


def faster(call, x, factor=1):
    """Marks its results by adding 100."""
    if len(x) > 3:
        return call.refuse("more than 3 rows", x, factor)
    return call.original(x, factor) + 100


def make_plan(plan):
    for layer in plan.model.layers:
        plan.replace(layer, faster, "adds 100")
        plan.leave(layer.linear, "it is called")


KIND = types.SimpleNamespace(
    NAME="a kind of these tests",
    recognise=lambda module: type(module) is Model,
    make_plan=make_plan,
)
X = torch.ones(1, 2)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(patch, "KNOWN", (KIND,))
    torch.manual_seed(0)
    return Model()


def is_patched(model):
    return all(type(vars(layer).get("forward")) is Replacement for layer in model.layers)


def test_a_block_patches_and_restores(model):
    before = model(X)
    with unchanged(model):
        with ops.patched(model):
            assert is_patched(model)
            assert not torch.equal(model(X), before)
        assert torch.equal(model(X), before)


def test_exceptions_restore(model):
    with unchanged(model), pytest.raises(KeyboardInterrupt), ops.patched(model):
        raise KeyboardInterrupt


def test_a_failed_installation_leaves_nothing(model, monkeypatch):
    install = Replacement.install

    def fail(self):
        if self.path == "layers.1":
            raise MemoryError
        install(self)

    monkeypatch.setattr(Replacement, "install", fail)
    with unchanged(model), pytest.raises(MemoryError):
        ops.patch(model)


def test_blocks_nest(model):
    with unchanged(model):
        with ops.patched(model) as outer:
            with ops.patched(model) as inner:
                assert inner.report() == outer.report()
            assert is_patched(model)
            with pytest.raises(ValueError, match="here"), ops.patched(model):
                raise ValueError("here")
            assert is_patched(model)
        assert not is_patched(model)


def test_patch_and_unpatch(model):
    with unchanged(model):
        ops.unpatch(model)  # of a model that is not patched
        ops.patch(model)
        ops.patch(model)
        with ops.patched(model):
            pass
        assert is_patched(model)
        ops.unpatch(model)
        assert not is_patched(model)
        with ops.patched(model):
            ops.unpatch(model)
            assert not is_patched(model)


def test_one_object_serves_several_blocks(model):
    with unchanged(model):
        handle = ops.patched(model)
        for _ in range(2):
            with handle:
                assert is_patched(model)
            assert not is_patched(model)


def test_threads_restore_it_when_the_last_one_ends(model):
    wanted = {}
    with ops.patched(model):
        wanted = model(X)
    start, wrong = threading.Barrier(4), []

    def run():
        start.wait()
        for _ in range(50):
            with ops.patched(model):
                if not torch.equal(model(X), wanted):
                    wrong.append(1)

    with unchanged(model):
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def reload(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("double", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), reload])
def test_copies_are_models_of_their_own(model, double):
    unpatched = model(X)
    with ops.patched(model):
        other = double(model)
        marked = model(X)
        for layer in model.layers:
            layer.linear.weight.data.mul_(2)  # of the first alone
        assert torch.equal(other(X), marked)
    assert is_patched(other)
    assert [layer.forward.module for layer in other.layers] == list(other.layers)
    ops.unpatch(other)
    assert torch.equal(other(X), unpatched)


def test_the_state_dict_is_the_same(model):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with ops.patched(model):
        after = model.state_dict()
        model.load_state_dict(before)
        assert list(after) == list(before)
        assert all(torch.equal(after[name], t) for name, t in before.items())
        model.double()
        assert model(X.double()).dtype == torch.float64


def test_signatures_stay(model):
    with ops.patched(model):
        signature = inspect.signature(model.layers[0].forward)
    assert signature == inspect.signature(model.layers[0].forward)


def test_a_wrapper_around_ours_stays_when_we_leave(model):
    unpatched = model(X)
    ran = []
    ops.patch(model)
    ours = model.layers[0].forward

    def wrapper(*args, **kwargs):
        ran.append(1)
        return ours(*args, **kwargs)

    model.layers[0].forward = wrapper
    ops.unpatch(model)
    assert torch.equal(model(X), unpatched)
    assert ran


def test_a_forward_that_was_replaced_before_is_left(model):
    model.layers[0].forward = lambda x, factor: x
    with ops.patched(model) as handle:
        assert handle.report().left["layers.0"] == "its forward was replaced before"
        assert list(handle.report().replaced) == ["layers.1.forward"]


@TRACED
def test_compiles(model):
    with ops.patched(model):
        wanted = model(X)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(X), wanted)


def test_a_wrapped_model_is_found(model):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    wrapper = Wrapper(model)
    with ops.patched(wrapper):
        assert is_patched(model)
    ops.patch(model)
    ops.unpatch(wrapper)
    assert not is_patched(model)


def test_reports(model):
    with ops.patched(model) as handle:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model(torch.ones(4, 2))
            model(torch.ones(4, 2))
        report = handle.report()
    assert [str(w.message) for w in seen] == [
        f"layers.{i}: ran the model's own forward: more than 3 rows" for i in range(2)
    ]
    assert all(w.category is ops.PatchWarning for w in seen)
    assert report.kind == KIND.NAME
    assert report.replaced == {f"layers.{i}.forward": "adds 100" for i in range(2)}
    assert report.left == {f"layers.{i}.linear": "it is called" for i in range(2)}
    assert report.refused == {f"layers.{i}.forward": {"more than 3 rows": 2} for i in range(2)}
    text = str(report)
    assert "2 x layers.*.forward: adds 100" in text
    assert "2 x layers.1.forward: more than 3 rows" in text
    assert ops.patched(model).report().replaced == report.replaced  # before it is patched


def test_an_unknown_model_is_a_type_error():
    known = "CoMemoChatModel.*InternVL.*Mllama.*open_flamingo"
    with pytest.raises(TypeError, match=f"got Linear; known are: .*{known}"):
        ops.patched(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got int"):
        ops.patch(3)


class TestGrowing:
    def test_grows_as_cat(self):
        old, wanted = torch.randn(2, 3, 5, 4), None
        wanted = grown = old
        for _ in range(200):
            new = torch.randn(2, 3, 1, 4)
            grown, wanted = growing.append(grown, new), torch.cat([wanted, new], 2)
        assert torch.equal(grown, wanted)

    def test_does_not_copy_for_every_token(self):
        grown = growing.append(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 1, 4))
        more = growing.append(grown, torch.randn(1, 1, 1, 4))
        assert more.data_ptr() == grown.data_ptr()

    def test_branches_keep_what_they_had(self):
        begin = growing.append(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 1, 4))
        first, second = (torch.full((1, 1, 1, 4), value) for value in (1.0, 2.0))
        branches = [growing.append(begin, new) for new in (first, second)]
        for branch, new in zip(branches, (first, second), strict=True):
            assert torch.equal(branch, torch.cat([begin, new], 2))

    def test_modes_mix(self):
        with torch.inference_mode():
            begin = growing.append(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 1, 4))
        new = torch.randn(1, 1, 1, 4)
        assert torch.equal(growing.append(begin, new), torch.cat([begin, new], 2))
        learned = new.clone().requires_grad_()
        growing.append(new, learned).sum().backward()
        assert torch.equal(learned.grad, torch.ones_like(new))


class TestKeptMedia:
    def test_computes_once_until_something_changes(self):
        owner, weight = nn.Linear(2, 2), torch.ones(2)
        features, calls = torch.randn(3, 2), []

        def compute():
            calls.append(1)
            return features.sum()

        def get():
            return media.keep_while_alive(features, owner, [weight], compute)

        assert get() is get()
        assert len(calls) == 1
        weight.add_(1)
        assert get() is get()
        assert len(calls) == 2
        features.mul_(2)
        get()
        assert len(calls) == 3
        media.keep_while_alive(features, nn.Linear(2, 2), [weight], compute)
        assert len(calls) == 4

    def test_nothing_outlives_the_media(self):
        features = torch.randn(3, 2)
        media.keep_while_alive(features, self, [], lambda: [1])
        count = len(media._kept)
        del features
        assert len(media._kept) == count - 1

    def test_nothing_is_kept_with_gradients(self):
        features, calls = torch.randn(3, 2, requires_grad=True), []
        for _ in range(2):
            media.keep_while_alive(features, self, [], lambda: calls.append(1))
        assert len(calls) == 2


class FirstRMSNorm(nn.Module):
    offset = 0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.variance_epsilon = 1e-5

    def forward(self, x):
        exact = x.float()
        normed = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return (self.weight + self.offset) * normed.to(x.dtype)


class SecondRMSNorm(FirstRMSNorm):
    offset = 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_recognised_by_what_they_compute(dtype):
    plain._norms.clear()
    assert plain.is_rms_norm(FirstRMSNorm().to(dtype))
    assert not plain.is_rms_norm(SecondRMSNorm().to(dtype))


def test_parametrized_modules_are_not_plain():
    linear = nn.Linear(2, 2, bias=False)
    assert plain.is_plain(linear)
    nn.utils.parametrizations.weight_norm(linear)
    assert not plain.is_plain(linear)
