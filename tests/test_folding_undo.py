"""Undo of a fold, models that cannot be folded, and what a folded model refuses."""

import pytest
import torch
from small import logits_of, make_model, make_prompts

from comemo.weights import folding


@pytest.fixture
def model():
    return make_model()


def layers_of(model):
    return model.model.language_model.layers


def state(model):
    """All that folding may change: weights, their addresses, and attributes of modules."""
    weights = {name: (t.clone(), t.data_ptr()) for name, t in model.state_dict().items()}
    return weights, {name: set(vars(module)) for name, module in model.named_modules()}


def shared(weights):
    """For each weight the first one with the same address."""
    first = {}
    return [first.setdefault(address, name) for name, (_, address) in weights.items()]


def assert_state(model, before):
    (weights, held), (wanted, wanted_held) = state(model), before
    assert list(weights) == list(wanted)
    assert shared(weights) == shared(wanted)
    for name, (tensor, address) in weights.items():
        assert torch.equal(tensor, wanted[name][0]), name
        # Weights of a GPU were copied to the CPU and back.
        assert address == wanted[name][1] or tensor.is_cuda, name
    assert held == wanted_held


@pytest.mark.parametrize("keep_on", ["cpu", torch.device("cpu"), None])
def test_undo_restores_everything(model, keep_on):
    before, prompts = state(model), make_prompts(model)
    logits = logits_of(model, prompts)
    decoder = model.model.language_model
    folded = model.fold_for_inference(keep_on)
    assert folded.active
    plain = [decoder.embed_tokens, *(layer.self_attn.o_proj for layer in decoder.layers)]
    plain += [layer.mlp.down_proj for layer in decoder.layers]
    whole = [*decoder.parameters(), model.lm_head.weight]
    assert folded.nbytes == sum(t.nbytes for t in whole) - sum(m.weight.nbytes for m in plain)
    folded.undo()
    assert_state(model, before)
    assert not folded.active
    assert folded.nbytes == 0
    assert torch.equal(logits_of(model, prompts), logits)
    with pytest.raises(ValueError, match=r"^undo: .*undone already"):
        folded.undo()
    with model.fold_for_inference(keep_on):
        pass
    assert_state(model, before)


def test_a_with_block_undoes_the_fold(model):
    before = state(model)
    with model.fold_for_inference() as folded:
        assert folded.active
    assert_state(model, before)
    with pytest.raises(KeyError), model.fold_for_inference():
        raise KeyError
    assert_state(model, before)
    with model.fold_for_inference() as folded:
        folded.undo()
    assert_state(model, before)


def test_undo_after_a_conversion(model):
    wanted = {name: t.bfloat16() for name, t in model.state_dict().items()}
    folded = model.fold_for_inference()
    model.bfloat16()
    folded.undo()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("count", [0, 1, 7, 20, 33])
def test_an_error_during_folding_changes_nothing(model, monkeypatch, count):
    before, replace, left = state(model), folding.FoldedModel._replace, [count]

    def failing(*args):
        left[0] -= 1
        return replace(*args) if left[0] >= 0 else 1 / 0

    monkeypatch.setattr(folding.FoldedModel, "_replace", failing)
    with pytest.raises(ZeroDivisionError):
        model.fold_for_inference()
    assert_state(model, before)


def test_an_error_during_concatenation_changes_nothing(model, monkeypatch):
    before, cat, left = state(model), torch.cat, [2]

    def failing(*args):
        left[0] -= 1
        return cat(*args) if left[0] >= 0 else 1 / 0

    monkeypatch.setattr(torch, "cat", failing)
    with pytest.raises(ZeroDivisionError):
        model.fold_for_inference()
    assert_state(model, before)


def test_products_must_be_finite():
    model = make_model(torch.float16)
    mixin = layers_of(model)[3].mixin
    mixin.mlp_norm.weight.fill_(6e4)
    mixin.mlp.up_proj.weight[3, 3] = 9.0
    before = state(model)
    message = r"weight of a LlamaRMSNorm must be finite in torch.float16, got up to 9 times 6e\+04"
    with pytest.raises(ValueError, match=f"^fold_for_inference: products with {message}"):
        model.fold_for_inference()
    assert_state(model, before)


# --- errors ---


class Adapter(torch.nn.Linear):
    pass


def adapt(model):
    layers_of(model)[1].self_attn.k_proj = Adapter(64, 32, bias=False)


def hook(model):
    layers_of(model)[1].mixin.kv_proj.register_forward_hook(lambda *_: None)


def offload_gate(model):
    gate = torch.nn.Parameter(torch.ones(1, device="meta"), requires_grad=False)
    layers_of(model)[1].mixin.attn_gate = gate


def quantise(model):
    model.lm_head.weight.data = model.lm_head.weight.data.to(torch.float8_e4m3fn)


def tie(model):
    model.lm_head.weight = model.get_input_embeddings().weight


def share(model):
    layers_of(model)[1].mlp = layers_of(model)[0].mlp


def replace(model):
    layers_of(model)[0].mlp = torch.nn.Identity()


WRONG = {
    "folded twice": (lambda model: model.fold_for_inference(), "its projections: call undo"),
    "training": (lambda model: model.train(), "evaluation mode, got training"),
    "gradients": (lambda model: model.requires_grad_(True), "no gradients, got .* that does:"),
    "an adapter": (adapt, r"got .*1\.self_attn\.k_proj\.weight of a Adapter"),
    "a hook": (hook, r"got .*1\.mixin\.kv_proj\.weight of a Linear"),
    "offloaded": (lambda m: layers_of(m)[2].mlp.to("meta"), r"got .*2\.mlp\.gate_proj\.weight of"),
    "an offloaded gate": (offload_gate, r"mixin\.attn_gate: Parameter of torch.float32 on meta"),
    "quantised": (quantise, r"got lm_head\.weight: Parameter of torch\.float8_e4m3fn"),
    "tied": (tie, r"not tied, got \['model.*embed_tokens\.weight', 'lm_head\.weight'\]"),
    "a shared layer": (share, r"not tied, got .*layers\.0\.mlp.*layers\.1\.mlp"),
    "another network": (replace, "original modules: 'Identity'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_models_that_cannot_be_folded(model, case):
    change, message = WRONG[case]
    change(model)
    before = {name: t.data_ptr() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^fold_for_inference: .*{message}"):
        model.fold_for_inference()
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == before


def test_originals_cannot_be_kept_on_meta(model):
    with pytest.raises(ValueError, match=r"^fold_for_inference: keep_on .* got meta"):
        model.fold_for_inference("meta")


def test_a_folded_model_refuses_training_saving_and_loading(model, tmp_path):
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    with model.fold_for_inference():
        for whole in (model, model.model):
            with pytest.raises(ValueError, match=r"^save_pretrained: .* undo\(\)"):
                whole.save_pretrained(tmp_path / "folded")
        with pytest.raises(ValueError, match=r"^load_state_dict: .* undo\(\)"):
            model.load_state_dict(weights)
        with pytest.raises(ValueError, match=r"^train: .* undo\(\)"):
            model.train()
        assert not model.eval().training
    assert not (tmp_path / "folded").exists()
    model.save_pretrained(tmp_path / "own")
    again = type(model).from_pretrained(tmp_path / "own", dtype=torch.float32)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, weights[name].cpu()), name
    model.load_state_dict(weights)
    assert model.train().training
