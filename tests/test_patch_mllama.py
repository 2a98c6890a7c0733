"""Mllama of transformers under our operations: the same numbers in every kind of call."""

import contextlib
import copy

import pytest
import torch
import virtual_gpu
from conftest import GPU, SLOW, TRACED, every_two, here
from harness import assert_relative
from mllama_models import CACHE, STATIC, TILES, prompt_of, tiny_mllama, two_steps
from patching import assert_patched_matches, gradients, unchanged
from transformers import DynamicCache

import comemo_kernels as ops
from comemo_kernels.patching.mllama_mask import SEEN

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*hidden_state.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def built():
    return tiny_mllama()


@pytest.fixture
def model(built):
    return copy.deepcopy(built)


def generate(model, prompt, **options):
    return model.generate(**prompt, **{"max_new_tokens": 6, "do_sample": False} | options)


def refusals(patch):
    return {reason for reasons in patch.report().refused.values() for reason in reasons}


@pytest.mark.parametrize(
    ("dtype", "kind", "batch"),
    every_two([torch.float32, torch.bfloat16], ["runs", "holes", "all"], [1, 2]),
)
def test_logits_err_no_more(model, dtype, kind, batch):
    model.to(dtype)
    with torch.no_grad(), unchanged(model):
        assert_patched_matches(model, lambda one, factor: two_steps(one, kind, batch, factor))


def test_float64(model):
    """Nearer to the truth than transformers, whose RMSNorm is float32 in any dtype."""
    model.double()
    with torch.no_grad():
        plain = two_steps(model, "runs", 2)
        with ops.patched(model):
            ours = two_steps(model, "runs", 2)
    for name, logits in ours.items():
        assert logits.dtype == torch.float64
        assert_relative(logits, plain[name], name)


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [("runs", True), ("holes", False), pytest.param("runs", False, marks=SLOW)],
)
def test_trains_the_same(model, kind, checkpointing):
    """A step of a trainer: both layouts of the keys, silent rows, gradients of all parameters."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def run(one, factor):
        logits = one(**prompt_of(kind, factor=factor), use_cache=False).logits
        return {"logits": logits} | gradients(one, logits)

    assert_patched_matches(model, run)


def test_gradients_with_a_cache(model):
    def run(one, factor):
        logits = one(**prompt_of(factor=factor), use_cache=True).logits
        return gradients(one, logits)

    assert_patched_matches(model, run)


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize(("name", "kind"), every_two(GENERATE, ["runs", "holes"])[:7])
def test_generates_the_same(model, name, kind):
    if name == "static" and not STATIC:
        pytest.skip("this release of transformers cannot")
    results = []
    # Transformers keeps a static cache in the model.
    with contextlib.nullcontext() if name == "static" else unchanged(model):
        torch.manual_seed(1)
        results.append(generate(model, prompt_of(kind), **GENERATE[name]))
        with ops.patched(model) as patch:
            torch.manual_seed(1)
            results.append(generate(model, prompt_of(kind), **GENERATE[name]))
    assert torch.equal(*results)
    assert not refusals(patch)


def both(model, run):
    """What the model returns unpatched and patched, without gradients; and the patch."""
    with torch.no_grad():
        plain = run(model)
        with ops.patched(model) as patch:
            return plain, run(model), patch


def test_drafts_are_verified_the_same(model):
    """Several tokens at a time, as in assisted decoding, which crops the images in the cache."""
    prompt = prompt_of("runs", 1)

    def run(m):
        cache, tokens = DynamicCache(config=m.config), prompt["input_ids"]
        first = prompt | {name: prompt[name][:, :4] for name in ("input_ids", "attention_mask")}
        mask = prompt["cross_attention_mask"]
        m(**first | {"cross_attention_mask": mask[:, :4]}, **{CACHE: cache})
        rest = {"input_ids": tokens[:, 4:], "attention_mask": prompt["attention_mask"]}
        return m(**rest, cross_attention_mask=mask, **{CACHE: cache}).logits

    plain, ours, patch = both(model, run)
    assert_relative(ours, plain)
    assert not refusals(patch)


def two_turns(model):
    cache, first, second = DynamicCache(config=model.config), prompt_of("all", 1, 6, 1), None
    first["cross_attention_mask"][:, :2] = 0
    model(**first, **{CACHE: cache})
    second = prompt_of("all", 1, 5, 1)
    mask = torch.zeros(1, 11, 2, TILES, dtype=torch.long, device=here())
    mask[:, 2:6, 0, :3] = mask[:, 7:, 1, :2] = mask[:, 9:, 0] = 1
    second |= {"cross_attention_mask": mask, "attention_mask": torch.ones_like(mask[:, :, 0, 0])}
    return model(**second, **{CACHE: cache}).logits


def test_a_second_turn_adds_images(model):
    plain, ours, patch = both(model, two_turns)
    assert_relative(ours, plain)
    assert not refusals(patch)


def test_prompts_without_images(model):
    prompt = prompt_of("all")
    prompt = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    plain, ours, patch = both(model, lambda m: generate(m, prompt))
    assert torch.equal(plain, ours)
    assert not refusals(patch)


@pytest.mark.skipif(GPU, reason="counts on a virtual one")
def test_one_sync_for_all_layers(monkeypatch, virtual):
    reads = []
    with contextlib.nullcontext() if virtual else virtual_gpu.present():
        model = tiny_mllama()
        prompt = prompt_of()
        given = {name: prompt[name] for name in ("input_ids", "cross_attention_mask")}
        given["cross_attention_states"] = torch.randn(16, 5, 64, device="cuda")
        with torch.no_grad(), ops.patched(model):
            for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero"):
                read = getattr(torch.Tensor, name)

                def count(tensor, read=read, name=name):
                    outer = not reads or reads[-1] != "inside"  # the virtual GPU calls it again
                    reads.extend([name, "inside"] if outer else [])
                    found = read(tensor)
                    if outer:
                        reads.pop()
                    return found

                monkeypatch.setattr(torch.Tensor, name, count)
            model(**given)
            monkeypatch.undo()
    assert reads == ["tolist"]


def test_autocast(model):
    def run(m):
        with torch.autocast(here(), torch.bfloat16):
            return generate(m, prompt_of(), output_scores=True, return_dict_in_generate=True)

    plain, ours, patch = both(model, run)
    assert torch.equal(plain.sequences[:, 7:9], ours.sequences[:, 7:9])
    assert ours.scores[0].dtype == plain.scores[0].dtype
    assert not refusals(patch)


# --- what is refused ---


@pytest.mark.parametrize("wanted", [False, True], ids=["not wanted", "wanted"])
def test_weights_of_attention(wanted):
    model = tiny_mllama("eager")

    def run(m):
        return m(**prompt_of(), output_attentions=wanted, output_hidden_states=True)

    plain, ours, patch = both(model, run)
    assert_relative(ours.logits, plain.logits)
    for one, other in zip(ours.hidden_states, plain.hidden_states, strict=True):
        assert_relative(one, other)
    for one, other in zip(ours.attentions or (), plain.attentions or (), strict=True):
        assert_relative(one, other)
    assert len(ours.attentions or ()) == 4 * wanted
    reason = "eager attention returns weights, which are read"
    assert refusals(patch) == ({reason} if wanted else set())


def without_mask(model):
    prompt = prompt_of()
    del prompt["cross_attention_mask"]
    return generate(model, prompt)


def dense(model):
    shown = torch.rand(2, 1, 7, 40, device=here()) < 0.5
    text = model.model.language_model
    states = torch.linspace(-1, 1, 2 * 40 * 64, device=here()).view(16, 5, 64)
    prompt = prompt_of()
    return text(
        input_ids=prompt["input_ids"],
        cross_attention_states=states,
        cross_attention_mask=torch.where(shown, 0.0, -1e9),
        full_text_row_masked_out_mask=torch.arange(7.0, device=here()).view(1, 1, 7, 1) % 2,
    ).last_hidden_state


def hooked(model):
    layer = model.model.language_model.layers[3]
    found = []
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs), with_kwargs=True
    )
    logits = model(**prompt_of()).logits
    handle.remove()
    assert found[0]["cross_attention_mask"].shape == (2, 1, 7, 40)
    assert SEEN not in found[0]
    return logits


def of_another_scale(model):
    model.model.language_model.layers[1].cross_attn.scaling = 0.1
    return model(**prompt_of()).logits


REFUSED = {
    "without_mask": (without_mask, "the implementation decides"),
    "dense": (dense, "dense mask"),
    "hooked": (hooked, "a hook reads the arguments of a layer"),
    "of_another_scale": (of_another_scale, "scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_calls_run_the_models_own_code(model, name):
    run, reason = REFUSED[name]
    with pytest.warns(ops.PatchWarning, match=reason):
        plain, ours, patch = both(model, lambda m: (torch.manual_seed(2), run(m))[1])
    assert_relative(ours.float(), plain.float())
    assert any(reason in told for told in refusals(patch))
    assert reason in str(patch.report())


def test_dropout_is_refused():
    model = tiny_mllama(dropout=0.1).train()
    with pytest.warns(ops.PatchWarning, match="dropout"):
        plain, ours, _ = both(model, lambda m: (torch.manual_seed(2), m(**prompt_of()).logits)[1])
    assert_relative(ours, plain)


@pytest.mark.parametrize("part", ["images", "tokens"])
def test_a_mask_that_does_not_fit(model, part):
    prompt = prompt_of()
    mask = prompt["cross_attention_mask"]
    prompt["cross_attention_mask"] = mask[:, :, :1] if part == "images" else mask[:, :4]
    for patch in (contextlib.nullcontext(), ops.patched(model)):
        with (
            unchanged(model),
            patch,
            pytest.raises((RuntimeError, IndexError, ValueError)) as told,
        ):
            model(**prompt)
    if part == "images":
        told.match("cross_attention_mask must be for 40 vision tokens, got one for 20")


# --- torch.compile ---


@pytest.mark.slow
@TRACED
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiles_whole(model, training):
    prompt = prompt_of("holes")
    with torch.set_grad_enabled(training):
        plain = model(**prompt).logits
        with ops.patched(model) as patch:
            torch._dynamo.reset()
            ours = torch.compile(model, backend="eager", fullgraph=True)(**prompt).logits
    assert_relative(ours, plain)
    assert not refusals(patch)
