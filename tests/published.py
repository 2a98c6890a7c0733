"""Tiny checkpoints in the published layout, written from its description."""

import json

import torch
from safetensors.torch import save_file

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "pad_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 14,
    "qkv_bias": True,
    "norm_type": "layer_norm",
}
MIXIN = {
    "language_dim": 32,
    "vision_dim": 32,
    "head_dim": 16,
    "num_heads": 3,  # inner width 48, other than the language model's
    "intermediate_size": 40,
    "mixin_every_n_layers": 2,
}
INTERNLM2 = {"architectures": ["InternLM2ForCausalLM"], "bias": False, "rope_theta": 1e6}
LLAMA = {"architectures": ["LlamaForCausalLM"], "rope_theta": 1e4}
VARIANTS = {  # arguments of `published_config`
    "internlm2": {},
    "attention_bias": {"llm": {"bias": True}},
    "many_kv_heads": {"llm": {"num_key_value_heads": 4}},
    "llama": {"llm": LLAMA},
    "llama_bias": {"llm": LLAMA | {"attention_bias": True}},
    "linear_rope": {"llm": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
    "qk_norm": {"vision": {"qk_normalization": True, "layer_norm_eps": 1e-3}},
    "rms_norm": {"vision": {"norm_type": "rms_norm", "qkv_bias": False}},
    "fold_v1": {"top": {"ps_version": "v1", "select_layer": -2}},
    "odd_width": {
        "llm": {"hidden_size": 40},
        "mixin": {"language_dim": 40, "vision_dim": 40},
    },
    "mixin_every_layer": {"mixin": {"mixin_every_n_layers": 1, "head_dim": 8}},
}


def published_config(llm=None, vision=None, mixin=None, top=None):
    return {
        "model_type": "comemo_chat",
        "architectures": ["CoMemoChatModel"],
        "auto_map": {"AutoModel": "modeling_comemo_chat.CoMemoChatModel"},
        "llm_config": TEXT | INTERNLM2 | (llm or {}),
        "vision_config": VISION | {"image_size": 56} | (vision or {}),
        "mixin_config": MIXIN | (mixin or {}),
        "force_image_size": 56,
        "select_layer": -1,
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "template": "internlm2-chat",
        "torch_dtype": "float32",
    } | (top or {})


def published_weights(config):
    """Random weights with the published names and shapes."""
    llm, vision, mixin = (config[f"{part}_config"] for part in ("llm", "vision", "mixin"))
    d, f, h, g = (
        llm[k]
        for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    head = d // h
    shapes = {}
    internlm2 = llm["architectures"] == ["InternLM2ForCausalLM"]
    for i in range(llm["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}"
        own = f"{layer}.decoder_layer"
        if internlm2:
            shapes |= {
                f"{own}.attention.wqkv.weight": ((h + 2 * g) * head, d),
                f"{own}.attention.wo.weight": (d, d),
                f"{own}.feed_forward.w1.weight": (f, d),
                f"{own}.feed_forward.w3.weight": (f, d),
                f"{own}.feed_forward.w2.weight": (d, f),
                f"{own}.attention_norm.weight": (d,),
                f"{own}.ffn_norm.weight": (d,),
            }
            if llm["bias"]:
                shapes[f"{own}.attention.wqkv.bias"] = ((h + 2 * g) * head,)
                shapes[f"{own}.attention.wo.bias"] = (d,)
        else:
            rows = {"q_proj": d, "k_proj": g * head, "v_proj": g * head, "o_proj": d}
            for name, size in rows.items():
                shapes[f"{own}.self_attn.{name}.weight"] = (size, d)
                if llm.get("attention_bias"):
                    shapes[f"{own}.self_attn.{name}.bias"] = (size,)
            shapes |= {
                f"{own}.mlp.gate_proj.weight": (f, d),
                f"{own}.mlp.up_proj.weight": (f, d),
                f"{own}.mlp.down_proj.weight": (d, f),
                f"{own}.input_layernorm.weight": (d,),
                f"{own}.post_attention_layernorm.weight": (d,),
            }
        if (i + 1) % mixin["mixin_every_n_layers"] == 0:
            block = f"{layer}.gated_cross_attn_layer"
            inner, wide = mixin["num_heads"] * mixin["head_dim"], mixin["intermediate_size"]
            shapes |= {
                f"{block}.cross_attention_norm.weight": (d,),
                f"{block}.cross_attn.to_q.weight": (inner, d),
                f"{block}.cross_attn.to_kv.weight": (2 * inner, d),
                f"{block}.cross_attn.to_out.weight": (d, inner),
                f"{block}.attn_gate": (1,),
                f"{block}.ff_gate": (1,),
                f"{block}.ffn_norm_2.weight": (d,),
                f"{block}.ffn_2.w1.weight": (wide, d),
                f"{block}.ffn_2.w3.weight": (wide, d),
                f"{block}.ffn_2.w2.weight": (d, wide),
            }
    embed, head_name = (
        ("model.tok_embeddings", "output") if internlm2 else ("model.embed_tokens", "lm_head")
    )
    shapes |= {
        f"language_model.{embed}.weight": (llm["vocab_size"], d),
        f"language_model.{head_name}.weight": (llm["vocab_size"], d),
        "language_model.model.norm.weight": (d,),
    }
    c, w = vision["hidden_size"], vision["intermediate_size"]
    shapes |= {
        "vision_model.embeddings.class_embedding": (1, 1, c),
        "vision_model.embeddings.position_embedding": (1, 17, c),
        "vision_model.embeddings.patch_embedding.weight": (c, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (c,),
        "mlp1.0.weight": (4 * c,),
        "mlp1.0.bias": (4 * c,),
        "mlp1.1.weight": (d, 4 * c),
        "mlp1.1.bias": (d,),
        "mlp1.3.weight": (d, d),
        "mlp1.3.bias": (d,),
    }
    for i in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{i}"
        shapes |= {
            f"{layer}.ls1": (c,),
            f"{layer}.ls2": (c,),
            f"{layer}.attn.qkv.weight": (3 * c, c),
            f"{layer}.attn.proj.weight": (c, c),
            f"{layer}.attn.proj.bias": (c,),
            f"{layer}.norm1.weight": (c,),
            f"{layer}.norm2.weight": (c,),
            f"{layer}.mlp.fc1.weight": (w, c),
            f"{layer}.mlp.fc1.bias": (w,),
            f"{layer}.mlp.fc2.weight": (c, w),
            f"{layer}.mlp.fc2.bias": (c,),
        }
        if vision["qkv_bias"]:
            shapes[f"{layer}.attn.qkv.bias"] = (3 * c,)
        if vision["norm_type"] == "layer_norm":
            shapes |= {f"{layer}.norm1.bias": (c,), f"{layer}.norm2.bias": (c,)}
        if vision.get("qk_normalization"):
            shapes |= {f"{layer}.attn.q_norm.weight": (c,), f"{layer}.attn.k_norm.weight": (c,)}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def write(directory, config, weights):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
