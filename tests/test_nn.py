"""`comemo_kernels.nn.GatedCrossAttention`: against plain PyTorch, and against a mixin layer."""

import copy
import pickle

import pytest
import torch
from conftest import DEVICE, DTYPES, SLOW, TRACED
from harness import SLACK, SLACK_GRADIENT, assert_errs_no_more, assert_relative
from nn_layers import (
    ROTARY,
    B,
    N,
    gradients,
    in_pytorch,
    make_layer,
    make_memory,
    prompts,
    randoms,
)

import comemo_kernels
from comemo.config import MixinConfig
from comemo.mixin import MixinLayer
from comemo_kernels import ImageMemory, append_images, spans_from_cu_seqlens, spans_from_images
from comemo_kernels.nn import GatedCrossAttention, fill_memory

kernel = pytest.mark.kernel(reference=True)

# --- what it computes ---


def reading(way, media, device):
    """Arguments of a call that reads `media` [16, d], and those of `in_pytorch`."""
    starts = torch.tensor([0, 12], device=device)
    both = torch.tensor([[[0, 12]], [[12, 16]]], device=device)
    if way == "tensor":  # 8 for each sample
        spans = torch.tensor([[[0, 8]], [[8, 16]]], device=device)
        return {"media": media.view(B, 8, -1)}, {"spans": spans}
    if way == "spans":  # causal, the second prompt sees the images of both
        spans = spans_from_images(starts + 4, [12, 4], N).expand(B, -1, -1)
        spans = spans.contiguous().to(device)
        return {"media": media, "spans": spans}, {"spans": spans}
    positions, mask = prompts(device)
    ids = positions[mask].expand(B, -1)
    known = {"spans": both, "ids": ids, "positions": positions}
    return {"media": make_memory(media), "positions": positions}, known


@kernel
@pytest.mark.parametrize(
    ("way", "dtype", "heads", "shared"),
    [
        pytest.param("tensor", torch.float32, 4, False, marks=SLOW),
        ("spans", DTYPES[-2], 2, False),
        ("memory", torch.float32, 2, True),
        pytest.param("memory", DTYPES[-2], 4, False, marks=SLOW),
        pytest.param("memory", torch.float32, 4, True, marks=SLOW),
        pytest.param("tensor", torch.float16, 2, True, marks=SLOW),
        pytest.param("spans", torch.float32, 4, False, marks=SLOW),
        pytest.param("memory", torch.float16, 2, False, marks=SLOW),
    ],
    ids=str,
)
def test_outputs_and_gradients_equal_plain_pytorch(way, dtype, heads, shared, device):
    width = 64 if shared or way == "spans" else 48
    options = {"num_key_value_heads": heads, "shared_norm": shared, "media_dim": width}
    layer = make_layer(device, dtype, **options)
    exact = copy.deepcopy(layer).double()
    x = randoms(B, N, 64, device=device, dtype=dtype)
    media = randoms(16, width, device=device, dtype=dtype, seed=1)

    def run(layer, factor, plain):
        weights = [p for _, p in layer.named_parameters()]
        like = weights[0].dtype
        given = [(factor * t.double()).to(dtype).to(like).requires_grad_() for t in (x, media)]
        ours, known = reading(way, given[1], device)
        y = in_pytorch(layer, *given, **known) if plain else layer(given[0], **ours)
        return [y.detach(), *gradients(y, *given, *weights)]

    names = ["output", "x", "media", *(name for name, _ in layer.named_parameters())]
    near = [(run(layer, f, True), run(exact, f, True)) for f in (0.97, 1.02, 1.05)]
    found, rounded, truth = run(layer, 1, False), run(layer, 1, True), run(exact, 1, True)
    for i, name in enumerate(names):
        slack = SLACK if name == "output" else SLACK_GRADIENT
        others = [(few[i], true[i]) for few, true in near] if found[i].numel() < 512 else []
        assert_errs_no_more(found[i], rounded[i], truth[i], name, slack, "nn", others)


@pytest.fixture
def pair():
    """A mixin layer and ours with its state dict."""
    sizes = {"language_dim": 64, "vision_dim": 64, "head_dim": 16, "num_heads": 4}
    torch.manual_seed(0)
    mixin = MixinLayer(MixinConfig(**sizes, intermediate_size=80), 3)
    with torch.no_grad():
        for name, weight in mixin.named_parameters():
            if name.endswith("gate"):
                weight.fill_(0.7)
            elif "norm" in name:
                weight.normal_(1.0, 0.3)
    ours = GatedCrossAttention(64, 64, 4, 16, 80, shared_norm=True, layer_idx=3)
    ours.load_state_dict(mixin.state_dict())
    return mixin.to(DEVICE), ours.to(DEVICE)


@pytest.mark.parametrize("lengths", [[12, 4], [16, 0]], ids=str)
@pytest.mark.parametrize("built", [False, True])
def test_it_equals_a_mixin_layer_bit_for_bit(pair, lengths, built, device):
    positions, _ = prompts(device)
    results = []
    for layer in pair:
        x, media = (randoms(*s, 64, device=device).requires_grad_() for s in ((B, N), (16,)))
        memory = make_memory(media, lengths=lengths)
        if built and layer is pair[1]:
            fill_memory([layer], memory)
        if layer is pair[0]:
            angles = *memory.table, memory.ids
            y = layer(x, media, memory, memory.rotation(positions), angles)
        else:
            y = layer(x, memory, positions)
        parameters = dict(sorted(layer.named_parameters()))
        results.append([y, *gradients(y, x, media, *parameters.values())])
        assert torch.equal(y[1], x[1]) == (not lengths[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_new_layer_is_the_identity_whose_gates_learn(device):
    layer = GatedCrossAttention(64, 48, 4, 16, 80).to(device)
    x, media = randoms(B, N, 64, device=device), randoms(B, 7, 48, device=device)
    y = layer(x, media)
    assert torch.equal(y, x)
    found = gradients(y, layer.attn_gate, layer.mlp_gate)
    assert all(gradient.abs() > 0 for gradient in found)


def test_training_lowers_the_loss(device):
    layers = [make_layer(device, layer_idx=i) for i in range(2)]
    for layer in layers:
        layer.reset_parameters()
    x, media = randoms(B, N, 64, device=device), randoms(16, 48, device=device)
    target, positions = randoms(B, N, 64, device=device, seed=5), prompts(device)[0]
    parameters, losses = [p for layer in layers for p in layer.parameters()], []
    for _ in range(4):
        y, memory = x, make_memory(media)
        fill_memory(layers, memory)
        for layer in layers:
            y = layer(y, memory, positions)
        losses.append((y - target).square().mean())
        found = torch.autograd.grad(losses[-1], parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter -= gradient
    assert losses == sorted(losses, reverse=True)


def test_packed_samples_equal_samples_alone(device):
    layer = make_layer(device)
    x, media = randoms(1, 12, 64, device=device), randoms(9, 48, device=device)
    ends = [torch.tensor(bounds, device=device) for bounds in ([0, 5, 12], [0, 3, 9])]
    packed = layer(x, media, spans=spans_from_cu_seqlens(*ends, 12))
    alone = [layer(x[:, :5], media[None, :3]), layer(x[:, 5:], media[None, 3:])]
    assert_relative(packed, torch.cat(alone, 1))


def test_what_is_not_active_passes_unchanged(device):
    layer = make_layer(device)
    x, media = randoms(B, N, 64, device=device), randoms(B, 7, 48, device=device)
    active = torch.arange(N, device=device)[None, :, None].expand(B, -1, -1) > 4
    y = layer(x, media, active=active)
    assert torch.equal(y[:, :5], x[:, :5])
    assert torch.equal(y[:, 5:], layer(x, media)[:, 5:])


def test_without_media_only_the_network_is_left():
    layer, x = make_layer("cpu"), randoms(B, N, 64, device="cpu")
    wanted = layer(x, randoms(B, 7, 48, device="cpu"), spans=torch.zeros(B, 1, 2).long())
    for media in (torch.ones(B, 0, 48), torch.ones(0, 48)):
        assert torch.equal(layer(x, media), wanted)


# --- a memory that layers share ---


@pytest.mark.parametrize("dtype", DTYPES[-2:], ids=str)
def test_a_filled_memory_gives_what_media_give(dtype, device, monkeypatch):
    layers = [make_layer(device, dtype, layer_idx=i, num_key_value_heads=2) for i in (2, 5)]
    x, media = (randoms(*s, device=device, dtype=dtype) for s in ((B, N, 64), (16, 48)))
    positions, _ = prompts(device)
    calls = []
    built = comemo_kernels.build_memory
    monkeypatch.setattr(
        comemo_kernels, "build_memory", lambda *a, **k: (calls.append(1), built(*a, **k))[1]
    )
    with torch.no_grad():
        memory = make_memory(media)
        wanted = [layer(x, memory, positions) for layer in layers]
        assert memory.keys == {}
        fill_memory(layers, memory)
        assert (list(memory.keys), len(calls)) == ([2, 5], 1)
        memory.media = None  # not needed any more
        for layer, y in zip(layers, wanted, strict=True):
            assert_relative(layer(x, memory, positions).float(), y.float())
            step = layer(x[:, -1:], memory, positions[:, -1:])
            tolerance = {torch.float32: 1e-5}.get(dtype, 0.05)
            assert torch.allclose(step[:, 0], y[:, -1], atol=tolerance)


def test_layers_of_other_shapes_share_a_memory():
    layers = [
        make_layer("cpu", layer_idx=0),
        make_layer("cpu", layer_idx=1, num_key_value_heads=1),
        make_layer("cpu", layer_idx=2, eps=1e-3),
    ]
    x, media, positions = randoms(B, N, 64, device="cpu"), randoms(16, 48, device="cpu"), None
    memory = ImageMemory(media=media, spans=torch.tensor([[[0, 9]], [[9, 16]]]))
    wanted = [layer(x, memory, positions) for layer in layers]
    fill_memory(layers, memory)
    assert [memory.keys[i].shape[1] for i in range(3)] == [4, 1, 4]
    assert all(
        torch.equal(layer(x, memory, positions), y) for layer, y in zip(layers, wanted, strict=True)
    )


def test_a_float8_memory_is_read(device):
    layer = make_layer(device, num_key_value_heads=2)
    x, media = randoms(B, N, 64, device=device), randoms(16, 48, device=device)
    positions, _ = prompts(device)
    with torch.no_grad():
        exact = make_memory(media)
        table = ROTARY.table(device)
        stored = torch.float8_e4m3fn
        memory = ImageMemory.allocate(16, [0], 2, 16, table, stored, tile=4)
        weights = [layer.kv_proj.weight], [layer.media_norm.weight]
        append_images(memory, media, exact.ids, [12, 4], *weights)
        memory = memory.reading(exact.spans, exact.biases.flatten())
        found, wanted = layer(x, memory, positions), layer(x, exact, positions)
        assert 0 < (found - wanted).abs().max() < 0.1 * (wanted - x).abs().max()
        memory.media = media
        fill_memory([layer], memory)  # exact again
        assert_relative(layer(x, memory, positions), wanted)


# --- as a module ---


def test_the_state_dict_is_as_documented():
    sizes = {"d": 64, "media_dim": 48, "H": 4, "G": 2, "D": 16, "intermediate_size": 80}
    layer = GatedCrossAttention(64, 48, 4, 16, 80, num_key_value_heads=2)
    documented = {}
    lines = GatedCrossAttention.__doc__.split("State dict:")[1].split("Args:")[0].split("\n")
    for line in filter(None, map(str.strip, lines)):
        names, _, shape = line.partition(": ")
        shape = eval(shape[: shape.index("]") + 1], {}, sizes)
        documented |= dict.fromkeys(names.split(", "), tuple(shape))
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == documented
    shared = GatedCrossAttention(48, 48, 4, 16, 80, shared_norm=True).state_dict()
    assert documented.keys() - shared.keys() == {"media_norm.weight"}


@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_compute_the_same(make):
    layer = make_layer("cpu", num_key_value_heads=2)
    x, media = randoms(B, N, 64, device="cpu"), randoms(B, 7, 48, device="cpu")
    other = make(layer)
    assert torch.equal(other(x, media), layer(x, media))
    meta = GatedCrossAttention(64, 48, 4, 16, 80, 2, device="meta")
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x, media), layer(x, media))
    half = GatedCrossAttention(64, 48, 4, 16, 80, 2, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@TRACED
@pytest.mark.parametrize(
    ("filled", "backend"),
    [(True, "eager"), *(pytest.param(f, "inductor", marks=SLOW) for f in (False, True))],
)
def test_it_compiles_whole(filled, backend, real_device):
    layer, (positions, _) = make_layer(real_device), prompts(real_device)
    x, media = randoms(B, N, 64, device=real_device), randoms(16, 48, device=real_device)
    memory = make_memory(media.requires_grad_(not filled))
    if filled:
        with torch.no_grad():
            fill_memory([layer], memory)
    wanted = layer(x, memory, positions)
    found = torch.compile(layer, fullgraph=True, backend=backend)(x, memory, positions)
    assert torch.allclose(found, wanted, atol=1e-5)
    leaves = [layer.q_proj.weight] + ([] if filled else [media])
    for a, b in zip(gradients(found, *leaves), gradients(wanted, *leaves), strict=True):
        assert_relative(a, b)


@pytest.mark.parametrize("filled", [False, True])
def test_gradient_checkpointing(filled):
    """Without reentrance; the media are inside of the memory."""
    layer, results = make_layer("cpu"), []
    positions, _ = prompts("cpu")
    for checkpointed in (False, True):
        x, media = (randoms(*s, device="cpu").requires_grad_() for s in ((B, N, 64), (16, 48)))
        memory = make_memory(media)
        if filled:
            fill_memory([layer], memory)
        y = (
            torch.utils.checkpoint.checkpoint(layer, x, memory, positions, use_reentrant=False)
            if checkpointed
            else layer(x, memory, positions)
        )
        results.append([y, *gradients(y, x, media, *layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("filled", [False, True])
def test_autocast(filled, device):
    if torch.bfloat16 not in DTYPES:
        pytest.skip("kernels are not tested in bfloat16")
    layer = make_layer(device)
    x, media = randoms(B, N, 64, device=device), randoms(16, 48, device=device)
    positions, _ = prompts(device)
    wanted = layer(x, make_memory(media), positions)
    memory = make_memory(media)
    with torch.autocast(device, torch.bfloat16):
        if filled:
            fill_memory([layer], memory)
        found = layer(x, memory, positions)
        hooked = copy.deepcopy(layer)
        for module in hooked.modules():
            module.register_forward_hook(lambda *_: None)
        called = hooked(x, make_memory(media), positions)
        with torch.no_grad():
            memory = make_memory(media)
            if filled:
                fill_memory([layer], memory)
            assert torch.equal(layer(x, memory, positions), found)
    assert found.dtype == called.dtype == torch.float32
    error = (found - wanted).abs().max()
    assert 0 < error < 2 * (called - wanted).abs().max()
    assert all(g is not None for g in gradients(found, *layer.parameters()))
