"""Weights of 8 and 4 bits: products, loading, saving, and the ways to ask nano with them."""

import copy
import importlib.util
import json
import subprocess
import sys

import httpx
import pytest
import torch
from nano_words import by_chat, by_generate, by_session, load, pictures_of, read_record
from servers import NAME, drawn, ready_nano, serving
from torch import nn

import comemo
from comemo import nano
from comemo.cli.main import main
from comemo.memory.parts import memory_settings, memory_weights
from comemo.store.keys import identify_model, stamp_model
from comemo.weights import quantising
from comemo.weights.fusable import is_fusable
from comemo.weights.quantised import FEW_ROWS, QuantisedLinear, multiply, speed_up
from comemo.weights.quantising import chosen_weights, quantisation

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("weights of torchao on a CPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
if importlib.util.find_spec("torchao") is None:
    pytest.skip("torchao is not installed: pip install torchao", allow_module_level=True)

from torchao.prototype.quantization.int4.inference_workflow import (  # noqa: E402
    PrototypeInt4WeightOnlyConfig,
)
from torchao.quantization import (  # noqa: E402
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from transformers import AutoModelForImageTextToText, TorchAoConfig  # noqa: E402

KEPT = {"set_inductor_config": False}
CONFIGS = {
    "int8": Int8WeightOnlyConfig(**KEPT),
    "int4": PrototypeInt4WeightOnlyConfig(group_size=32, **KEPT),
}
ROUNDING = 2**-7  # relative, of activations and results in bfloat16
ERRORS = {"int8": 0.05, "int4": 0.3}  # of logits of random tokens, measured 0.027 and 0.175
CASES = read_record()["cases"]
FEW = [*CASES[:2], CASES[-2]]
DIFFER = {"int8": 0, "int4": 3}  # of the recorded answers, at most


def linear(dtype=torch.float32, bits="int8", wide=96, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(wide, 48, bias=bias).to(dtype).requires_grad_(False)
    quantize_(layer, CONFIGS[bits])
    return speed_up(nn.Sequential(layer))[0]


@pytest.fixture(scope="module")
def seeing():
    return load()


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(request):
    """The number of bits, model and processor."""
    kind, path = comemo.CoMemoForConditionalGeneration, nano.checkpoint()
    chosen = chosen_weights(request.param, path)
    model = kind.from_pretrained(path, dtype=torch.float32, **chosen).requires_grad_(False)
    return request.param, model, comemo.CoMemoProcessor.from_pretrained(path)


# --- products ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", CONFIGS)
@pytest.mark.parametrize("shape", [(96,), (1, 1, 96), (2, FEW_ROWS, 96), (0, 96)], ids=str)
def test_products_are_those_of_torchao(shape, bits, dtype):
    layer = linear(dtype, bits)
    x = torch.randn(shape, dtype=dtype)
    found = layer(x)
    wanted = nn.functional.linear(x.view(-1, 96), layer.weight, layer.bias).view(*shape[:-1], 48)
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    assert multiply(x, layer.weight) is not None or not x.numel()
    assert (found - wanted).norm() <= ROUNDING * wanted.norm()


def test_many_rows_in_several_pieces(monkeypatch):
    monkeypatch.setattr("comemo.weights.quantised.PIECE", 7 * 96)
    layer, x = linear(), torch.randn(3, 20, 96)
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    assert (layer(x) - wanted).norm() <= ROUNDING * wanted.norm()


def test_rows_whose_width_the_operator_cannot_read():
    """It reads 16 integers at a time, also beyond the end of the last row."""
    layer, x = linear(wide=40), torch.randn(1, 40)
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    assert (layer(x) - wanted).norm() <= ROUNDING * wanted.norm()


def test_gradients_reach_the_input():
    layer, x = linear(), torch.randn(2, 96, requires_grad=True)
    layer(x).sum().backward()
    wanted = layer.weight.dequantize().sum(0)
    assert torch.allclose(x.grad, wanted.expand(2, -1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_left_to_torchao(dtype):
    assert multiply(torch.randn(1, 96, dtype=dtype), linear().weight) is None


@pytest.mark.parametrize(
    "config", [Int8DynamicActivationInt8WeightConfig(**KEPT), IntxWeightOnlyConfig()]
)
def test_other_weights_are_left_to_torchao(config):
    layer = nn.Linear(96, 48).requires_grad_(False)
    x = torch.randn(2, 96)
    exact = layer(x)
    assert multiply(x, layer.weight) is None
    quantize_(layer, config)
    assert multiply(x, layer.weight) is None
    found = speed_up(layer)(x)
    assert type(layer) is QuantisedLinear
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_quantised_layers_are_called():
    layer = linear(bias=False)
    assert type(layer) is QuantisedLinear
    assert not is_fusable(layer, biased=True)
    assert type(copy.deepcopy(layer)) is QuantisedLinear


# --- loading and saving ---


def test_which_weights_are_quantised(quantised):
    bits, model, _ = quantised
    kinds = {
        name: type(module.weight).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    of_decoder = {name for name in kinds if ".layers." in name}
    decoder = {"int8": "Int8Tensor", "int4": "Int4OpaqueTensor"}[bits]
    assert {kinds[name] for name in of_decoder} == {decoder}
    assert {kinds[name] for name in kinds.keys() - of_decoder} == {"Int8Tensor"}
    assert model.dtype == torch.float32
    assert type(model.get_input_embeddings().weight) is nn.Parameter
    assert type(model.model.language_model.layers[1].mixin.attn_gate) is nn.Parameter


def test_everything_else_is_as_without(quantised, seeing):
    _, model, _ = quantised
    other, _ = seeing
    assert model.generation_config.to_dict() == other.generation_config.to_dict()
    assert model.name_or_path == other.name_or_path
    assert model.config.image_token_id == other.config.image_token_id


def test_a_saved_model(quantised, tmp_path):
    bits, model, _ = quantised
    if bits == "int4":
        with pytest.raises(ValueError, match=r"save_pretrained.*got \['Int4OpaqueTensor'\]"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
        return
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert again(input_ids=ids).logits.equal(model(input_ids=ids).logits)
    assert digest(again.model) == digest(model.model)
    with pytest.raises(ValueError, match="quantised weights load into the class that saved them"):
        comemo.CoMemoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantised already"):
        chosen_weights("int8", tmp_path)
    said = subprocess.run(
        [sys.executable, "-m", "comemo", "info", tmp_path, "--json"], capture_output=True
    )
    assert "Int8WeightOnlyConfig" in json.loads(said.stdout)["quantisation"]


def test_a_choice_of_torchao_in_our_layout(seeing, tmp_path):
    """As transformers documents it: it leaves the output layer as it is."""
    seeing[0].save_pretrained(tmp_path, save_original_format=False)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(CONFIGS["int8"])
    )
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.multi_modal_projector[1]) is QuantisedLinear


# --- what is refused ---


def test_layers_that_do_not_fit_are_refused():
    config = TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=128, **KEPT))
    with pytest.raises(
        ValueError, match=r"got 6 whose shapes do not fit: .*down_proj \(128, 352\)"
    ):
        comemo.CoMemoForConditionalGeneration.from_pretrained(
            nano.checkpoint(), quantization_config=config
        )


def test_choices_that_are_refused(seeing, monkeypatch):
    config = copy.deepcopy(seeing[0].config)
    with pytest.raises(ValueError, match=r"quantisation: bits must be one of .* got 'int2'"):
        quantisation("int2", config)
    config.text_config.intermediate_size = 360
    with pytest.raises(ValueError, match=r"int4 needs widths that are multiples of 32.*360"):
        quantisation("int4", config)
    monkeypatch.setattr(quantising.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"quantised weights need torchao.*\[quantized\]"):
        quantisation("int8", config)


def test_folding_is_refused(quantised):
    with pytest.raises(ValueError, match="fold_for_inference: modules must be the original ones"):
        quantised[1].fold_for_inference()


def test_a_model_that_torchao_quantised_alone_is_not_saved(seeing, tmp_path):
    model = copy.deepcopy(seeing[0])
    quantize_(model.lm_head, CONFIGS["int8"])
    with pytest.raises(ValueError, match="save_pretrained: wanted a model that from_pretrained"):
        model.save_pretrained(tmp_path)


# --- answers ---


def digest(core):
    return identify_model(memory_settings(core), memory_weights(core))


def test_answers(quantised):
    bits, model, processor = quantised
    told = by_generate(model, processor, CASES)
    wrong = sum(a != case["answer"].strip() for a, case in zip(told, CASES, strict=True))
    assert wrong <= DIFFER[bits]


def test_every_way_to_ask(quantised):
    """`chat`, a session with known pictures, and a decode loop give the words of `generate`."""
    _, model, processor = quantised
    store, loop = comemo.MemoryStore(), comemo.DecodeLoop(model)
    for case in FEW:
        (told,) = by_generate(model, processor, [case])
        assert by_chat(model, processor, case) == told
        for _ in range(2):
            assert by_session(model, processor, case, memory_store=store) == told
        assert by_session(model, processor, case, decode_loop=loop) == told
    assert store.stats.hits >= len(FEW)


def test_logits(quantised, seeing):
    bits, model, _ = quantised
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        found, wanted = (one(input_ids=ids).logits for one in (model, seeing[0]))
    assert 0 < (found - wanted).norm() / wanted.norm() < ERRORS[bits]


def test_image_memories_are_of_these_weights_alone(quantised, seeing, tmp_path):
    _, model, processor = quantised
    kept = comemo.MemoryStore(directory=tmp_path)
    by_session(*seeing, FEW[0], memory_store=kept)
    by_session(model, processor, FEW[0], memory_store=kept)
    assert (kept.stats.hits, kept.stats.misses) == (0, 2)
    again = comemo.MemoryStore(directory=tmp_path)  # as another process
    by_session(model, processor, FEW[0], memory_store=again)
    assert (again.stats.disk_hits, again.stats.misses) == (1, 0)
    other = copy.deepcopy(model.model)
    projection = other.language_model.layers[1].mixin.kv_proj.weight
    projection.qdata[0, 0] += 1
    assert digest(other) != digest(model.model)
    stamps = [
        stamp_model(memory_settings(one), memory_weights(one)) for one in (other, model.model)
    ]
    assert stamps[0] != stamps[1]


# --- commands ---


def test_the_server(quantised):
    bits, model, processor = quantised
    ready = ready_nano(quantize=bits)
    try:
        assert type(ready.model.lm_head) is QuantisedLinear
        url, _ = drawn(1, "objects")
        with serving(ready) as address:
            content = [{"type": "image_url", "image_url": {"url": url}}]
            content.append({"type": "text", "text": FEW[0]["question"]})
            body = {"model": NAME, "messages": [{"role": "user", "content": content}]}
            reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    finally:
        ready.engine.close(5.0)
    (told,) = by_generate(model, processor, [FEW[0] | {"pictures": [[1, "objects"]]}])
    assert reply["choices"][0]["message"]["content"].strip() == told


def test_the_command_line(capsys, tmp_path):
    picture = tmp_path / "picture.png"
    pictures_of(FEW[0])[0].save(picture)
    words = ["nano", FEW[0]["question"], "--image", str(picture), "--dtype", "float32"]
    assert main(["chat", *words, "--quantize", "int8"]) == 0
    assert capsys.readouterr().out.strip() == FEW[0]["answer"].strip()
