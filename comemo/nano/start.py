"""The untrained comemo-nano: its sizes and its tokenizer."""

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from comemo import prompts
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.nano.questions import questions_about, questions_about_pair
from comemo.nano.scenes import make_pair, make_scene
from comemo.nano.words import COLOURS, DIRECTIONS, FIELDS, LETTERS, SHAPES, WORDS
from comemo.processing.new_tokenizer import save_tokenizer

VOCABULARY = 1000  # at most
# The usual 1e6 is for long texts: most of its angles hardly differ within an image of 16 ids.
THETA = 1e4
# How many ids back the heads of the first layer look to begin with. Before an image there are 16
# tokens that are always the same, and with RoPE-DHR an image has 16 ids: so two heads tell each
# token of a tile where in the picture it is. The other two copy the words before.
BACK = (16, 13, 1, 2)


def make_start(directory: str | Path, seed: int = 0, **changes: dict) -> None:
    """Write the untrained model that the training of comemo-nano begins with.

    Args:
        directory: of the checkpoint; created if it does not exist.
        seed: of the weights. The same seed gives the same files.
        changes: of `llm_config`, `vision_config` and `mixin_config`, by name.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = save_tokenizer(
        directory,
        _sentences(),
        VOCABULARY,
        split_digits=True,
        max_sentencepiece_length=48,
        add_dummy_prefix=False,
    )
    parts: dict[str, dict[str, Any]] = {
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": THETA,
            "bias": False,
        },
        "vision_config": {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "image_size": 64,
            "patch_size": 8,
        },
        "mixin_config": {
            "language_dim": 128,
            "vision_dim": 128,
            "head_dim": 32,
            "num_heads": 4,
            "intermediate_size": 256,
            "mixin_every_n_layers": 2,
            "rope_theta": THETA,
        },
    }
    config = CoMemoConfig(**{name: own | changes.get(name, {}) for name, own in parts.items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CoMemoForConditionalGeneration(config)
        _spread_weights(model)
        _look_back(model)
        _look_for_the_same(model)
    model.save_pretrained(directory)


@torch.no_grad()
def _spread_weights(model: CoMemoForConditionalGeneration) -> None:
    """Weights that keep the scale of activations, and open gates.

    The usual 0.02 is for wide models: at this width a tower learns nothing for hundreds of steps.
    """
    for name, weight in model.named_parameters():
        if name.endswith("_gate"):
            weight.fill_(0.5)
        elif name.endswith("position_embeddings"):
            weight.normal_(0, 0.3)
        elif "lambda_" in name:  # scale of a vision layer's outputs
            weight.fill_(0.5)
        elif "embed_tokens" in name:
            weight.normal_(0, 0.5)
        elif weight.ndim > 1 and "cls_token" not in name and "mask_token" not in name:
            last = name.split(".")[-2] in ("o_proj", "down_proj", "fc2", "projection_layer")
            weight.normal_(0, (0.3 if last else 1) / math.sqrt(weight[0].numel()))


@torch.no_grad()
def _look_back(model: CoMemoForConditionalGeneration) -> None:
    """Make each head of the first layer copy the token so many ids back.

    A language model learns such heads from long texts. Here it would have to learn them from the
    few questions that need them, and at first knows no place for thousands of these.
    """
    language, projector = model.model.language_model, model.model.multi_modal_projector
    embeddings, layer = language.embed_tokens.weight, language.layers[0].self_attn
    width, size = embeddings.shape[1], layer.head_dim
    # All tokens and images share one direction, which gives queries and keys that are the same
    # everywhere before they are rotated.
    shared = torch.randn(width)
    shared *= 4 / shared.norm()
    embeddings += shared - (embeddings @ shared)[:, None] * shared / shared.dot(shared)
    projector[-1].bias += shared
    scale = embeddings.pow(2).mean().sqrt()
    read = 5 * scale * shared / shared.dot(shared)  # 5 for what is normalised
    theta = language.config.rope_parameters["rope_theta"]
    # Output weights like the embeddings: what a model sees is then what it says.
    own = embeddings - (embeddings @ shared)[:, None] * shared / shared.dot(shared)
    model.lm_head.weight.copy_(own * 2 / math.sqrt(width))
    angles = theta ** (-torch.arange(0, size, 2) / size)
    key = torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
    from_, to = (torch.linalg.qr(torch.randn(width, width))[0] for _ in range(2))
    for head, back in zip(range(language.config.num_attention_heads), BACK, strict=False):
        rows = slice(head * size, (head + 1) * size)
        query = torch.cat([torch.cos(back * angles), -torch.sin(back * angles)])
        layer.q_proj.weight[rows] = query[:, None] * read
        layer.k_proj.weight[rows] = key[:, None] * read
        layer.v_proj.weight[rows] = from_[rows] * scale
        layer.o_proj.weight[:, rows] = to[:, rows]


@torch.no_grad()
def _look_for_the_same(model: CoMemoForConditionalGeneration) -> None:
    """Make a head of later layers look at the tokens that are about the same thing.

    Queries like keys: "star" finds the image token that the tower has named so. Only angles that
    are slow to turn take part, so it hardly matters how far away the token is.
    """
    language = model.model.language_model
    shared = language.embed_tokens.weight.mean(0)
    shared /= shared.norm()
    for layer in language.layers[1:-1]:
        attention = layer.self_attn
        size, half = attention.head_dim, attention.head_dim // 2
        end = attention.q_proj.weight.shape[0]
        slow = torch.cat([torch.arange(half // 2, half), torch.arange(half + half // 2, size)])
        read = torch.linalg.qr(torch.randn(len(shared), len(shared)))[0][:half]
        read = 3.5 * (read - (read @ shared)[:, None] * shared)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[end - size :] *= 0.3
            projection.weight[end - size + slow] = read


def _sentences() -> Iterator[str]:
    """What the tokenizer learns: questions, answers, and the fixed texts of a chat."""
    for seed in range(1500):
        random = Random(seed)
        asked = questions_about(make_scene(seed), random)
        for question in asked + questions_about_pair(*make_pair(seed), random):
            yield question.text
            yield question.answer
    for word in (*WORDS, *LETTERS, *COLOURS, *SHAPES, *DIRECTIONS, *FIELDS):
        for _ in range(400):
            yield f"the word {word}"
            yield word
    for place in ("top", "bottom", "middle", "left", "right", "row", "column", "first", "second"):
        for _ in range(400):
            yield f"at the {place}"
    message = prompts.TEMPLATES["internlm2-chat"].system_message
    for _ in range(3000):
        yield from (f"system\n{message}", "user\n", "assistant\n")
