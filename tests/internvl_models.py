"""Tiny InternVLs of transformers, and prompts with images of several tiles."""

import copy

import pytest
import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from comemo_kernels.patching import internvl_features

IMAGE = 63  # the token of an image


def make_internvl(side=2, ratio=0.5, attention="sdpa", **options):
    """A model whose tiles have side * side image tokens, with weights that make ids matter."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": int(4 * side / ratio),
            "patch_size": 4,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_id=IMAGE,
        downsample_ratio=ratio,
        attn_implementation=attention,
        **options,
    )
    model = InternVLForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "vision" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def make_prompts(grids=(((2, 1),), ((1, 1), (1, 2))), side=2, ratio=0.5, padding=None):
    """Inputs of `forward`: each prompt is words, then its images, each with words after it."""
    rows = []
    for own in grids:
        row = torch.randint(3, IMAGE, (3,)).tolist()
        for cols, rows_ in own:
            tiles = cols * rows_ + (cols * rows_ > 1)
            row += [IMAGE] * (tiles * side * side) + torch.randint(3, IMAGE, (3,)).tolist()
        rows.append(row)
    length = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding == "right" else slice(length - len(row), length)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    tiles = int((ids == IMAGE).sum()) // side**2
    pixels = int(4 * side / ratio)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(tiles, 3, pixels, pixels),
    }


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    return make_internvl()


@pytest.fixture
def model(shared):
    """A model that a test may change."""
    return copy.deepcopy(shared)


@pytest.fixture
def prompts():
    return make_prompts(padding="left")


@torch.no_grad()
def logits_of(model, prompts):
    return model(**prompts).logits


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Counted:
    """Counts the calls of `project_tiles`."""

    def __init__(self, monkeypatch):
        self.calls, run = 0, internvl_features.project_tiles

        def counted(*args, **kwargs):
            self.calls += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(internvl_features, "project_tiles", counted)
