"""A model of four layers with random norms, gates and biases, and prompts for it."""

import torch
import torch.nn.functional as F
from conftest import here

from comemo import CoMemoConfig, CoMemoForConditionalGeneration
from comemo.cli.tiny_checkpoint import spread_weights


def place(inputs, device=None):
    """Move inputs by name, or tensors in lists and tuples, to a device; grids stay on the CPU."""
    device = device or here()
    if isinstance(inputs, dict):
        return {n: x if n == "tile_grid" else place(x, device) for n, x in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(place(x, device) for x in inputs)
    return inputs.to(device) if isinstance(inputs, torch.Tensor) else inputs


def make_model(dtype=torch.float32, heads=3, **llm):
    """Random weights, always the same; mixin layers of `heads` before the second and last layer."""
    torch.manual_seed(0)
    llm = {"vocab_size": 300, "num_hidden_layers": 4, "hidden_size": 64, "bias": False, **llm}
    llm |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    vision = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    vision |= {"num_attention_heads": 2, "image_size": 112, "patch_size": 14}
    mixin = {"language_dim": 64, "vision_dim": 64, "head_dim": 16, "num_heads": heads}
    mixin |= {"intermediate_size": 80, "mixin_every_n_layers": 2}
    config = CoMemoConfig(
        llm_config=llm, vision_config=vision, mixin_config=mixin, image_token_id=299
    )
    model = CoMemoForConditionalGeneration(config)
    spread_weights(model)
    for name, weight in model.model.language_model.named_parameters():
        if weight.ndim == 1 and not name.endswith("gate"):
            torch.nn.init.normal_(weight, 0.0 if name.endswith("bias") else 1.0, 0.4)
    return model.eval().requires_grad_(False).to(here(), dtype)


def make_prompts(model):
    """Two prompts: the first with one image and left padding, the second with two images."""
    config, side = model.config, model.config.vision_config.image_size[0]
    per = config.tokens_per_tile
    ids = torch.randint(10, 200, (2, 2 * per + 9))
    mask = torch.ones_like(ids)
    mask[0, :per] = 0
    ids[0, per + 4 : 2 * per + 4] = ids[1, 4 : 2 * per + 4] = config.image_token_id
    tiles = torch.randn(3, 3, side, side).to(model.dtype)
    grids = [(1, 1)] * 3
    prompts = {"input_ids": ids, "attention_mask": mask, "pixel_values": tiles}
    return place(prompts) | {"tile_grid": grids}


def one_more(prompts, out):
    """Inputs of a decode step after the prefill: a token per prompt, KV cache, image memory."""
    return {
        "input_ids": torch.full((2, 1), 7, device=here()),
        "attention_mask": F.pad(prompts["attention_mask"], (0, 1), value=1),
        "past_key_values": out.past_key_values,
        "image_memory": out.image_memory,
    }


@torch.no_grad()
def logits_of(model, prompts):
    """Logits [T, vocabulary] of all tokens except padding, then of a decode step per prompt."""
    out = model(**prompts, use_cache=True)
    whole = out.logits[prompts["attention_mask"].bool()]
    return torch.cat([whole, model(**one_more(prompts, out)).logits.flatten(0, 1)])
