"""Components compared with recordings of the published model: outputs and gradients."""

import pytest
import torch
from harness import assert_relative, recorded
from small import place
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import comemo_kernels as ops
from comemo_kernels import ImageMemory, QueryRotation, spans_from_cu_seqlens

MIXIN = {  # published parameter -> ours, of a mixin layer
    "attn_gate": "attn_gate",
    "ff_gate": "mlp_gate",
    "cross_attention_norm.weight": "attn_norm.weight",
    "cross_attn.to_kv.weight": "kv_proj.weight",
    "cross_attn.to_q.weight": "q_proj.weight",
    "cross_attn.to_out.weight": "o_proj.weight",
    "ffn_2.w1.weight": "mlp.gate_proj.weight",
    "ffn_2.w3.weight": "mlp.up_proj.weight",
    "ffn_2.w2.weight": "mlp.down_proj.weight",
    "ffn_norm_2.weight": "mlp_norm.weight",
}


def read(golden, prefix: str) -> dict[str, Tensor]:
    """Recorded tensors, on the model's device."""
    return place(recorded(golden, "components.safetensors", prefix))


@pytest.fixture
def mixin(model):
    model.zero_grad(set_to_none=True)
    return model.model.language_model.layers[1].mixin


def check(tensors: dict[str, Tensor], out: Tensor, grads: dict[str, Tensor]) -> None:
    """Compare `out` and gradients of (out * loss_weight).sum(), by their recorded names."""
    assert_relative(out, tensors["out"], "out")
    (out * tensors["loss_weight"]).sum().backward()
    for name, leaf in grads.items():
        assert_relative(leaf.grad, tensors[name], name)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def table(model, position_ids: Tensor):
    mixin = model.config.mixin_config
    return ops.rotary_table(position_ids, mixin.head_dim, mixin.rope_theta)


def rotation(model, position_ids: Tensor) -> QueryRotation:
    """Rotation of queries for keys rotated by the ids of the prompt, as recorded."""
    mixin = model.config.mixin_config
    length = mixin.max_position_embeddings
    found = ops.distance_table(mixin.head_dim, mixin.rope_theta, length, position_ids.device)
    return QueryRotation(*found, position_ids)


def angles(model, media_ids: Tensor):
    """Of keys rotated by the ids of the prompt."""
    return *rotation(model, media_ids)[:2], media_ids[0].int()


def positions(golden, N: int, M: int) -> tuple[Tensor, Tensor]:
    """Ids of the case `plain`, which all cases share; shorter ones use the first of them."""
    plain = read(golden, "cross_attn/plain/")
    return plain["text_position_ids"][:, :N], plain["media_position_ids"][:, :M]


def spans_of(tensors: dict[str, Tensor], B: int, N: int, M: int) -> Tensor:
    if "cu_seqlens_q" in tensors:
        q, k = tensors["cu_seqlens_q"][0].long(), tensors["cu_seqlens_k"][0].long()
        return spans_from_cu_seqlens(q, k, N)
    if "media_attn_mask" in tensors:  # True where a token may attend
        mask = tensors["media_attn_mask"][:, 0]
        start = mask.long().argmax(-1)
        return torch.stack([start, start + mask.sum(-1)], -1)
    if "text_time" in tensors:  # tokens with value 1 attend to nothing
        ends = torch.where(tensors["text_time"] == 1, 0, M).expand(B, N)
        return torch.stack([torch.zeros_like(ends), ends], -1).long()
    starts = place(M * torch.arange(B))
    return torch.stack([starts, starts + M], -1)[:, None]


@pytest.mark.parametrize("case", ["plain", "packed", "masked", "text_time", "batch2"])
def test_cross_attention(golden, model, mixin, case):
    tensors = read(golden, f"cross_attn/{case}/")
    x, media = leaf(tensors["in/x"]), leaf(tensors["in/media"])
    (B, N, _), M = x.shape, media.shape[1]
    text_ids, media_ids = positions(golden, N, M)
    # The recorded media are normed already, so the projection is compared without the norm.
    key, value = mixin.kv_proj(media).flatten(0, 1).unflatten(-1, (2, 4, 32)).unbind(1)
    key = ops.apply_rotary(key.view(B, M, 4, 32), None, *table(model, media_ids))[0].flatten(0, 1)
    q, _ = ops.apply_rotary(mixin.q_proj(x).unflatten(-1, (4, 32)), None, *table(model, text_ids))
    out = mixin.o_proj(ops.attend_spans(q, key, value, spans_of(tensors, B, N, M)).flatten(2))
    check(
        tensors,
        out,
        {
            "grad_in/x": x,
            "grad_in/media": media,
            "grad_param/to_q.weight": mixin.q_proj.weight,
            "grad_param/to_kv.weight": mixin.kv_proj.weight,
            "grad_param/to_out.weight": mixin.o_proj.weight,
        },
    )


@pytest.mark.parametrize("case", ["plain", "packed"])
def test_gated_block(golden, model, mixin, case):
    tensors = read(golden, f"gated_block/{case}/")
    x, media = leaf(tensors["in/x"]), leaf(tensors["in/media"])
    (B, N, _), M = x.shape, media.shape[1]
    if case == "packed":  # the same samples as in the packed cross-attention
        bounds = read(golden, "cross_attn/packed/cu_seqlens_")
        tensors |= {f"cu_seqlens_{name}": bound for name, bound in bounds.items()}
    text_ids, media_ids = positions(golden, N, M)
    key, value = mixin.build(media[0], angles(model, media_ids))
    memory = ImageMemory(spans_of(tensors, B, N, M), keys={1: key}, values={1: value})
    out = mixin(x, None, memory, rotation(model, text_ids))
    params = dict(mixin.named_parameters())
    grads = {f"grad_param/{theirs}": params[ours] for theirs, ours in MIXIN.items()}
    check(tensors, out, {"grad_in/x": x, "grad_in/media": media} | grads)


def test_gated_block_decodes_from_built_memory(golden, model, mixin):
    plain = read(golden, "gated_block/plain/")
    steps = read(golden, "gated_block/cached/")
    (N, M) = plain["in/x"].shape[1], plain["in/media"].shape[1]
    memory = ImageMemory(place(torch.tensor([[[0, M]]])))
    text_ids, media_ids = positions(golden, N, M)
    with torch.no_grad():
        memory.update(1, *mixin.build(plain["in/media"][0], angles(model, media_ids)))
        prefill = mixin(plain["in/x"], None, memory, rotation(model, text_ids))
        assert_relative(prefill, steps["prefill_out"])
        for i, (x, wanted) in enumerate(zip(steps["step_x"], steps["step_out"], strict=True)):
            count = place(torch.tensor([[N + i]]))  # queries count tokens, as published
            assert_relative(mixin(x, None, memory, rotation(model, count)), wanted, str(i))


def test_projector(golden, model):
    model.zero_grad(set_to_none=True)
    tensors = read(golden, "mlp1/")
    x, projector = leaf(tensors["in/x"]), model.model.multi_modal_projector
    params = {f"grad_param/{name}": p for name, p in projector.named_parameters()}
    check(tensors, projector(x), {"grad_in/x": x} | params)


def test_rms_norm(golden, model):
    tensors = read(golden, "rmsnorm/")
    x = leaf(tensors["in/x"])
    # It is not known which norm was recorded: exactly one must match.
    candidates = [m for m in model.modules() if isinstance(m, LlamaRMSNorm)]
    matching = [m for m in candidates if torch.allclose(m(x), tensors["out"], rtol=1e-4, atol=1e-5)]
    assert len(matching) == 1
    model.zero_grad(set_to_none=True)
    check(tensors, matching[0](x), {"grad_in/x": x, "grad_param/weight": matching[0].weight})


def test_decoder_layer(golden, model):
    model.zero_grad(set_to_none=True)
    tensors = read(golden, "decoder_layer/prefill/")
    text = model.model.language_model
    layer, x = text.layers[1], leaf(tensors["in/hidden_states"])
    N = x.shape[1]
    rotary = text._self_table(x, tensors["position_ids"], place(torch.tensor([N])))
    out = layer(x, position_embeddings=rotary)
    attention, mlp = layer.self_attn, layer.mlp
    check(
        tensors,
        out,
        {
            "grad_in/hidden_states": x,
            "grad_param/attention.wo.weight": attention.o_proj.weight,
            "grad_param/attention_norm.weight": layer.input_layernorm.weight,
            "grad_param/ffn_norm.weight": layer.post_attention_layernorm.weight,
            "grad_param/feed_forward.w1.weight": mlp.gate_proj.weight,
            "grad_param/feed_forward.w2.weight": mlp.down_proj.weight,
            "grad_param/feed_forward.w3.weight": mlp.up_proj.weight,
        },
    )
    q, k, v = (getattr(attention, f"{n}_proj").weight.grad for n in "qkv")
    fused = torch.cat([q.view(2, 2, 32, -1), k.view(2, 1, 32, -1), v.view(2, 1, 32, -1)], 1)
    assert_relative(fused.view(-1, 128), tensors["grad_param/attention.wqkv.weight"])


def test_decoder_layer_with_cache(golden, model):
    tensors = read(golden, "decoder_layer/cached/")
    text = model.model.language_model
    cache = DynamicCache()
    for index in range(2):  # layer 1 is recorded
        cache.update(tensors["past_key"], tensors["past_value"], index)
    x = tensors["hidden_states"]
    with torch.no_grad():
        rotary = text._self_table(x, tensors["position_ids"], place(torch.tensor([10])))
        out = text.layers[1](x, position_embeddings=rotary, past_key_values=cache)
    assert_relative(out, tensors["out"])
    assert_relative(cache.layers[1].keys[:, :, -1:], tensors["new_key"])
    assert_relative(cache.layers[1].values[:, :, -1:], tensors["new_value"])


def test_vision_tower(golden, inputs, model):
    tensors = read(golden, "vision/")
    tower, pixel_values = model.model.vision_tower, place(inputs.tiles(3, 1))
    with torch.no_grad():
        x = tower.embeddings(pixel_values)
        assert_relative(x, tensors["embeddings"])
        for depth in range(3):
            assert_relative(x, tensors[f"hidden_states/{depth}"], f"hidden state {depth}")
            x = tower.encoder.layer[depth](x) if depth < 2 else x
        features = model.model.project_images(pixel_values)
    assert_relative(features, tensors["extract_feature"])


@pytest.mark.parametrize(
    ("name", "seed", "size"), [("224", 4, (224, 224)), ("336x224", 5, (336, 224))]
)
def test_vision_tower_of_other_sizes(golden, inputs, model, name, seed, size):
    tensors = read(golden, f"vision{name}/")
    pixel_values = place(inputs.normalise(inputs.picture(seed, *size)[None]))
    with torch.no_grad():
        assert_relative(model.model.vision_tower.embeddings(pixel_values), tensors["embeddings"])
        if "extract_feature" in tensors:
            features = model.model.project_images(pixel_values)
            assert_relative(features, tensors["extract_feature"])
        else:
            with pytest.raises(
                ValueError, match=r"\[tiles, 3, side, side\], got \(1, 3, 224, 336\)"
            ):
                model.model.project_images(pixel_values)


def test_select_layer_stops_the_tower(golden, inputs, model):
    tensors = read(golden, "vision/")
    for select_layer, depth in ((-1, 2), (-2, 1), (-3, 0), (1, 1)):
        model.config.select_layer = select_layer
        norm, first, _, second = model.model.multi_modal_projector
        with torch.no_grad():
            x = norm(fold(tensors[f"hidden_states/{depth}"]))
            wanted = second(torch.nn.functional.gelu(first(x)))
            found = model.model.project_images(place(inputs.tiles(3, 1)))
        assert_relative(found, wanted, str(select_layer))


def fold(x: Tensor) -> Tensor:
    return ops.fold_tiles(x[:, 1:].unflatten(1, (32, 32))).flatten(1, 2)
