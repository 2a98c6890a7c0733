"""A whole step of the training recipe: forward, backward, clipping and AdamW, of one full pack.

Random weights in float32, computed in bfloat16 (autocast) on a GPU; ours keeps frozen ones in
bfloat16. Layers are computed again in the backward pass. Stages: `pretrain` trains the projector
and the mixin layers, `finetune` everything. Ways: `ours`; `ours, whole logits`, with the logits of
all tokens in memory; `published`, its forward and loss with attention sample by sample.

`peak_gib` is the peak of the GPU in a row, or on a CPU that of the process so far: the way that
should need least runs first. `labels` are tokens with a loss. `loss` is compared first: a way whose
loss differs from ours by more than rounding is not timed.
"""

import argparse
import gc
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

import comemo_kernels as ops
from bench import measure, peak, progress
from bench.models import SIZES, made_on
from bench.recipe_batch import draw_batch
from bench.recipe_published import PublishedStep
from comemo.checkpoint import conversions
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.packing import prompt_positions
from comemo.train.models.of_stages import narrow_frozen

STAGES = ("pretrain", "finetune")
WAYS = ("ours", "ours, whole logits", "published")
ROUNDING = {"bfloat16": 2e-2, "float32": 1e-4}  # relative, of the loss
TINY = {
    "llm_config": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 512,
    },
    "vision_config": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    },
    "mixin_config": {
        "language_dim": 256,
        "vision_dim": 256,
        "head_dim": 64,
        "num_heads": 4,
        "intermediate_size": 512,
        "mixin_every_n_layers": 2,
    },
}
IMAGE_ID = 92546  # of the published vocabulary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=("tiny", *SIZES), default="2B" if gpu else "tiny")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers; 0: all")
    parser.add_argument("--tokens", type=int, default=16384 if gpu else 2048, help="of the pack")
    parser.add_argument("--tiles", type=int, default=48 if gpu else 6, help="of the pack")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4 if gpu else 3, help="timed after the first")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    dtype = "bfloat16" if gpu else "float32"
    parser.add_argument("--dtype", choices=tuple(ROUNDING), default=dtype)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    config = _config(options.size, options.layers)
    batch = draw_batch(config, options.tokens, options.tiles, options.samples)
    device = measure.default_device()
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    wanted: dict[str, float] = {}
    # Ways first, because the peak of a process only grows.
    for way, stage in progress.each(itertools.product(options.ways, options.stages), ", ".join):
        gc.collect()
        peak.reset()
        try:
            row = _row(config, batch, stage, way, options, wanted.get(stage))
        except torch.OutOfMemoryError:  # of a GPU; what does not fit is a result
            print(f"{stage}, {way} is not timed: out of memory at {measure.peak_gib():.1f} GiB")
            continue
        wanted.setdefault(stage, row["loss"])
        yield row


def _row(
    config: CoMemoConfig,
    batch: dict[str, Any],
    stage: str,
    way: str,
    options: argparse.Namespace,
    wanted: float | None,
) -> dict[str, Any]:
    model, loss_of = _make(config, batch, way)
    _freeze(model, stage)
    if way != "published" and options.dtype == "bfloat16":
        narrow_frozen(model)
    model.train()
    if way == "published":
        model.language_model.model.gradient_checkpointing = True
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    device = batch["input_ids"].device.type
    dtype = getattr(torch, options.dtype)
    mixed = dtype != torch.float32

    def step() -> float:
        with torch.autocast(device, dtype, enabled=mixed):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    loss = step()
    if wanted is not None and abs(loss - wanted) > ROUNDING[options.dtype] * abs(wanted):
        raise RuntimeError(f"{way} is not timed: its loss is {loss}, ours {wanted}")
    seconds = []
    for count in range(options.steps):
        progress.tell(f"step {count + 1} of {options.steps}")
        start = measure.now()
        step()
        seconds.append(measure.now() - start)
    step_s = statistics.median(seconds)
    tokens = batch["input_ids"].numel()
    return {
        "case": f"{options.size}, {tokens} tokens, {options.tiles} tiles, {options.dtype}",
        "pass": stage,
        "way": way,
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "tiles_per_s": options.tiles / step_s,
        "peak_gib": measure.peak_gib(),
        "labels": int((batch["labels"] != -100).sum()),
        "trained_millions": sum(p.numel() for p in trained) / 1e6,
        "loss": loss,
    }


def _config(size: str, layers: int) -> CoMemoConfig:
    # What is None is made from the parts.
    base = CoMemoConfig().to_dict() | {"text_config": None, "force_image_size": None}
    parts = {part: base[part] | values for part, values in (SIZES | {"tiny": TINY})[size].items()}
    if layers:
        parts["llm_config"]["num_hidden_layers"] = layers
    return CoMemoConfig.from_dict(base | parts | {"image_token_id": IMAGE_ID})


def _make(
    config: CoMemoConfig, batch: dict[str, Any], way: str
) -> tuple[Any, Callable[[], Tensor]]:
    """A model with random weights and open gates, the same in all ways, and its loss."""
    torch.manual_seed(0)
    with made_on(measure.default_device(), torch.float32):
        model = CoMemoForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
            parameter.copy_(parameter.bfloat16())  # as in published checkpoints
    bounds = torch.tensor(batch["cu_seqlens"])
    image = batch["input_ids"] == IMAGE_ID
    ids = prompt_positions(
        model.model, image, bounds, batch["tile_grid"], lambda grid: ops.image_tokens(grid)
    )
    if way == "published":
        model._weight_conversions = conversions(config.llm_architecture)
        weights = revert_weight_conversion(model, model.state_dict())
        published = PublishedStep(config.to_diff_dict(), weights, batch, ids, IMAGE_ID)
        return published.model, published.loss

    def loss() -> Tensor:
        skip = way == "ours"
        return model(**batch, position_ids=ids, use_cache=False, skip_logits=skip).loss

    return model, loss


def _freeze(model: nn.Module, stage: str) -> None:
    """As the recipe's stages: by both models' names of the projector and the mixin layers."""
    trained = ("multi_modal_projector", "mlp1", "mixin", "gated_cross_attn_layer")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage == "finetune" or any(part in name for part in trained))
