"""Tiny Mllama models of transformers, and prompts for them."""

import inspect
from typing import Any

import torch
from conftest import here
from torch import Tensor, nn
from transformers import DynamicCache, MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

TILES, PATCHES = 4, 5  # of an image, of a tile
CACHE = (
    "cache"
    if "cache" in inspect.signature(MllamaForConditionalGeneration.forward).parameters
    else "past_key_values"
)
# Whether the static cache of this release has room for the images.
STATIC = "_prepare_static_cache" in vars(MllamaForConditionalGeneration)


def tiny_mllama(implementation: str = "sdpa", seed: int = 0, **text: Any) -> nn.Module:
    """A model of two cross-attention layers with random weights, gates and norms included."""
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shapes = [[a, b] for a in range(1, 5) for b in range(1, 5) if a * b <= TILES]
    vision_config = MllamaVisionConfig(
        hidden_size=16,
        attention_heads=2,
        num_hidden_layers=1,
        num_global_layers=1,
        intermediate_size=16,
        image_size=28,
        patch_size=14,
        intermediate_layers_indices=[0],
        max_num_tiles=TILES,
        vision_output_dim=32,
        supported_aspect_ratios=shapes,
    )
    settings = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 3],
    }
    config = MllamaConfig(
        vision_config=vision_config, text_config=MllamaTextConfig(**settings | text, **ends), **ends
    )
    model = MllamaForConditionalGeneration._from_config(config, attn_implementation=implementation)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("norm" in name or "gate" in name):
                parameter.uniform_(0.4, 1.4, generator=draw)
            else:
                parameter.normal_(0, 0.15, generator=draw)
    model.generation_config.eos_token_id = None
    return model.eval().to(here())


def mask_of(kind: str, batch: int, tokens: int, images: int) -> Tensor:
    """int64 [batch, tokens, images, TILES].

    "runs": one run of tiles for each token, none for some, another image for later tokens and other
    prompts. "holes": a token sees parts of two images. "all": every tile.
    """
    mask = torch.zeros(batch, tokens, images, TILES, dtype=torch.long)
    if kind == "all":
        return mask + 1
    mask[:, 2:, 0, :3] = 1
    if kind == "holes":
        mask[:, 3:, -1, :2] = 1
        mask[:, 4:, 0, 1] = 0
        return mask
    mask[-1, :5] = 0
    mask[-1, 5:] = mask[-1, 5:].flip(1)
    return mask


def prompt_of(
    kind: str = "runs", batch: int = 2, tokens: int = 7, images: int = 2, factor: float = 1.0
) -> dict[str, Tensor]:
    """Inputs of a model: the first of several prompts begins with two tokens of padding."""
    draw = torch.Generator().manual_seed(tokens)
    attention = torch.ones(batch, tokens, dtype=torch.long)
    if batch > 1:
        attention[0, :2] = 0
    size = (batch, images, TILES, 3, 28, 28)
    prompt = {
        "input_ids": torch.randint(3, 150, (batch, tokens), generator=draw),
        "attention_mask": attention,
        "pixel_values": factor * torch.randn(size, generator=draw),
        "aspect_ratio_ids": torch.ones(batch, images, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(batch, images, TILES, dtype=torch.long),
        "cross_attention_mask": mask_of(kind, batch, tokens, images),
    }
    return {name: value.to(here()) for name, value in prompt.items()}


def two_steps(model: nn.Module, kind: str, batch: int, factor: float = 1.0) -> dict[str, Tensor]:
    """Logits of a prompt and of the next token, whose keys of the images come from a cache."""
    prompt = prompt_of(kind, batch, factor=factor)
    cache = DynamicCache(config=model.config)
    first = model(**prompt, **{CACHE: cache}).logits
    mask, attention = prompt["cross_attention_mask"], prompt["attention_mask"]
    second = model(
        input_ids=prompt["input_ids"][:, 2:3],
        attention_mask=torch.cat([attention, attention[:, -1:]], 1),
        cross_attention_mask=torch.cat([mask, mask[:, -1:]], 1),
        **{CACHE: cache},
    ).logits
    return {"prompt": first, "step": second}
