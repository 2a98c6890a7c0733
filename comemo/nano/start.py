"""The untrained comemo-nano: its sizes and its tokenizer."""

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comemo import prompts
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.nano.questions import questions_about, questions_about_pair
from comemo.nano.scenes import make_pair, make_scene
from comemo.nano.words import COLOURS, DIRECTIONS, FIELDS, LETTERS, SHAPES, WORDS
from comemo.processing.new_tokenizer import save_tokenizer
from comemo.tokenizer import InternLM2Tokenizer

VOCABULARY = 1000  # at most
# The usual 1e6 is for long texts: most of its angles hardly differ within an image of 16 ids.
THETA = 1e4
# How many ids back the heads of the first layer look to begin with. Before an image there are 16
# tokens that are always the same, and with RoPE-DHR an image has 16 ids: so two heads tell each
# token of a tile where in the picture it is. The other two copy the words before.
BACK = (16, 13, 1, 2)
SHARED = 4.0  # how much of the direction that all words and images share
COPIED = 0.5  # how much of what they copy, relative to the words
SPACE, ALIKE = "\u2581", 0.9  # cosine of a word and the same word after a space


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
        _liken_words(model, directory)
        _add_heads(model, _after_question(directory))
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
def _liken_words(model: CoMemoForConditionalGeneration, directory: Path) -> None:
    """Make a word after a space much like the same word without: they are two tokens."""
    tokenizer = InternLM2Tokenizer.from_pretrained(directory)
    ids = tokenizer.get_vocab()
    embeddings = model.model.language_model.embed_tokens.weight
    for word, index in ids.items():
        if (spaced := ids.get(SPACE + word)) is not None:
            embeddings[spaced] *= math.sqrt(1 - ALIKE**2)
            embeddings[spaced] += ALIKE * embeddings[index]


@torch.no_grad()
def mark_images(model: CoMemoForConditionalGeneration) -> None:
    """Give all image tokens the same part along the directions of `_shared` and `_mark`.

    So heads can ask for "so many ids back" and "an image". It is done again after the projector
    was trained.
    """
    projector = model.model.multi_modal_projector[-1]
    for own in (_shared(model), _mark(model)):
        projector.weight -= own[:, None] * (own @ projector.weight)
        projector.bias += (SHARED - projector.bias @ own) * own


def _shared(model: CoMemoForConditionalGeneration) -> Tensor:
    """The direction [width] that all words and images share."""
    return F.normalize(model.get_input_embeddings().weight.mean(0), dim=0)


def _mark(model: CoMemoForConditionalGeneration) -> Tensor:
    """The direction [width] that images have and words do not."""
    shared = _shared(model)
    mark = torch.randn(len(shared), generator=torch.Generator().manual_seed(0))
    return F.normalize(mark - (mark @ shared) * shared, dim=0)


@torch.no_grad()
def _add_heads(model: CoMemoForConditionalGeneration, asked: int) -> None:
    """Make some heads do what a language model learns from long texts.

    Here it would have to learn it from the few questions that need it, and at first knows no use
    for it for thousands of these. In the first layer each token copies those `BACK` ids back. After
    it, a word copies from the image tokens that are about the same thing, and the end of a prompt
    copies the end of the question.

    Args:
        model: new.
        asked: tokens from the last word of a question to the end of the prompt.
    """
    language, embeddings = model.model.language_model, model.get_input_embeddings().weight
    width = embeddings.shape[1]
    shared = torch.randn(width)
    shared /= shared.norm()
    embeddings += (SHARED - embeddings @ shared)[:, None] * shared
    shared, mark = _shared(model), _mark(model)
    embeddings -= (embeddings @ mark)[:, None] * mark
    mark_images(model)
    words = shared - mark  # nothing of an image
    own = embeddings - (embeddings @ shared)[:, None] * shared
    # Output weights like the embeddings: what a model sees is then what it says.
    model.lm_head.weight.copy_(own * 2 / math.sqrt(width))
    first, *others, last = (layer.self_attn for layer in language.layers)
    theta = language.config.rope_parameters["rope_theta"]
    usual = embeddings.pow(2).mean().sqrt() / SHARED  # normalised: 1 / usual of either direction
    from_, to = (torch.linalg.qr(torch.randn(width, width))[0] for _ in range(2))
    for head, back in zip(range(language.config.num_attention_heads), BACK, strict=False):
        rows = _look_back(first, head, back, 5 * usual * shared, 5 * usual * words, theta)
        scale = COPIED * embeddings.pow(2).mean().sqrt()
        first.v_proj.weight[rows] = from_[rows] * scale
        first.o_proj.weight[:, rows] = to[:, rows]
    for index, attention in enumerate([*others, last]):
        # What a layer found is copied to the end of the prompt by the next.
        if index % 2 == 0:
            copied = torch.linalg.qr(torch.randn(width, width))[0][: attention.head_dim]
            for direction in (shared, mark):
                copied = copied - (copied @ direction)[:, None] * direction
        both = []
        if attention is not last:
            both.append(_look_for_the_same(attention, usual * shared, usual * mark))
        if index:
            back = asked + (index + 1) % 2
            read = 10 * usual * shared, 10 * usual * words
            both.append(_look_back(attention, -2, back, *read, theta))
        for rows in both:
            attention.v_proj.weight[rows] = copied
            attention.o_proj.weight[:, rows] = COPIED * copied.T


def _look_back(
    attention: Any, head: int, back: int, queries: Tensor, keys: Tensor, theta: float
) -> slice:
    """Make a head look so many ids back, along these directions; its rows."""
    rows, size = _rows(attention, head), attention.head_dim
    angles = theta ** (-torch.arange(0, size, 2) / size)
    query = torch.cat([torch.cos(back * angles), -torch.sin(back * angles)])
    key = torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
    attention.q_proj.weight[rows] = query[:, None] * queries
    attention.k_proj.weight[rows] = key[:, None] * keys
    return rows


def _look_for_the_same(attention: Any, shared: Tensor, mark: Tensor) -> slice:
    """Make the last head look at image tokens that are about the same thing; its rows.

    Queries like keys: "star" finds the image tokens that the tower has named so. Only angles that
    are slow to turn take part, so it hardly matters how far away they are. Without the mark of
    images a word finds itself first.
    """
    rows, size = _rows(attention, -1), attention.head_dim
    half, width = size // 2, len(shared)
    slow = torch.cat([torch.arange(half // 2, half - 1), torch.arange(half + half // 2, size - 1)])
    read = torch.linalg.qr(torch.randn(width, width))[0][: len(slow)]
    for own in (shared, mark):
        read = read - (read @ own)[:, None] * own / own.dot(own)
    for weight, own in ((attention.q_proj.weight, shared), (attention.k_proj.weight, mark)):
        weight[rows] *= 0.3
        weight[rows.start + slow] = 3 * read
        weight[rows.start + half - 1] = math.sqrt(80 * math.sqrt(size)) * own
        weight[rows.stop - 1] = 0
    return rows


def _rows(attention: Any, head: int) -> slice:
    size = attention.head_dim
    count = attention.q_proj.weight.shape[0] // size
    first = head % count * size
    return slice(first, first + size)


def _after_question(directory: Path) -> int:
    """Tokens from the last word of a question to the end of the prompt."""
    prompt = prompts.build_prompt([("Which colour is the star?", None)], "internlm2-chat")
    encode = InternLM2Tokenizer.from_pretrained(directory)
    return len(encode(prompt)["input_ids"]) - len(encode(prompt.split("?")[0])["input_ids"])


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
