"""Make a tiny untrained checkpoint in the published layout."""

import math
from pathlib import Path

import torch

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.processing.new_tokenizer import save_tokenizer

_SENTENCES = (
    "the picture shows a quiet harbour in the evening sun.",
    "a small boat with a red sail lies on the calm water.",
    "what is in this picture? the sky is wide and the hills are far away.",
    "two birds fly over the old lighthouse near the green coast.",
    "who is on the boat? nobody, the wind is gone and the day is over.",
    "count the windows of the white house and read the sign above its door.",
)


def make_checkpoint(directory: str | Path, seed: int = 0) -> None:
    """Write a tiny untrained checkpoint in the published layout: config, weights, tokenizer.

    Args:
        directory: of the checkpoint; created if it does not exist.
        seed: of the weights. The same seed gives the same files.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = save_tokenizer(directory, _SENTENCES, 440)
    config = CoMemoConfig(
        llm_config={
            "architectures": ["InternLM2ForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "bias": False,
        },
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": 448,
            "patch_size": 14,
        },
        mixin_config={
            "language_dim": 256,
            "vision_dim": 256,
            "head_dim": 64,
            "num_heads": 4,
            "intermediate_size": 512,
            "mixin_every_n_layers": 2,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CoMemoForConditionalGeneration(config)
        spread_weights(model)
    model.save_pretrained(directory)


@torch.no_grad()
def spread_weights(model: CoMemoForConditionalGeneration) -> None:
    """Make every part contribute: open gates, and weights that keep the scale of activations."""
    for name, weight in model.named_parameters():
        if name.endswith("_gate"):
            weight.fill_(0.5 + 0.5 * torch.rand(1).item())
        elif "embed_tokens" in name or "lm_head" in name:
            weight.normal_(0, 1 / math.sqrt(weight.shape[-1]))
        elif weight.ndim == 2:
            weight.normal_(0, 0.7 / math.sqrt(weight.shape[1]))
