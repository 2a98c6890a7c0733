"""Memory of a GPU in training and in inference, by formula, for each plan of `bench.scaling`.

Activations are those of a model that computes layers again in the backward pass. Rows that go from
layer to layer are float32 under ddp, whose embeddings are, and bfloat16 under fsdp. Buffers of
NCCL, of the allocator and of the CUDA context are not in the formulas.
"""

import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch

from bench import peak, step_memory
from bench.scaling_plans import Plan, check_tensor
from bench.scaling_sizes import PARTS, TRAINED, Pack, Sizes, Unit
from comemo.config import CoMemoConfig
from comemo.linear_loss import CHUNK

FIRST = ("vision", "projector", "embeddings")  # parts before the first decoder layer


class Memory(NamedTuple):
    """Bytes of a GPU; `activations` are those by which the peak exceeds the others."""

    weights: float
    gradients: float
    moments: float
    buffers: float  # gathered units of fsdp, or copies of a layer in bfloat16
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


def training_memory(plan: Plan, units: list[Unit], of: Sizes, pack: Pack, stage: str) -> Memory:
    """Most bytes of a step.

    weights: 4, but without fsdp 2 for a frozen one of a linear layer; gradients 4 and moments of
    AdamW 8 for a trained one; all divided as the plan says. ZeRO-1 divides moments by whole
    parameters, so a rank has at least those of the largest. The buckets of ddp are the gradients.

    Args:
        plan: of the ranks.
        units: of `make_units`.
        of, pack: sizes.
        stage: "pretrain" or "finetune".

    Returns:
        A `Memory`.

    Raises:
        ValueError: a plan that does not fit.
    """
    plan.check(of)
    trained, weights = TRAINED[stage], 0.0
    learnt = dict.fromkeys(PARTS, 0.0)
    sharded = plan.shards * plan.tensor > 1
    for unit in units:
        ranks, _ = plan.ranks_of(unit)
        split = plan.tensor if unit.kind == "decoder" else 1
        for weight in unit.weights:
            held = weight.rows_of(ranks) / (split if weight.linear else 1)
            learns = weight.part in trained
            learnt[weight.part] += held * learns
            weights += held * (2 if weight.linear and not (learns or sharded) else 4)
    gradients = 4 * sum(learnt.values())
    moments = 2 * gradients
    if plan.zero:
        sizes = [w.size for unit in units for w in unit.weights if w.part in trained]
        moments = 8 * max(sum(sizes) / plan.gpus, max(sizes))
    if sharded:
        buffers = fsdp_buffers(plan, units, stage)
    else:
        largest = max(_copied(unit, plan) for unit in units if unit.kind == "decoder")
        buffers = 2 * largest
    together = peak_with_gradients(of, pack, stage, learnt, plan)
    return Memory(weights, gradients, moments, buffers, max(0.0, together - gradients))


def _copied(unit: Unit, plan: Plan, parts: tuple[str, ...] = PARTS) -> float:
    """Elements of a gathered unit."""
    return unit.elements(1, plan.tensor, parts)


def fsdp_buffers(plan: Plan, units: list[Unit], stage: str) -> float:
    """Bytes of fsdp beside its shards.

    The unit "rest" stays gathered, in bfloat16 (2), with its gradients (2). Of the others: the one
    that is computed and the one that is gathered ahead, in bfloat16 (2 each); gradients of the
    first in bfloat16 (2), copied to float32 for their reduction (4), while those of the unit
    before are reduced (4). Or at the end the gradients of "rest" in float32 (4).
    """
    trained = TRAINED[stage]
    rest = sum(_copied(unit, plan) for unit in units if unit.kind == "rest")
    learnt = sum(_copied(unit, plan, trained) for unit in units if unit.kind == "rest")
    most = 4 * learnt
    # Backward: units one after the other, from the last.
    for now, ahead in itertools.pairwise([u for u in reversed(units) if u.kind != "rest"]):
        own, other = _copied(now, plan, trained), _copied(ahead, plan, trained)
        whole = 2 * (_copied(now, plan) + _copied(ahead, plan))
        most = max(most, whole + 6 * own, whole + 4 * own + 6 * other)
    return 2 * rest + 2 * learnt + most


def peak_with_gradients(
    of: Sizes, pack: Pack, stage: str, learnt: dict[str, float], plan: Plan
) -> float:
    """Most bytes of activations and gradients together.

    Kept, by e = 4 bytes under ddp, 2 under fsdp: e N d for each decoder layer and 2 more; e V C for
    each vision layer that is differentiated; of each image token (6 + e) d for its media and
    (2 + e) fold for its folded row; pixels in float32 and bfloat16. The peak is one of:

    - the loss: logits of a chunk in bfloat16, float32 and as a gradient; the head in bfloat16, and
      a chunk's gradient of it in bfloat16 and float32 if it is trained; e N d; the gradient of the
      head;
    - the last or the first decoder layer: see `decoder_layer`; without or with the gradients of all
      other layers;
    - the vision layers, after the language model: 48 C + 8 wide bytes for each token of a round of
      tiles; before the first gradient, or after the first round with all of them. With fsdp all
      tiles are one round.

    Args:
        of, pack: sizes.
        stage: "pretrain" or "finetune".
        learnt: by part, the elements of gradients that a rank has after the backward pass.
        plan: of the ranks.
    """
    n, m, d = pack.tokens, pack.tiles * of.tile, of.width
    sharded = plan.shards * plan.tensor > 1
    kept = 2 if sharded else 4
    inputs = 6 * pack.tiles * of.patch * (of.raster - 1)
    inputs += m * ((6 + kept) * d + (2 + kept) * of.fold)
    rows = kept * n * d
    # With fsdp all tiles at once, so that all ranks gather equally often.
    tiles = pack.tiles_of(plan.tensor)
    at_once = tiles if sharded else min(tiles, of.tiles_at_once)
    rounds = math.ceil(tiles / max(1, at_once))
    differentiated = "vision" in TRAINED[stage]
    tower = kept * tiles * of.raster * of.channels * of.vision_layers * differentiated
    head = 4 * learnt["head"]
    layers = 4 * (learnt["decoder"] + learnt["mixin"])
    chunk = min(CHUNK, pack.labels * of.vocab)
    loss = chunk * (2 + 4 + 4) + of.vocab * d * (8 if head else 2) + rows
    layer = decoder_layer(of, pack, kept, plan.tensor)
    language = (
        (of.layers + 2) * rows + max(loss, layer) + head,
        2 * rows + layer + head + layers,
    )
    peaks = [inputs + tower + moment for moment in language]
    if differentiated:
        work = rows + inputs + at_once * of.raster * (48 * of.channels + 8 * of.vision_wide)
        everything = 4 * sum(learnt.values())
        peaks.append(work + tower + everything - 4 * (learnt["vision"] + learnt["projector"]))
        peaks.append(work + tower * (rounds - 1) / rounds + everything)
    return max(peaks)


def decoder_layer(of: Sizes, pack: Pack, kept: int, tensor: int = 1) -> float:
    """Peak bytes of a decoder layer with a mixin layer, which are computed again together.

    Args:
        of, pack: sizes.
        kept: bytes of an element of the rows between layers.
        tensor: ranks that divide the layer.
    """
    n, m = pack.tokens, pack.tiles * of.tile
    own = step_memory.Sizes(
        tokens=n,
        readers=0,
        memory=0,
        width=of.width,
        inner=of.inner // tensor,
        wide=of.wide // tensor,
        heads=of.heads // tensor,
        itemsize=2,
        samples=pack.samples,
    )
    mixin = own._replace(
        readers=n,
        memory=m,
        inner=of.mixin_inner // tensor,
        wide=of.mixin_wide // tensor,
        heads=of.mixin_heads // tensor,
    )
    way = step_memory.CHEAP
    # Keys and values before and after the rotation; the network's input may be float32.
    more = n * (2 * 4 * of.keys // tensor + (kept - 2) * of.width)
    both = step_memory.kept_bytes(way, mixin) + step_memory.peak_bytes(way, own, learning=False)
    return max(both + more, step_memory.peak_bytes(way, mixin, learning=False))


class Serving(NamedTuple):
    """Bytes of the GPU that needs most, and the least seconds of a token."""

    weights: float
    cache: float  # keys and values of the text
    memory: float  # keys and values of the images, and the media
    activations: float
    token_seconds: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.memory + self.activations


class Prompt(NamedTuple):
    """What a GPU serves at once."""

    tokens: int = 8192  # of one conversation, image tokens among them
    tiles: int = 13
    batch: int = 1
    chunk: int = 8192  # tokens that are read at once


def serving_memory(
    config: CoMemoConfig,
    units: list[Unit],
    prompt: Prompt,
    tensor: int,
    stages: int,
    bandwidth: float,
    message: float = 0.0,
) -> Serving:
    """Memory in inference, in bfloat16, with image memory built once.

    weights: tensor parallelism divides decoder and mixin layers and the vocabulary of the head;
    the vision tower, projector and embeddings are on every rank of the first stage. Pipeline
    stages have layers / stages each. Keys and values: of the layers of a stage, divided by
    `tensor`; of the images, 2 M inner of each mixin layer, and the media [M, d]. Activations: see
    `bench.peak`.

    A token reads all weights of the language part, keys and values once, stage after stage, and
    waits for two all-reduces in each decoder and mixin layer.

    Args:
        config: of the model.
        units: of `make_units`.
        prompt: what is served.
        tensor, stages: ranks that divide each layer, and that divide the layers.
        bandwidth: of a GPU's memory, bytes per second.
        message: seconds of an all-reduce of a token's row over `tensor` ranks.

    Returns:
        A `Serving`.

    Raises:
        ValueError: `tensor` does not divide the heads, or there are more stages than layers.
    """
    of = Sizes.of(config)
    check_tensor("serving_memory", tensor, of)
    layers = [unit for unit in units if unit.kind == "decoder"]
    if not 1 <= stages <= len(layers):
        raise ValueError(f"serving_memory: stages must be 1 to {len(layers)}, got {stages}")
    plan, memory = Plan(tensor, tensor=tensor), prompt.tiles * of.tile
    per_stage = math.ceil(len(layers) / stages)
    found, reads = [], 0.0
    for start in range(0, len(layers), per_stage):
        own = layers[start : start + per_stage]
        mixins = sum(any(w.part == "mixin" for w in unit.weights) for unit in own)
        cache = 2 * 2 * prompt.batch * prompt.tokens * of.keys * len(own) / tensor
        images = 2 * 2 * prompt.batch * memory * of.mixin_inner * mixins / tensor
        weights = 2 * sum(_copied(unit, plan) for unit in own)
        head = 2 * of.vocab * of.width / tensor * (start + per_stage >= len(layers))
        reads += weights + head + cache + images
        first = 2 * sum(unit.elements(parts=FIRST) for unit in units)
        images += 2 * prompt.batch * memory * of.width
        found.append((weights + head + first * (start == 0), cache, images))
    most = max(found, key=sum)
    model = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cuda"))
    at_once = min(prompt.tiles, of.tiles_at_once)
    vision = peak.vision_activations(model, at_once, prompt.tiles)
    text = peak.text_activations(model, min(prompt.chunk, prompt.tokens), prompt.tokens)
    waits = 2 * (of.layers + of.mixins) * message if tensor > 1 else 0.0
    return Serving(*most, max(vision, text), reads / bandwidth + waits)
