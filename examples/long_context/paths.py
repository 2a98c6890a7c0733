"""The six configurations: one model, of which a path or RoPE-DHR is left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from comemo import CoMemoConfig, CoMemoForConditionalGeneration
from comemo.nano.heads import add_heads
from comemo.nano.start import spread_weights
from comemo_kernels import ImageMemory
from examples.long_context.conversations import IGNORED, IMAGE, Sample
from examples.long_context.pictures import Pictures

PATHS = ("context", "memory", "both")
ROPES = ("dhr", "original")
LAYERS, MIXIN_EVERY = 4, 2
ASKED = 2  # tokens from the thing that a question asks for to its answer
GATE = 1.0  # of a new mixin layer, before its tanh


class Inputs(NamedTuple):
    """Samples as rows that end in padding, which no earlier token reads.

    Attributes:
        ids: [B, N], 0 at image tokens and padding.
        labels: [B, N].
        image_mask: bool [B, N], True at image tokens.
        text_mask: bool [B, N], True at words, False at padding.
        features: [image tokens of all, channels], row by row.
        grids: (cols, rows) of each picture.
        lengths: image tokens of each row.
        sizes: image tokens of each picture.
    """

    ids: Tensor
    labels: Tensor
    image_mask: Tensor
    text_mask: Tensor
    features: Tensor
    grids: list[tuple[int, int]]
    lengths: list[int]
    sizes: list[int]


def make_model(checkpoint: Path, rope: str, seed: int, end: int) -> CoMemoForConditionalGeneration:
    """An untrained language model with mixin layers, and the projector and words of a trained one.

    Self-attention and mixin layers have the same heads that find what a word names, see
    `comemo.nano.heads`.

    Args:
        checkpoint: comemo-nano.
        rope: of `ROPES`.
        seed: the same seed gives the same weights for any `rope`.
        end: id of the last token of a question.
    """
    trained = CoMemoForConditionalGeneration.from_pretrained(checkpoint)
    config = CoMemoConfig.from_pretrained(checkpoint)
    config.rope = rope
    config.text_config.num_hidden_layers = LAYERS
    config.mixin_config.mixin_every_n_layers = MIXIN_EVERY
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CoMemoForConditionalGeneration(config)
        spread_weights(model)
        core, known = model.model, trained.model
        for own, taken in (
            (core.multi_modal_projector, known.multi_modal_projector),
            (core.language_model.embed_tokens, known.language_model.embed_tokens),
            (model.lm_head, trained.lm_head),
        ):
            own.load_state_dict(taken.state_dict())
        # Nothing names the places of image tokens: with RoPE-DHR alone it would be right.
        add_heads(model, {}, ASKED, end)
    core.vision_tower = nn.Identity()  # features of pictures are given
    for index in config.mixin_layers:  # all weights are new: the paths start alike
        mixin = core.language_model.layers[index].mixin
        for gate in (mixin.attn_gate, mixin.mlp_gate):
            gate.data.fill_(GATE)
    return model


def collate(samples: Sequence[Sample], pictures: Pictures) -> Inputs:
    """Samples as rows, with the features of their pictures."""
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), longest), 0)
    labels = torch.full((len(samples), longest), IGNORED)
    mask, text = torch.zeros(2, len(samples), longest, dtype=torch.bool)
    shown = [index for sample in samples for index in sample.pictures]
    for row, sample in enumerate(samples):
        own = torch.tensor(sample.ids)
        mask[row, : len(own)] = own == IMAGE
        text[row, : len(own)] = own != IMAGE
        ids[row, : len(own)] = own.clamp(min=0)
        labels[row, : len(own)] = torch.tensor(sample.labels)
    return Inputs(
        ids,
        labels,
        mask,
        text,
        torch.cat([pictures.tokens(index) for index in shown]).float(),
        [pictures.grids[index] for index in shown],
        mask.sum(1).tolist(),
        [pictures.count(index) for index in shown],
    )


def arguments(
    model: CoMemoForConditionalGeneration, inputs: Inputs, path: str
) -> tuple[dict, Tensor]:
    """Arguments of the model's forward for one of the `PATHS`, and the labels.

    Ids are those of the whole conversation in every configuration: without the context path the
    tokens of pictures are left out, and what follows keeps its ids. So the memory is read from the
    same distances.

    Args:
        model: of `make_model`.
        inputs: of `collate`.
        path: "context": image tokens are in the sequence, and mixin layers do not run. "memory":
            mixin layers read the image memory, and no image token is in the sequence. "both".

    Returns:
        `inputs_embeds` [B, n, d], `position_ids` [B, n], `image_memory`; and labels [B, n].
    """
    if path not in PATHS:
        raise ValueError(f"arguments: path must be in {PATHS}, got {path!r}")
    core, mask = model.model, inputs.image_mask
    media = core.multi_modal_projector(inputs.features)
    ids = core.prompt_position_ids(mask, torch.ones_like(inputs.ids), inputs.grids)
    memory = None
    if path != "context":
        memory = ImageMemory.from_media(media, ids[mask], inputs.lengths, inputs.sizes)
    embeds, labels = core.get_input_embeddings()(inputs.ids), inputs.labels
    if path != "memory":
        embeds = embeds.masked_scatter(mask[..., None], media)
    else:
        text = [row.nonzero().squeeze(1) for row in inputs.text_mask]
        kept = nn.utils.rnn.pad_sequence(text, batch_first=True, padding_value=-1)
        padded = kept < 0  # rows with fewer tokens of text
        kept = kept.clamp(min=0)
        embeds = embeds.gather(1, kept[..., None].expand(-1, -1, embeds.shape[-1]))
        labels = labels.gather(1, kept).masked_fill(padded, IGNORED)
        ids = ids.gather(1, kept).masked_fill(padded, int(ids.max()))
    return {"inputs_embeds": embeds, "position_ids": ids, "image_memory": memory}, labels
