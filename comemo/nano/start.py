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
from comemo.nano.heads import add_heads, share_directions
from comemo.nano.questions import plural, questions_about, questions_about_pair
from comemo.nano.scenes import make_pair, make_scene
from comemo.nano.words import (
    COLOURS,
    COLUMNS,
    DIRECTIONS,
    FIELDS,
    LETTERS,
    ROWS,
    SHAPES,
    WORDS,
    place_name,
)
from comemo.processing.new_tokenizer import SPACE, save_tokenizer
from comemo.tokenizer import InternLM2Tokenizer

VOCABULARY = 1000  # at most
# The usual 1e6 is for long texts: most of its angles hardly differ within an image of 16 ids.
THETA = 1e4
PLACES = [place_name(row, column) for row in ROWS for column in COLUMNS]
COUNTED = (*SHAPES, "shape", "word", "letter", "number", "dot", "bar")
SIDE = 4  # rows and columns of the tokens of an image
ALIKE = 0.9  # cosine of words that mean the same


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
        [space + name for space in ("", " ") for name in PLACES],
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
        spread_weights(model)
        _liken_words(model, directory)
        share_directions(model, _names(directory))
        add_heads(model, _places(directory), *_after_question(directory))
    model.save_pretrained(directory)


@torch.no_grad()
def spread_weights(model: CoMemoForConditionalGeneration) -> None:
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
    """Make words that mean the same much alike: "star", " star" and " stars" are three tokens."""
    ids = InternLM2Tokenizer.from_pretrained(directory).get_vocab()
    embeddings = model.model.language_model.embed_tokens.weight
    alike = {ids.get(SPACE + word): index for word, index in ids.items()}
    for noun in COUNTED:
        one = ids[SPACE + noun]
        alike[ids[SPACE + plural(noun)]] = alike.get(one, one)
    for other, index in alike.items():
        if other is not None:
            embeddings[other] *= math.sqrt(1 - ALIKE**2)
            embeddings[other] += ALIKE * embeddings[index]


def _places(directory: Path) -> dict[int, dict[int, dict[int, float]]]:
    """What is before an image tells where in it a token is: `places` of `add_heads`."""
    tokenizer = InternLM2Tokenizer.from_pretrained(directory)
    prompt = prompts.build_prompt([("<image>", None)], "internlm2-chat")
    before = tokenizer(prompt.split("<image>")[0] + "<img>")["input_ids"]
    count = SIDE * SIDE
    if len(before) != count:
        raise ValueError(f"make_start: wanted {count} tokens before an image, got {len(before)}")
    # Both heads know all of these tokens, to read nothing of the other's.
    found: dict[int, dict[int, dict[int, float]]]
    found = {back: {token: {} for token in before} for back in (count, count - 1)}
    for index, token in enumerate(before):
        named = _lines(index // SIDE, 0) | _lines(index % SIDE, len(ROWS))
        if before.count(token) == 1:
            found[count][token] = named
        else:  # the one after it is not there twice
            found[count - 1][before[index + 1]] = named
    return found


def _lines(at: int, first: int) -> dict[int, float]:
    """How well each of five rows or columns, counted from `first`, names one of `SIDE`."""
    fitting = ({0: 1.0}, {0: 0.3, 1: 0.8, 2: 0.5}, {2: 0.5, 3: 0.8, 4: 0.3}, {4: 1.0})[at]
    return {first + line: weight for line, weight in fitting.items()}


def _names(directory: Path) -> dict[int, tuple[int, int]]:
    """Id of the name of a place -> its row and column, as `share_directions` counts them."""
    ids = InternLM2Tokenizer.from_pretrained(directory).get_vocab()
    return {
        ids[space + place_name(row, column).replace(" ", SPACE)]: (down, len(ROWS) + right)
        for down, row in enumerate(ROWS)
        for right, column in enumerate(COLUMNS)
        for space in ("", SPACE)
    }


def _after_question(directory: Path) -> tuple[int, int]:
    """Tokens from the last word of a question to the end of the prompt, and the id of the last."""
    prompt = prompts.build_prompt([("Which colour is the star?", None)], "internlm2-chat")
    encode = InternLM2Tokenizer.from_pretrained(directory)
    ids, before = (encode(text)["input_ids"] for text in (prompt, prompt.split("?")[0]))
    return len(ids) - len(before), ids[-1]


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
    for which in ("first", "second"):
        for _ in range(400):
            yield f"the {which}"
    message = prompts.TEMPLATES["internlm2-chat"].system_message
    for _ in range(3000):
        yield from (f"system\n{message}", "user\n", "assistant\n")
