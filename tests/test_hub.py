"""Our layers under the models of transformers, by the `kernels` package, without a network."""

import logging
import re
import warnings
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from conftest import DEVICE, DTYPES, SLOW, TRACED
from harness import SLACK, SLACK_GRADIENT, assert_errs_no_more, assert_matches, assert_relative
from nn_layers import B, N, make_layer, randoms
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import comemo_kernels
from comemo_kernels import hub
from comemo_kernels.hub import layers
from comemo_kernels.nn import GatedCrossAttention, TileProjector

kernel = pytest.mark.kernel(reference=True)


def half_rotation(q, k, cos, sin, unsqueeze_dim=1):
    """What `apply_rotary_pos_emb` of Llama computes, in float32."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turn(x):
        exact = torch.promote_types(x.dtype, torch.float32)
        x1, x2 = x.to(exact).chunk(2, -1)
        return (x.to(exact) * cos + torch.cat([-x2, x1], -1) * sin).to(x.dtype)

    return turn(q), turn(k)


class Function(nn.Module):
    """As `kernels` makes it of a function of a model."""

    rotation = staticmethod(half_rotation)

    def forward(self, *args, **kwargs):
        return type(self).rotation(*args, **kwargs)


def tables(*shape, device, dtype=torch.float32, repeated=True):
    angle = randoms(*shape, device=device, seed=2)
    angle = torch.cat([angle, angle], -1) if repeated else angle
    return angle.cos().to(dtype), angle.sin().to(dtype)


# --- what the layers compute ---


@kernel
@pytest.mark.parametrize("dtype", DTYPES[-2:], ids=str)
@pytest.mark.parametrize(
    ("q_shape", "k_shape", "rows", "dim"),
    [
        ((2, 4, 9, 16), (2, 1, 9, 16), (2, 9), 1),
        pytest.param((2, 4, 9, 16), (2, 2, 9, 16), (1, 9), 1, marks=SLOW),
        ((2, 9, 4, 16), (2, 9, 2, 16), (2, 9), 2),
        ((2, 9, 4, 16), (2, 9, 2, 16), (2, 9), -2),
        ((9, 4, 16), (9, 2, 16), (9,), 1),
        ((4, 9, 16), (2, 9, 16), (9,), 0),
        pytest.param((1, 4, 9, 16), (1, 4, 9, 16), (9,), 0, marks=SLOW),
    ],
    ids=str,
)
def test_the_rotation_is_that_of_transformers(q_shape, k_shape, rows, dim, dtype, device):
    cos, sin = tables(*rows, 8, device=device)
    inputs = {
        "q": randoms(*q_shape, device=device, dtype=dtype).requires_grad_(),
        "k": randoms(*k_shape, device=device, dtype=dtype, seed=1).requires_grad_(),
        "cos": cos.to(dtype),
        "sin": sin.to(dtype),
    }

    def ours(q, k, cos, sin):
        return layers.ApplyRotary.forward(Function(), q, k, cos, sin, dim)

    def theirs(q, k, cos, sin):
        return half_rotation(q, k, cos, sin, dim)

    assert_matches(ours, theirs, inputs)


class OtherWay(Function):
    """Rotates backwards, as one model does."""

    @staticmethod
    def rotation(q, k, cos, sin, unsqueeze_dim=1):
        return half_rotation(q, k, cos, -sin, unsqueeze_dim)


class Neighbours(Function):
    """Rotates neighbouring elements."""

    @staticmethod
    def rotation(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

        def turn(x):
            pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            return x * cos + pairs * sin

        return turn(q), turn(k)


class HalfTable(Function):
    """Takes a table that does not repeat its halves, as another model does."""

    @staticmethod
    def rotation(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = (torch.cat([t, t], -1) for t in (cos, sin))
        return half_rotation(q, k, cos, sin, unsqueeze_dim)


@pytest.mark.parametrize("kind", [OtherWay, Neighbours])
def test_another_rotation_is_refused(kind):
    q = randoms(2, 4, 9, 16, device=DEVICE)
    with pytest.raises(ValueError, match="rotary_pos_emb: the function of the model must rotate"):
        layers.ApplyRotary.forward(kind(), q, q, *tables(2, 9, 8, device=DEVICE))


@kernel
def test_a_table_of_half_the_width(device):
    q = randoms(2, 4, 9, 16, device=device)
    half = tables(2, 9, 8, device=device, repeated=False)
    found, _ = layers.ApplyRotary.forward(HalfTable(), q, q, *half)
    assert_relative(found, HalfTable.rotation(q, q, *half)[0])
    with pytest.raises(ValueError, match="the function of the model must rotate"):
        layers.ApplyRotary.forward(Function(), q, q, *half)
    with pytest.raises(ValueError, match=r"cos must be \[.., 16\] or \[.., 16/2\]"):
        layers.ApplyRotary.forward(Function(), q, q, *(t[..., :5] for t in half))
    with pytest.raises(ValueError, match=r"q must be \[B, H, N, D\] with unsqueeze_dim 1"):
        layers.ApplyRotary.forward(Function(), q, q, *tables(2, 9, 8, device=device), 0)


@TRACED
def test_a_refusal_is_compiled_too(real_device):
    q = randoms(2, 4, 9, 16, device=real_device)
    table = tables(2, 9, 8, device=real_device)

    def rotate(kind):
        def run(q, cos, sin):
            return layers.rotate(kind, q, q, cos, sin, 1)[0]

        layers._probe.cache_clear()
        return torch.compile(run, fullgraph=True, backend="eager")(q, *table)

    assert_relative(rotate(Function()), half_rotation(q, q, *table)[0])
    with pytest.raises(Exception, match=r"Observed exception|must rotate"):
        rotate(OtherWay())


def test_layers_compute_modules_of_others(device):
    """Whose submodules and settings are those of `comemo_kernels.nn`."""
    layer, projector = make_layer(device), TileProjector(8, 24).to(device)
    x, media = randoms(B, N, 64, device=device), randoms(B, 7, 48, device=device)
    tokens = randoms(3, 17, 8, device=device)
    other, sequence = nn.Module(), nn.Sequential(*projector)
    for name, value in (*layer.named_children(), *layer.named_parameters(recurse=False)):
        setattr(other, name, value)
    settings = {k: v for k, v in vars(layer).items() if not k.startswith("_")}
    other.__dict__.update(settings)
    sequence.ratio, sequence.version = 0.5, "v2"
    assert torch.equal(layers.GatedCrossAttention.forward(other, x, media), layer(x, media))
    assert torch.equal(layers.TileProjector.forward(sequence, tokens), projector(tokens))


# --- the mapping ---


def test_the_mapping_names_layers_of_this_package():
    found = hub.mapping()
    assert found.keys() == hub.NAMES.keys()
    for name, devices in found.items():
        assert devices.keys() == {"cpu", "cuda"}
        (repository,) = set(devices.values())
        assert repository.load() is getattr(layers, hub.NAMES[name])
        assert comemo_kernels.__version__ in str(repository)
        members = {n for n in dir(repository.load()) if n not in dir(nn.Module)}
        assert members <= {"can_torch_compile", "has_backward"}
        assert repository.load().__init__ is nn.Module.__init__
    assert hub.mapping(["rotary_pos_emb"]).keys() == {"rotary_pos_emb"}
    for names in (["RMSNorm"], [3]):
        with pytest.raises(ValueError, match="mapping: names"):
            hub.mapping(names)


def test_a_repository_is_written_where_nothing_else_is(tmp_path):
    root = hub.write_repository(tmp_path / "ours")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {path.parent.relative_to(root).as_posix() for path in before} == {
        "build/torch-universal"
    }
    assert hub.write_repository(str(root)) == root
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    (root / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"write_repository: folder must .*notes.txt"):
        hub.write_repository(root)
    with pytest.raises(ValueError, match="write_repository: folder must be"):
        hub.write_repository(3)


# --- with the `kernels` package ---


@pytest.fixture
def kernels():
    """The package, if it is installed and transformers has marked its models with it."""
    package = pytest.importorskip("kernels", reason="the package `kernels` is not installed")
    if not hasattr(modeling_llama.LlamaRMSNorm, "kernel_layer_name"):
        pytest.skip(f"this release of transformers does not accept kernels {package.__version__}")
    logging.getLogger("kernels.layer.layer").setLevel(logging.ERROR)  # layers that nobody maps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield package


def kernelize(kernels, model, mapping, mode="TRAINING"):
    modes = {"TRAINING": kernels.Mode.TRAINING, "INFERENCE": kernels.Mode.INFERENCE}
    modes["COMPILE"] = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=modes[mode], device="cpu")


def make_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 90}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


@pytest.fixture
def llama(kernels):
    """A tiny model. Its rotation is a function of the whole process: it is put back afterwards."""
    model = make_llama()
    if not hasattr(model.model.layers[0].self_attn, "_kernel_funcs"):
        pytest.skip("in this release of transformers `kernels` does not see functions")
    yield model
    kernelize(kernels, model, {})


def losses(model, dtype):
    model = model.to(dtype)
    ids = torch.arange(2, 26).view(2, 12) * 3 % 90
    found = model(input_ids=ids, labels=ids)
    names, leaves = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(found.loss, leaves)
    return {"logits": found.logits.detach()} | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@TRACED
def test_llama_with_our_rotation_put_there_by_hand(dtype, monkeypatch):
    """What `kernels` does, where it is not installed: a bound forward in place of a function's."""
    llama, original = make_llama().to(dtype), modeling_llama.apply_rotary_pos_emb
    truth, theirs = losses(llama, torch.float64), losses(llama, dtype)
    function = type("Llamas", (Function,), {"rotation": staticmethod(original)})()
    function.forward = MethodType(layers.ApplyRotary.forward, function)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", function)
    for name, found in losses(llama, dtype).items():
        slack = SLACK if name == "logits" else SLACK_GRADIENT
        assert_errs_no_more(found, theirs[name], truth[name], name, slack)


@pytest.mark.parametrize(
    ("source", "mode", "dtype"),
    [
        ("package", "TRAINING", torch.float32),
        ("package", "COMPILE", torch.bfloat16),
        ("folder", "INFERENCE", torch.bfloat16),
        ("folder", "COMPILE", torch.float32),
    ],
    ids=str,
)
@TRACED
def test_llama_with_our_rotation(kernels, llama, source, mode, dtype, monkeypatch, tmp_path):
    llama.to(dtype)
    truth = losses(llama, torch.float64)
    theirs = losses(llama, dtype)
    mapping = hub.mapping(["rotary_pos_emb"])
    if source == "folder":
        root = hub.write_repository(tmp_path / "ours")
        repository = kernels.LocalLayerRepository(root, layer_name="ApplyRotary")
        mapping = {"rotary_pos_emb": {"cpu": repository}}
    kernelize(kernels, llama, mapping, mode)
    calls, made = [], comemo_kernels.apply_rotary
    spy = SimpleNamespace(call=lambda *args: (calls.append(1), made(*args))[1])
    monkeypatch.setattr(comemo_kernels, "apply_rotary", spy.call)
    for name, found in losses(llama, dtype).items():
        slack = SLACK if name == "logits" else SLACK_GRADIENT
        assert_errs_no_more(found, theirs[name], truth[name], name, slack)
    assert len(calls) == 2


@TRACED
def test_a_kernelized_llama_generates_and_compiles(kernels, llama):
    ids = torch.arange(2, 26).view(2, 12) * 3 % 90
    options = {"max_new_tokens": 5, "do_sample": False}
    llama.eval()
    wanted, logits = llama.generate(ids, **options), llama(input_ids=ids).logits
    kernelize(kernels, llama, hub.mapping(), "COMPILE")
    assert torch.equal(llama.generate(ids, **options), wanted)
    compiled = torch.compile(llama, fullgraph=True, backend="eager")
    assert_relative(compiled(input_ids=ids).logits, logits)


def test_transformers_own_switch_takes_our_mapping(kernels, llama):
    from transformers.integrations import hub_kernels

    with kernels.use_kernel_mapping(hub.mapping(["rotary_pos_emb"]), inherit_mapping=False):
        hub_kernels.kernelize(llama)
    forward = modeling_llama.apply_rotary_pos_emb.forward
    assert forward.__func__ is layers.ApplyRotary.forward


def test_a_module_that_declares_our_layer(kernels):
    class Reference(GatedCrossAttention):
        """Somebody's own forward."""

        def forward(self, x, media, positions=None, spans=None, active=None):
            raise AssertionError("replaced")

    kernels.replace_kernel_forward_from_hub(Reference, "GatedCrossAttention")
    ours = make_layer("cpu")
    model = Reference(64, 48, 4, 16, 80)
    model.load_state_dict(ours.state_dict())
    kernelize(kernels, model, hub.mapping())
    x, media = randoms(B, N, 64, device="cpu"), randoms(B, 7, 48, device="cpu")
    assert torch.equal(model(x, media), ours(x, media))


def test_the_page_shows_what_works(llama):
    page = (Path(__file__).parents[1] / "docs" / "nn.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    scope = {}
    exec(block, scope)
    forward = modeling_llama.apply_rotary_pos_emb.forward
    assert forward.__func__ is layers.ApplyRotary.forward
    assert scope["model"](input_ids=torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("module", [hub, comemo_kernels.nn], ids=lambda module: module.__name__)
def test_every_name_is_documented(module):
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    section = page.split(f"## `{module.__name__}`\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(module.__all__)
