"""`python -m bench.published_model.check`: the patch on whatever transformers is installed.

The published code is for transformers 4.37 to 4.41, which `comemo` does not support, so this runs
without it: greedy tokens, beams and text alone, patched and as published, which after 4.41 needs
the patch's repair of `generate`. Exits with 1 if anything differs.
"""

import copy
import sys
from typing import Any

import torch
import transformers

import comemo_kernels as ops
from bench.published_model.chat_model import CoMemoChatConfig, CoMemoChatModel, repair_generate

SIZES = {
    "llm_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
    "mixin_config": {
        "language_dim": 64,
        "vision_dim": 64,
        "head_dim": 16,
        "num_heads": 3,
        "intermediate_size": 80,
        "mixin_every_n_layers": 2,
    },
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 56,
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "text alone": {"text": True},
}


def differences() -> list[str]:
    """What the patched model generates otherwise than the published one."""
    torch.manual_seed(0)
    model = CoMemoChatModel(CoMemoChatConfig(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.5 if name.endswith("gate") else 0.2)
    model.img_context_token_id = 7
    published = copy.deepcopy(model)
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not (4, 37) <= release <= (4, 41):
        repair_generate(published)
    found = []
    for name, options in OPTIONS.items():
        options = dict(options)
        row = list(range(10, 22)) + ([] if options.pop("text", False) else [7] * 12 + [30, 31])
        ids = torch.tensor([row])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["position_ids"] = torch.arange(len(row))[None]
        if 7 in row:
            inputs["pixel_values"] = torch.randn(3, 3, 56, 56)
            positions = ops.rope_dhr_positions(ids == 7, torch.ones_like(ids), [(2, 1)], 2)
            inputs["position_ids"] = positions
            inputs["cross_attention_media_position_ids"] = positions[ids == 7][None]
        options |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
        wanted = published.generate(**inputs, **options)
        with ops.patched(model):
            ours = model.generate(**inputs, **options)
        if not torch.equal(wanted, ours):
            found.append(f"{name}: {ours.tolist()} instead of {wanted.tolist()}")
    return found


def main() -> None:
    found = differences()
    print(f"transformers {transformers.__version__}: {'; '.join(found) or 'the same tokens'}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
