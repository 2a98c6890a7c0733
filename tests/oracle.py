"""The published model, written independently from the names of its weights: no shared code.

Only for tiny checkpoints: loops over prompts, layers and groups of heads, in the dtype of `w`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [heads, tokens, D], halves rotated by positions * theta ** (-2i/D)."""
    half = x.shape[-1] // 2
    angle = positions.to(x.dtype)[:, None] * theta ** (-torch.arange(half).to(x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """[heads, tokens, D] -> [tokens, heads * D]."""
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def see(w: dict[str, Tensor], config: dict, tile: Tensor) -> Tensor:
    """Image tokens [tokens, d] of one tile [3, side, side]."""
    vision, p = config["vision_config"], "vision_model."
    eps, depth = vision.get("layer_norm_eps", 1e-6), config["select_layer"]
    depth %= vision["num_hidden_layers"] + 1

    def norm(x: Tensor, name: str) -> Tensor:
        if vision["norm_type"] == "rms_norm":
            return rms(x, w[f"{name}.weight"], eps)
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    patches = F.conv2d(
        tile[None],
        w[f"{p}embeddings.patch_embedding.weight"],
        w[f"{p}embeddings.patch_embedding.bias"],
        stride=vision["patch_size"],
    )
    x = torch.cat([w[f"{p}embeddings.class_embedding"][0], patches[0].flatten(1).T])
    x = x + w[f"{p}embeddings.position_embedding"][0]
    for i in range(depth):
        layer, count = f"{p}encoder.layers.{i}.", vision["num_attention_heads"]
        bias = w.get(f"{layer}attn.qkv.bias")
        q, k, v = F.linear(norm(x, f"{layer}norm1"), w[f"{layer}attn.qkv.weight"], bias).chunk(
            3, -1
        )
        if vision.get("qk_normalization"):
            q, k = (rms(t, w[f"{layer}attn.{n}_norm.weight"], eps) for t, n in ((q, "q"), (k, "k")))
        out = attend(*(heads(t, count) for t in (q, k, v)))
        out = F.linear(out, w[f"{layer}attn.proj.weight"], w[f"{layer}attn.proj.bias"])
        x = x + w[f"{layer}ls1"] * out
        out = F.linear(
            norm(x, f"{layer}norm2"), w[f"{layer}mlp.fc1.weight"], w[f"{layer}mlp.fc1.bias"]
        )
        out = F.linear(F.gelu(out), w[f"{layer}mlp.fc2.weight"], w[f"{layer}mlp.fc2.bias"])
        x = x + w[f"{layer}ls2"] * out
    side = round((len(x) - 1) ** 0.5)
    raster = x[1:].view(side, side, -1)
    cells = [
        torch.cat([raster[2 * r + a, 2 * c + b] for a in (0, 1) for b in (0, 1)])
        for r in range(side // 2)
        for c in range(side // 2)
    ]
    x = torch.stack(cells)
    if config["ps_version"] == "v1":
        x = x.view(side // 2, side // 2, -1).transpose(0, 1).flatten(0, 1)
    x = F.layer_norm(x, x.shape[-1:], w["mlp1.0.weight"], w["mlp1.0.bias"])
    x = F.gelu(F.linear(x, w["mlp1.1.weight"], w["mlp1.1.bias"]))
    return F.linear(x, w["mlp1.3.weight"], w["mlp1.3.bias"])


def logits(
    w: dict[str, Tensor],
    config: dict,
    input_ids: Tensor,
    position_ids: Tensor,
    image_id: int,
    pixel_values: Tensor,
) -> Tensor:
    """[tokens, vocabulary] of one prompt [tokens] with its tiles."""
    llm, mixin = config["llm_config"], config["mixin_config"]
    eps, theta = llm["rms_norm_eps"], llm["rope_theta"]
    internlm2 = llm["architectures"] == ["InternLM2ForCausalLM"]
    media = torch.cat([see(w, config, tile) for tile in pixel_values])
    image = input_ids == image_id
    names = ("tok_embeddings", "output") if internlm2 else ("embed_tokens", "lm_head")
    x = w[f"language_model.model.{names[0]}.weight"][input_ids]
    x[image] = media
    scaling = llm.get("rope_scaling") or {}
    places = position_ids / scaling["factor"] if scaling.get("type") == "linear" else position_ids
    count, kv = llm["num_attention_heads"], llm["num_key_value_heads"]
    for i in range(llm["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}."
        if (i + 1) % mixin["mixin_every_n_layers"] == 0:
            x = mix(w, f"{layer}gated_cross_attn_layer.", mixin, x, media, position_ids, image)
        layer += "decoder_layer."
        y = rms(
            x, w[layer + ("attention_norm" if internlm2 else "input_layernorm") + ".weight"], eps
        )
        if internlm2:
            fused = F.linear(
                y, w[f"{layer}attention.wqkv.weight"], w.get(f"{layer}attention.wqkv.bias")
            )
            fused = fused.unflatten(-1, (kv, count // kv + 2, -1))  # kv head, [q..., k, v], D
            q, k, v = fused[:, :, :-2].flatten(1), fused[:, :, -2].flatten(1), fused[:, :, -1]
            v, out_name = v.flatten(1), f"{layer}attention.wo"
        else:
            q, k, v = (
                F.linear(y, w[f"{layer}self_attn.{n}.weight"], w.get(f"{layer}self_attn.{n}.bias"))
                for n in ("q_proj", "k_proj", "v_proj")
            )
            out_name = f"{layer}self_attn.o_proj"
        q, k = rotate(heads(q, count), places, theta), rotate(heads(k, kv), places, theta)
        out = attend(q, k, heads(v, kv), causal=True)
        x = x + F.linear(out, w[f"{out_name}.weight"], w.get(f"{out_name}.bias"))
        ffn = (
            ("ffn_norm", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
            if internlm2
            else ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        )
        norm, gate, up, down = (w[f"{layer}{name}.weight"] for name in ffn)
        y = rms(x, norm, eps)
        x = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
    head = "language_model." + names[1] + ".weight"
    return F.linear(rms(x, w["language_model.model.norm.weight"], eps), w[head])


def mix(
    w: dict[str, Tensor],
    name: str,
    mixin: dict,
    x: Tensor,
    media: Tensor,
    positions: Tensor,
    image: Tensor,
) -> Tensor:
    norm, count = w[f"{name}cross_attention_norm.weight"], mixin["num_heads"]
    q = heads(F.linear(rms(x, norm, 1e-5), w[f"{name}cross_attn.to_q.weight"]), count)
    k, v = F.linear(rms(media, norm, 1e-5), w[f"{name}cross_attn.to_kv.weight"]).chunk(2, -1)
    q, k = rotate(q, positions, 1e6), rotate(heads(k, count), positions[image], 1e6)
    out = F.linear(attend(q, k, heads(v, count)), w[f"{name}cross_attn.to_out.weight"])
    x = x + w[f"{name}attn_gate"].tanh() * out
    y = rms(x, w[f"{name}ffn_norm_2.weight"], 1e-5)
    gate, up, down = (w[f"{name}ffn_2.{n}.weight"] for n in ("w1", "w3", "w2"))
    return x + w[f"{name}ff_gate"].tanh() * F.linear(
        F.silu(F.linear(y, gate)) * F.linear(y, up), down
    )
