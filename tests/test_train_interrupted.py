"""Changes of a model to train that an exception interrupts: all is done, or nothing."""

import copy
import os
import shutil

import pytest
import torch
from conftest import SLOW
from interrupting import count_moments, find_places, interrupt_after, interrupt_at
from safetensors.torch import load_file
from small import make_prompts
from stage_models import adapted_model, deep_model, shift, small, source  # noqa: F401

from comemo.train.models.adapters import add_adapters, load_adapters, merge_adapters, save_adapters
from comemo.train.models.drop_path import set_drop_path
from comemo.train.models.freezing import choose_trainable, is_adapter
from comemo.train.settings import LoraSettings, StageSettings

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")


def kept(model):
    """What must be as before: modules, weights, what is trained, hooks."""
    weights = {n: (w.clone(), w.requires_grad) for n, w in model.named_parameters()}
    hooks = {
        name: [(type(hook), vars(hook)) for hook in module._forward_hooks.values()]
        for name, module in model.named_modules()
    }
    return weights, {n: type(m) for n, m in model.named_modules()}, hooks


def assert_kept(model, before):
    weights, kinds, hooks = kept(model)
    assert kinds == before[1]
    assert hooks == before[2]
    assert weights.keys() == before[0].keys()
    for name, (weight, grad) in weights.items():
        assert grad == before[0][name][1], name
        assert torch.equal(weight, before[0][name][0]), name


@pytest.mark.parametrize("number", [3, pytest.param(150, marks=SLOW)])
@pytest.mark.parametrize(
    "verb", ["drop", "load", *(pytest.param(v, marks=SLOW) for v in ("choose", "add"))]
)
def test_interrupted_calls_leave_the_model_as_it_was(source, small, tmp_path, verb, number):
    save_adapters(adapted_model(small, LoraSettings(vision=1)), tmp_path)
    call = {
        "choose": lambda model: choose_trainable(model, StageSettings()),
        "drop": lambda model: set_drop_path(model, 0.1),
        "add": lambda model: add_adapters(model, LoraSettings(vision=1), seed=0),
        "load": lambda model: load_adapters(model, tmp_path),
    }[verb]
    fresh = deep_model(2) if verb == "drop" else source
    if verb == "drop":
        set_drop_path(fresh, 0.3)
    done = copy.deepcopy(fresh)
    last = count_moments(lambda: call(done)) - 1
    before, after = kept(fresh), kept(done)
    evenly = {round(last * i / number) for i in range(number)}
    for moments in evenly | {last - back for back in (0, 8, 80) if back <= last}:
        model = copy.deepcopy(fresh)
        assert interrupted(lambda: call(model), moments)  # noqa: B023
        assert_kept(model, before if same(model, before) else after)


def interrupted(call, moments):
    """See `interrupt_after`; safetensors turns an exception into one of its own."""
    try:
        return interrupt_after(call, moments)
    except ValueError as error:
        if "could not determine the shape" not in str(error):
            raise
        return True


def same(model, before):
    try:
        assert_kept(model, before)
    except AssertionError:
        return False
    return True


FILES = ("adapters.py", "adapter_layers.py", "drop_path.py", "freezing.py")


@pytest.mark.slow
def test_an_interrupted_merge_is_completed_by_another(small):
    model = adapted_model(small, LoraSettings(vision=1), train=())
    batch = make_prompts(model)
    wanted = model(**batch).logits
    places = find_places(lambda: merge_adapters(copy.deepcopy(model)))
    for place in [p for p in places if p.file in FILES]:
        other = copy.deepcopy(model)
        interrupt_at(lambda: merge_adapters(other), place)  # noqa: B023
        assert torch.allclose(other(**batch).logits, wanted, atol=1e-4)
        if any(map(is_adapter, other.state_dict())):
            merge_adapters(other)
        assert torch.allclose(other(**batch).logits, wanted, atol=1e-4)


@pytest.mark.slow
def test_interrupted_saving_leaves_whole_adapters_or_none(source, small, tmp_path):
    model = adapted_model(small, LoraSettings(vision=1))
    save_adapters(model, tmp_path)
    names, first = sorted(os.listdir(tmp_path)), load_file(tmp_path / "adapter_model.safetensors")
    shift(model)
    last = count_moments(lambda: save_adapters(model, tmp_path / "other")) - 1
    second = load_file(tmp_path / "other" / "adapter_model.safetensors")
    whole = []
    for moments in range(max(last - 60, 0), last):
        folder = tmp_path / str(moments)
        shutil.copytree(tmp_path, folder, ignore=lambda path, names: set(names) - set(FILES_OF))
        interrupted(lambda: save_adapters(model, folder), moments)  # noqa: B023
        assert {*os.listdir(folder), "adapter_config.json"} == set(names)
        if (folder / "adapter_config.json").exists():
            found = load_file(folder / "adapter_model.safetensors")
            whole.append(
                [all(torch.equal(w[n], x) for n, x in found.items()) for w in (first, second)]
            )
            assert any(whole[-1])
    assert [True, False] in whole


FILES_OF = ("adapter_config.json", "adapter_model.safetensors", "trained.safetensors")
