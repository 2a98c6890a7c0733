"""Make a tiny untrained checkpoint in the published layout."""

import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.tokenizer import ADDED_TOKENS, InternLM2Tokenizer

# As in the published vocabulary, unused pieces with a new name. `ADDED_TOKENS` follow the last one.
RENAMED_TOKENS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
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


def save_tokenizer(
    directory: Path, sentences: Iterable[str], vocab_size: int, **options: Any
) -> int:
    """Train a tokenizer and save it in the published layout.

    Args:
        directory: of the checkpoint, which exists.
        sentences: what it is trained on.
        vocab_size: at most, without `ADDED_TOKENS`.
        options: of `SentencePieceTrainer.train`.

    Returns:
        The size of the vocabulary, with `ADDED_TOKENS`.
    """
    import sentencepiece

    unused = [f"[UNUSED_TOKEN_{i}]" for i in range(len(RENAMED_TOKENS))]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=trained,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=unused,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    proto = trained.getvalue()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2}
    ids |= {
        name: pieces.piece_to_id(piece) for name, piece in zip(RENAMED_TOKENS, unused, strict=True)
    }
    ids |= {name: pieces.vocab_size() + i for i, name in enumerate(ADDED_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    published = {
        "tokenizer_class": "InternLM2Tokenizer",
        "added_tokens_decoder": {
            str(index): {"content": name, "special": True, **flags} for name, index in ids.items()
        },
        "additional_special_tokens": [*RENAMED_TOKENS, *ADDED_TOKENS],
    }
    (directory / "tokenizer.model").write_bytes(proto)
    (directory / "tokenizer_config.json").write_text(json.dumps(published), encoding="utf-8")
    InternLM2Tokenizer.from_pretrained(directory).save_pretrained(directory)
    return pieces.vocab_size() + len(ADDED_TOKENS)
