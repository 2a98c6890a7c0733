"""Load a checkpoint that is small enough for any machine, or the tokenizer of any."""

import os
from typing import Any

import torch

from comemo import prompts
from comemo.chat.driver import check_tokenizer
from comemo.cli.info import read_config
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.device import default_device
from comemo.processing.tokenizer_files import CheckpointTokenizer
from comemo.processor import CoMemoProcessor
from comemo.safety.regular import check_settings_files


def load_checkpoint(directory: str) -> tuple[CoMemoForConditionalGeneration, CoMemoProcessor]:
    """Load a small checkpoint in float32, on the best device.

    Args:
        directory: of the checkpoint.

    Raises:
        ValueError, OSError: it is not a whole checkpoint of this model.
    """
    read_config(directory)
    check_settings_files(directory)
    processor = CoMemoProcessor.from_pretrained(directory)
    model: Any = CoMemoForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    return model.to(default_device()), processor


def load_tokenizer(directory: str, config: CoMemoConfig) -> Any:
    """Load the tokenizer of a checkpoint, and check it before its weights are loaded.

    Args:
        directory: of the checkpoint.
        config: of the checkpoint.

    Raises:
        ValueError, OSError: files are missing or cannot be used, control tokens are missing, or
            there are more tokens than the model knows.
    """
    check_settings_files(directory)
    # For a missing file transformers' message is about other kinds of tokenizers.
    for *names, name in (("tokenizer_config.json",), ("tokenizer.json", "tokenizer.model")):
        if not any(os.path.lexists(os.path.join(directory, n)) for n in (*names, name)):
            raise ValueError(f"{directory!r} has no {name}")
    tokenizer = CheckpointTokenizer.from_pretrained(directory)
    check_tokenizer(tokenizer, prompts.stop_text(config.template))
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"{directory!r}: the tokenizer must have at most the model's"
            f" {config.text_config.vocab_size:,} tokens, got {len(tokenizer):,}"
        )
    return tokenizer
