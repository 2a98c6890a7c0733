"""Load a checkpoint that is small enough for any machine."""

from typing import Any

import torch

from comemo.cli.info import read_config
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.device import default_device
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
