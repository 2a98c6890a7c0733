"""The published recipe as settings: stages, and the values of `preset: script` and `paper`.

`script` has the values of the published training scripts (LALBJ/CoMemo, June 2025). `paper` has the
steps and the batch that the paper names (arXiv 2506.06279): 2,000, 2,000 and 9,000 steps of 1,024,
without saying whether that counts samples or packs; here it counts packs.
"""

from typing import Any

from comemo.config import PUBLISHED_BEHAVIOUR

STAGES: dict[str, dict[str, Any]] = {  # what differs from the defaults of `StageSettings`
    "pretrain": {},
    "pretrain_fixed_gates": {"freeze_gates": True},
    "finetune": {
        "train": ("vision", "projector", "mixin", "language"),
        "learning_rate": 4e-5,
        "schedule": "cosine",
    },
}
_STEPS = {
    "script": {"pretrain": 10_000, "pretrain_fixed_gates": 10_000, "finetune": 9_000},
    "paper": {"pretrain": 2_000, "pretrain_fixed_gates": 2_000, "finetune": 9_000},
}
_PACKS = {"script": 8, "paper": 1024}
_MODEL = {"script": {**PUBLISHED_BEHAVIOUR, "ps_version": "v2"}, "paper": {"tile_order": "row"}}
# The same for both presets and all stages, whatever the defaults become.
_COMMON = {
    "warmup": 0.03,
    "weight_decay": 0.01,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "max_grad_norm": 1.0,
    "drop_path": 0.1,
    "gradient_checkpointing": True,
    "precision": "bfloat16",
    "save_every": 500,
}
_DATA = {
    "max_tokens": 16384,
    "max_tiles": 48,
    "buffer": 20,
    "max_sample_tokens": 8192,
    "loss_weight": "square",
    "published_text": True,  # grounding data has <ref> and <box> in its text
}
_PIXELS = {"script": True, "paper": False}  # whether the EXIF orientation is ignored


def preset_values(preset: str | None, from_parts: bool) -> dict[tuple[str, ...], Any]:
    """The values of a preset.

    Args:
        preset: "script", "paper" or None.
        from_parts: whether the model is made of a vision tower and a language model. A checkpoint
            says itself how it behaves.

    Returns:
        Full name of a setting, as parts -> value; empty without a preset.
    """
    if preset is None:
        return {}
    values: dict[tuple[str, ...], Any] = {("shard_optimizer",): True}
    values |= {("data", name): value for name, value in _DATA.items()}
    values["data", "published_pixels"] = _PIXELS[preset]
    if from_parts:
        values["start", "model"] = dict(_MODEL[preset])
    for stage, steps in _STEPS[preset].items():
        own = {**_COMMON, "steps": steps, "packs_per_step": _PACKS[preset]}
        values |= {("stages", stage, name): value for name, value in own.items()}
    return values
