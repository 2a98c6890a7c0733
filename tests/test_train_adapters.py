"""Adapters: what they compute, train, save, load and become when they are merged."""

import copy
import json
import os

import pytest
import torch
from conftest import SLOW, every_two, here
from safetensors.torch import load_file, save_file
from small import make_prompts
from stage_models import adapted_model, shift, small, source, trained  # noqa: F401

import comemo
from comemo.train.models.adapters import add_adapters, load_adapters, merge_adapters, save_adapters
from comemo.train.models.drop_path import set_drop_path
from comemo.train.models.freezing import choose_trainable, is_adapter, part_of
from comemo.train.settings import LoraSettings, StageSettings

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
GATES = ("attn_gate", "mlp_gate")


def gradients(model, batch):
    """By name, of the loss on a batch."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    return {name: w.grad for name, w in model.named_parameters() if w.requires_grad}


EVERYTHING = ("projector", "mixin", "language")
FEW = [
    ((2, 3, 4), ("projector",), False, None),
    ((0, 3, 0), EVERYTHING, True, 8),
    ((0, 0, 2), (), False, 8),
    ((2, 0, 0), ("projector",), True, None),
]
RANKS = [(2, 0, 0), (0, 3, 0), (0, 0, 2), (2, 3, 4)]
COMBINATIONS = FEW + [
    pytest.param(*case, marks=SLOW)
    for case in every_two(RANKS, [(), ("projector",), EVERYTHING], [False, True], [None, 8])
    if isinstance(case, tuple) and tuple(case) not in FEW and len(case) == 4
]


@pytest.mark.parametrize(("ranks", "parts", "freeze_gates", "alpha"), COMBINATIONS)
def test_adapters_are_saved_loaded_and_merged(
    source, small, tmp_path, ranks, parts, freeze_gates, alpha
):
    vision, language, mixin = ranks
    lora = LoraSettings(vision=vision, language=language, mixin=mixin, alpha=alpha)
    batch = make_prompts(small)
    plain = small(**batch).logits
    assert add_adapters(small, lora, seed=1) is small
    assert torch.equal(small(**batch).logits.argmax(-1), plain.argmax(-1))
    assert torch.allclose(small(**batch).logits, plain, atol=1e-5)
    stage = StageSettings(train=parts, freeze_gates=freeze_gates, lora=lora)
    choose_trainable(small, stage)
    names = trained(small)
    adapted = {part for part in ("vision", "language", "mixin") if getattr(lora, part)}
    assert {part_of(name) for name in names if is_adapter(name)} == adapted
    gates = {name for name in names if name.endswith(GATES)}
    assert bool(gates) == (not freeze_gates and ("mixin" in parts or mixin > 0))
    rest = {part_of(n) for n in names if not is_adapter(n) and n not in gates}
    assert rest == set(parts) - adapted
    shift(small)
    changed = small(**batch).logits
    assert (changed - plain).abs().max() > 0.01
    save_adapters(small, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "trained.safetensors",
    ]
    other = copy.deepcopy(source)
    load_adapters(other, tmp_path / "adapter")
    assert torch.allclose(other(**batch).logits, changed, atol=1e-5)
    load_adapters(other, tmp_path / "adapter")  # again, over the same
    assert merge_adapters(other) is other
    assert torch.allclose(other(**batch).logits, changed, atol=1e-4)
    assert [type(m) for m in other.modules()] == [type(m) for m in source.modules()]
    other.save_pretrained(tmp_path / "merged")
    merged = comemo.CoMemoForConditionalGeneration.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    ).to(here())
    assert torch.allclose(merged(**batch).logits, changed, atol=1e-4)
    names = load_file(tmp_path / "merged" / "model.safetensors")
    assert "vision_model.encoder.layers.0.attn.qkv.weight" in names


def test_seeds_and_dtypes_of_adapters(source):
    lora, state = LoraSettings(language=2), torch.random.get_rng_state()
    first, again, other = (
        add_adapters(copy.deepcopy(source).to(torch.bfloat16), lora, seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [{n: w for n, w in m.named_parameters() if is_adapter(n)} for m in (first, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(w, dict(other.named_parameters())[n]) for n, w in weights[0].items())
    assert {weight.dtype for weight in weights[0].values()} == {torch.float32}
    batch = make_prompts(first)
    assert first(**batch).logits.dtype == torch.bfloat16


def test_an_adapted_model_generates_like_the_merged_one(small):
    model = adapted_model(small)
    batch = make_prompts(model)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**batch, **options, output_logits=True)
    second = merge_adapters(model).generate(**batch, **options, output_logits=True)
    for one, other in zip(first.logits, second.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.slow
def test_peft_reads_the_directory(source, small, tmp_path):
    from peft import PeftModel

    model = adapted_model(small, train=(), freeze_gates=True)
    save_adapters(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(source), tmp_path)
    batch = make_prompts(model)
    assert torch.allclose(theirs(**batch).logits, model(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("train", [("projector",), pytest.param(("vision", "mixin"), marks=SLOW)])
def test_gradient_checkpointing_gives_the_same_gradients(small, train):
    """A frozen language model, adapters in it, and stochastic depth at once."""
    lora = LoraSettings(language=2, vision=2, mixin=0 if "mixin" in train else 2)
    model = adapted_model(small, lora, train=train).train()
    set_drop_path(model, 0.3)
    batch = make_prompts(model)
    wanted = gradients(model, batch)
    model.gradient_checkpointing_enable()
    found = gradients(model, batch)
    assert [name for name, grad in wanted.items() if grad is None] == []
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(wanted[name], found[name], atol=1e-6) for name in wanted)


@pytest.mark.slow
@pytest.mark.no_virtual_gpu("processes on the CPU")
def test_every_trained_weight_takes_part_in_data_parallel_training(small, tmp_path):
    """Otherwise the second step raises."""
    model = adapted_model(small, train=("vision", "projector", "mixin")).train()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        batch = make_prompts(model)
        for _ in range(2):
            loss = parallel(**batch, labels=batch["input_ids"], use_cache=False).loss
            loss.backward()
        assert loss.isfinite()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({}, "must have a rank above 0"),
        ({"vision": -1}, "lora.vision: must be a rank"),
        ({"mixin": 1.5}, "lora.mixin: must be a rank"),
        ({"language": 2, "alpha": 0}, "lora.alpha"),
        ({"language": 2, "alpha": "2r"}, "lora.alpha"),
        ({"language": 2, "dropout": 1.0}, "lora.dropout"),
    ],
)
def test_wrong_adapters(small, lora, words):
    with pytest.raises(ValueError, match=words):
        add_adapters(small, LoraSettings(**lora), seed=0)
    assert not any(map(is_adapter, small.state_dict()))


def test_what_needs_adapters_or_none(small, tmp_path):
    for call in (merge_adapters, lambda model: save_adapters(model, tmp_path / "a")):
        with pytest.raises(ValueError, match="must have adapters, got none"):
            call(small)
    model = adapted_model(small)
    with pytest.raises(ValueError, match="must have no adapters"):
        add_adapters(model, LoraSettings(vision=1), seed=0)
    next(w for n, w in model.named_parameters() if is_adapter(n)).data.fill_(torch.nan)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="must be finite"):
        merge_adapters(model)
    after = model.state_dict()
    assert all(torch.equal(after[n].nan_to_num(), w.nan_to_num()) for n, w in before.items())


def test_wrong_files_of_adapters_change_nothing(source, small, tmp_path):
    save_adapters(adapted_model(small), tmp_path)
    config, adapter = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    rest, content = tmp_path / "trained.safetensors", json.loads(config.read_text())
    weights, other = load_file(adapter), load_file(rest)
    some, name = dict(list(weights.items())[1:]), next(iter(weights))

    def write(of_config=None, of_adapter=None, of_rest=None):
        config.write_text(json.dumps(content if of_config is None else of_config))
        save_file(weights if of_adapter is None else of_adapter, adapter)
        save_file(other if of_rest is None else of_rest, rest)

    faults = [
        ({"of_config": []}, "JSON object"),
        ({"of_config": content | {"peft_type": "IA3"}}, "differs in ..peft_type"),
        ({"of_config": content | {"use_dora": True}}, "differs in ..use_dora"),
        ({"of_config": content | {"target_modules": ["q_proj"]}}, "differs in ..target_modules"),
        ({"of_config": content | {"rank_pattern": {}}}, "must have a rank above 0"),
        ({"of_config": content | {"alpha_pattern": {}}}, "save_adapters"),
        ({"of_adapter": some}, "adapter_model.safetensors .* missing"),
        ({"of_adapter": weights | {name: torch.zeros(1)}}, "of another shape"),
        ({"of_adapter": weights | {"x": torch.zeros(1)}}, "unexpected"),
        ({"of_rest": {"x": torch.zeros(1)}}, "trained.safetensors .* unexpected"),
        ({"of_rest": {"lm_head.weight": torch.zeros(1)}}, "trained.safetensors .* another shape"),
    ]
    model = copy.deepcopy(source)
    for fault, words in faults:
        write(**fault)
        with pytest.raises(ValueError, match=words):
            load_adapters(model, tmp_path)
    write()
    adapter.write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapters(model, tmp_path)
    config.unlink()
    with pytest.raises(ValueError, match="complete adapter_config"):
        load_adapters(model, tmp_path)
    assert model.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(w, source.state_dict()[n]) for n, w in model.state_dict().items())
