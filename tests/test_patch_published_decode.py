"""Fused decode steps of a model that changes, or whose call is interrupted."""

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import virtual_gpu
from conftest import GPU, SLOW
from patching import unchanged
from published_steps import (  # noqa: F401
    GREEDY,
    TOKENS,
    assert_same,
    cache_of,
    compare,
    generate,
    made,
    model,
    place,
)
from torch import nn
from transformers import LogitsProcessor

import comemo_kernels as ops
from bench.published_model.chat_model import repair_generate
from comemo_kernels.patching.published_decode import Watch
from comemo_kernels.patching.published_step import DecodeStep

pytestmark = pytest.mark.usefixtures("one_thread")


class Acts(LogitsProcessor):
    """Does something once, between two steps."""

    def __init__(self, act):
        self.act, self.calls = act, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 5:
            self.act()
        return scores


@pytest.mark.parametrize(
    "path",
    [
        "attention.wo",
        pytest.param("", marks=SLOW),
        pytest.param("feed_forward.act_fn", marks=SLOW),
        pytest.param("ffn_norm", marks=SLOW),
    ],
)
def test_a_hook_between_two_steps_fires(model, made, place, path):
    layer = model.to(place).language_model.model.layers[1].decoder_layer
    calls, wanted = [], generate(repair_generate(copy.deepcopy(model)), (2, 1))
    module = layer.get_submodule(path)
    acts = Acts(lambda: module.register_forward_hook(lambda *_: calls.append(1)))
    with ops.patched(model):
        ours = generate(model, (2, 1), processor=lambda: acts)
    assert_same(ours, wanted)
    assert len(calls) == TOKENS - 5
    assert made[-1].fused == 4


def modules_of(model):
    """Modules that a step reads or replaces, by name."""
    found = {
        f"layers.1.{name}": module
        for name, module in model.language_model.model.layers[1].named_modules()
        if "to_kv" not in name
    }
    found |= {"norm": model.language_model.model.norm, "output": model.language_model.output}
    return found | {"model": model.language_model.model, "embedding": model.get_input_embeddings()}


@pytest.mark.slow
def test_modules_with_hooks_are_called(model, made):
    wanted = generate(repair_generate(copy.deepcopy(model)), (2, 1), max_new_tokens=3)
    with ops.patched(model):
        for name, module in modules_of(model).items():
            if "rotary_emb" in name or name == "embedding":
                continue
            calls = []
            hook = module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            assert_same(generate(model, (2, 1), max_new_tokens=3), wanted)
            hook.remove()
            assert len(calls) >= 3, name
            assert made[-1].fused == 0, name
        calls = []
        model.language_model.register_forward_hook(lambda *_: calls.append(1))
        assert_same(generate(model, (2, 1), max_new_tokens=3), wanted)
        assert (len(calls), made[-1].fused) == (3, 2)  # it is called, whatever it runs


def test_a_watch_sees_every_change(model):
    """Of every module: hooks, another forward, other children, weights and tables."""
    with ops.patched(model):
        watch = Watch(model.language_model)

        @contextlib.contextmanager
        def seen(what):
            assert not watch.sees_change(), what
            yield
            assert watch.sees_change(), what

        for name, module in modules_of(model).items():
            for register in ("register_forward_hook", "register_forward_pre_hook"):
                with seen((name, register)):
                    hook = getattr(module, register)(lambda *_: None)
                hook.remove()
            own = vars(module).get("forward")
            with seen((name, "forward")):
                module.forward = lambda *args: None
            del module.forward
            if own is not None:
                module.forward = own
            for kind in ("_modules", "_parameters", "_buffers"):
                for key, value in list(vars(module)[kind].items()):
                    if value is None:
                        continue
                    with seen((name, key)):
                        vars(module)[kind][key] = copy.copy(value)
                    vars(module)[kind][key] = value
            for parameter in module.parameters(recurse=False):
                data = parameter.data
                with seen((name, "data")):
                    parameter.data = data.clone()
                parameter.data = data
        with seen("class"):
            model.language_model.output.__class__ = type("Other", (nn.Linear,), {})
        model.language_model.output.__class__ = nn.Linear
        with seen("global"):
            hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
        hook.remove()
        assert not watch.sees_change()


@pytest.mark.parametrize(
    ("when", "error"),
    [
        (0, KeyboardInterrupt),
        (1, RuntimeError),
        ("replay", KeyboardInterrupt),
        pytest.param(0, RuntimeError, marks=SLOW),
        pytest.param(1, KeyboardInterrupt, marks=SLOW),
        pytest.param("replay", RuntimeError, marks=SLOW),
    ],
    ids=["warm-up", "capture", "replay"] * 2,
)
def test_an_interrupted_step_leaves_nothing(model, made, monkeypatch, virtual, when, error):
    if GPU:
        pytest.skip("there is a real one")
    with contextlib.ExitStack() as stack:
        if not virtual:
            stack.enter_context(virtual_gpu.present())
        model.to("cuda")
        steps, runs = [], []

        def run(self, own=DecodeStep.run):
            steps.append(weakref.ref(self))
            runs.append(1)
            if len(runs) - 1 == when:
                raise error("stop")
            own(self)

        def replay(self, own=virtual_gpu.Graph.replay):
            own(self)
            if when == "replay":
                raise error("stop")

        stack.enter_context(ops.patched(model))
        wanted = generate(model, (2, 1))
        with monkeypatch.context() as patch, unchanged(model):
            patch.setattr(DecodeStep, "run", run)
            patch.setattr(virtual_gpu.Graph, "replay", replay)
            with pytest.raises((error, ValueError), match="stop"):
                generate(model, (2, 1))
        gc.collect()
        assert steps
        assert all(step() is None for step in steps)
        assert_same(generate(model, (2, 1)), wanted)


@pytest.mark.slow
def test_nothing_outlives_a_call(model, made, place):
    with ops.patched(model.to(place)):
        found = []
        with pytest.MonkeyPatch.context() as patch:
            begin = DecodeStep.begin
            patch.setattr(
                DecodeStep,
                "begin",
                lambda self, *args: found.append(weakref.ref(self)) or begin(self, *args),
            )
            generate(model, (2, 1))
        gc.collect()
        assert [step() for step in found] == [None]


def test_threads_do_not_disturb_each_other(model, made, monkeypatch):
    grids = [[(2, 1)], [], [(1, 1), (1, 2)]]
    with ops.patched(model):
        wanted = [generate(model, *each) for each in grids]
        found = {}

        def run(i):
            found[i] = generate(model, *grids[i])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(grids))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, other in enumerate(wanted):
        assert_same(found[i], other)
    assert all(each.fused == TOKENS - 1 for each in made)
