"""Sizes of a model for the formulas of `bench.scaling`: parameters, FLOPs, units of sharding.

Letters: N tokens of a pack, M image tokens, S samples, V vision tokens, d width, C channels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from bench.models import SIZES, made_on
from bench.recipe import IMAGE_ID, TINY
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig

PARTS = ("vision", "projector", "embeddings", "decoder", "mixin", "head")
TRAINED = {"pretrain": ("projector", "mixin"), "finetune": PARTS}


class Sizes(NamedTuple):
    """What the formulas read of a config."""

    width: int
    inner: int  # query heads * head size
    keys: int  # key-value heads * head size
    wide: int  # inner width of the feed-forward network
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    mixins: int
    mixin_inner: int
    mixin_wide: int
    mixin_heads: int
    channels: int
    vision_wide: int
    vision_layers: int
    patch: int  # values of a patch: 3 * 14 * 14
    raster: int  # tokens of a tile in the vision tower, with the class token
    tile: int  # tokens of a tile in the language model
    fold: int  # channels * patches that are folded into a token
    tiles_at_once: int

    @classmethod
    def of(cls, config: CoMemoConfig) -> "Sizes":
        """Sizes of a config whose linear layers have biases in the vision part alone."""
        text, vision, mixin = config.text_config, config.vision_config, config.mixin_config
        head = text.head_dim
        patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
        return cls(
            width=text.hidden_size,
            inner=text.num_attention_heads * head,
            keys=text.num_key_value_heads * head,
            wide=text.intermediate_size,
            layers=text.num_hidden_layers,
            vocab=text.vocab_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            mixins=len(config.mixin_layers),
            mixin_inner=mixin.num_heads * mixin.head_dim,
            mixin_wide=mixin.intermediate_size,
            mixin_heads=mixin.num_heads,
            channels=vision.hidden_size,
            vision_wide=vision.intermediate_size,
            vision_layers=vision.num_hidden_layers,
            patch=vision.num_channels * vision.patch_size[0] ** 2,
            raster=1 + patches,
            tile=config.tokens_per_tile,
            fold=vision.hidden_size * round(1 / config.downsample_ratio) ** 2,
            tiles_at_once=config.tiles_at_once,
        )

    @property
    def decoder_linear(self) -> int:
        """Weights of a decoder layer's GEMMs: 2 d (inner + keys) + 3 d wide."""
        return self.width * (2 * (self.inner + self.keys) + 3 * self.wide)

    @property
    def mixin_linear(self) -> int:
        """Weights of a mixin layer's GEMMs: 4 d inner + 3 d wide."""
        return self.width * (4 * self.mixin_inner + 3 * self.mixin_wide)

    def parameters(self) -> dict[str, int]:
        """Parameters by part.

        vision: patches patch C + C, class token C, positions raster C; a layer 4 (C C + C) +
        2 C wide + wide + C, two norms 4 C, two scales 2 C. projector: norm 2 fold, fold d + d,
        d d + d. decoder: `decoder_linear` + 2 d a layer. mixin: `mixin_linear` + 2 d + 2 gates.
        head: vocab d, and the final norm d.
        """
        d, c, f = self.width, self.channels, self.vision_wide
        layer = 4 * (c * c + c) + 2 * c * f + f + c + 6 * c
        return {
            "vision": self.patch * c + 2 * c + self.raster * c + self.vision_layers * layer,
            "projector": 2 * self.fold + self.fold * d + d + d * d + d,
            "embeddings": self.vocab * d,
            "decoder": self.layers * (self.decoder_linear + 2 * d),
            "mixin": self.mixins * (self.mixin_linear + 2 * d + 2),
            "head": self.vocab * d + d,
        }


class Pack(NamedTuple):
    """What a rank reads at once. The default is the pack of the step that was measured."""

    tokens: int = 16384
    tiles: int = 48
    samples: int = 8
    labels: int = 1228
    drop_path: bool = False  # whether vision layers are skipped at random

    def tiles_of(self, tensor: int) -> int:
        """Tiles that go through a rank's vision tower: all, if they have random numbers."""
        return self.tiles if self.drop_path else -(-self.tiles // tensor)


class Flops(NamedTuple):
    """Of one pack: forward, and backward with what is computed again."""

    forward: float
    backward: float


def flops(of: Sizes, pack: Pack, stage: str, checkpointing: bool = True) -> dict[str, Flops]:
    """FLOPs by part, of all its layers; 2 for a multiplication and addition.

    Forward: decoder layer 2 N linear + 2 inner N N / S (causal); mixin layer 2 N linear, of which
    keys and values are of M tokens, + 4 inner N M / S; vision layer 2 V (4 C C + 2 C wide) +
    4 C V raster; projector 2 M (fold d + d d); head 2 labels vocab d.

    Backward: twice the forward; the weights' half of it only where they are trained, none of the
    vision tower if it is frozen. Checkpointed layers are computed once more.
    """
    trained = TRAINED[stage]
    n, m, v = pack.tokens, pack.tiles * of.tile, pack.tiles * of.raster
    d, c = of.width, of.channels
    build = 2 * d * of.mixin_inner
    gemms = {
        "vision": of.vision_layers * 2 * v * (4 * c * c + 2 * c * of.vision_wide),
        "projector": 2 * m * (of.fold * d + d * d),
        "embeddings": 0,
        "decoder": of.layers * 2 * n * of.decoder_linear,
        "mixin": of.mixins * 2 * (n * (of.mixin_linear - build) + m * build),
        "head": 2 * pack.labels * of.vocab * d,
    }
    attention = dict.fromkeys(PARTS, 0.0) | {
        "vision": of.vision_layers * 4.0 * c * v * of.raster,
        "decoder": of.layers * 2.0 * of.inner * n * n / pack.samples,
        "mixin": of.mixins * 4.0 * of.mixin_inner * n * m / pack.samples,
    }
    found = {}
    for part in PARTS:
        forward, backward = gemms[part] + attention[part], 0.0
        if part != "vision" or part in trained:
            backward = gemms[part] * (2 if part in trained else 1) + 2 * attention[part]
            if checkpointing and part in ("vision", "decoder", "mixin"):
                backward += forward
        found[part] = Flops(forward, backward)
    return found


def total_flops(of: Sizes, pack: Pack, stage: str, checkpointing: bool = True) -> float:
    """FLOPs of one pack, forward and backward."""
    return sum(map(sum, flops(of, pack, stage, checkpointing).values()))


class Weight(NamedTuple):
    """A parameter: its shape, the part it belongs to, whether it is of a linear layer."""

    shape: tuple[int, ...]
    part: str
    linear: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def rows_of(self, ranks: int) -> int:
        """Elements that a rank holds: the first dimension, rounded up, divided among the ranks.

        FSDP2 pads so. A parameter whose first dimension is 1, such as the positions of the vision
        tower, is held whole by each rank.
        """
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:])


class Unit(NamedTuple):
    """Parameters that FSDP gathers together."""

    name: str
    kind: str  # "vision", "decoder", or "rest", which stays gathered
    weights: tuple[Weight, ...]

    def elements(self, ranks: int = 1, tensor: int = 1, parts: Sequence[str] = PARTS) -> float:
        """Elements of the weights of these parts, padded for so many ranks.

        Args:
            ranks: that divide the unit.
            tensor: ranks that divide the linear layers of a decoder layer before that.
            parts: whose weights count.
        """
        split = tensor if self.kind == "decoder" else 1
        own = [w for w in self.weights if w.part in parts]
        return ranks * sum(w.rows_of(ranks) / (split if w.linear else 1) for w in own)


def make_units(config: CoMemoConfig) -> list[Unit]:
    """Units in the order of a forward pass, counted on a model without memory.

    The first has what is not in a layer: embeddings, head, projector, patches. Then each vision
    layer, and each decoder layer with its mixin layer, as `comemo.train.parallel.shard` does.
    """
    with made_on("meta", torch.float32):
        model = CoMemoForConditionalGeneration(config)
    linear = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    }
    held: dict[str, tuple[str, list[Weight]]] = {"rest": ("rest", [])}
    for name, parameter in model.named_parameters():
        unit, kind, part = _place(name)
        weight = Weight(tuple(parameter.shape), part, parameter in linear)
        held.setdefault(unit, (kind, []))[1].append(weight)
    return [Unit(name, kind, tuple(weights)) for name, (kind, weights) in held.items()]


def _place(name: str) -> tuple[str, str, str]:
    """Unit, kind of unit and part of a parameter."""
    words = name.split(".")
    if "encoder.layer." in name:
        return ".".join(words[:5]), "vision", "vision"
    if "language_model.layers." in name:
        return ".".join(words[:4]), "decoder", "mixin" if ".mixin." in name else "decoder"
    if "embed_tokens" in name:
        return "rest", "rest", "embeddings"
    part = next((p for p in ("vision", "projector") if p in name), "head")
    return "rest", "rest", part


def config_of(size: str) -> CoMemoConfig:
    """The config of "2B", "9B" or "tiny"."""
    # What is None is made from the parts.
    base = CoMemoConfig().to_dict() | {"text_config": None, "force_image_size": None}
    parts = {n: base[n] | sizes for n, sizes in (SIZES | {"tiny": TINY})[size].items()}
    return CoMemoConfig.from_dict(base | parts | {"image_token_id": IMAGE_ID})
