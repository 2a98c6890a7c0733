"""Tiny Flamingos of open_flamingo 2.0.1, whose sources are loaded without its old dependencies."""

import pytest
import torch
from patching import assert_patched_matches
from torch import nn

import comemo_kernels
from bench import flamingo_sources

_sources = flamingo_sources.load()
if _sources is None:
    pytest.skip(flamingo_sources.MISSING, allow_module_level=True)
helpers, flamingo = _sources.helpers, _sources.flamingo
flamingo_lm, utils = _sources.flamingo_lm, _sources.utils

WIDTH, VISUAL, IMAGE = 32, 16, 63  # IMAGE is the token of an image


class Visual(nn.Module):
    """Returns what a vision tower of open_clip returns: pooled features, and all of them."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, VISUAL, 4, 4)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return tokens.mean(1), tokens


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Visual()


def make_block(latest=True, heads=2, dim=8):
    """A block with gates that are open."""
    block = helpers.GatedCrossAttentionBlock(
        dim=WIDTH,
        dim_visual=VISUAL,
        dim_head=dim,
        heads=heads,
        only_attend_immediate_media=latest,
    )
    for gate in (block.attn_gate, block.ff_gate):
        nn.init.constant_(gate, 0.7)
    return block.eval()


def make_flamingo(language, layers="model.layers"):
    """A Flamingo on a language model of transformers, a block before every second layer."""
    utils.extend_instance(language, flamingo_lm.FlamingoLMMixin)
    language.set_decoder_layers_attr_name(layers)
    model = flamingo.Flamingo(Clip(), language, 2, IMAGE, VISUAL, cross_attn_every_n_layers=2)
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            nn.init.constant_(parameter, 0.9)
    return model.eval()


def make_prompt(places=((1, 4), (2, 6)), length=9, images=2):
    """Pictures [B, T, 1, 3, 8, 8] and token ids [B, N] with images at these places."""
    ids = torch.randint(3, IMAGE, (len(places), length))
    for row, columns in zip(ids, places, strict=True):
        row[list(columns)] = IMAGE
    return torch.randn(len(places), images, 1, 3, 8, 8), ids


def learn(block, x, media, locations=None, cached=False):
    """Output of a block, and gradients of x, media and its parameters."""
    dtype = next(block.parameters()).dtype
    x, media = (t.detach().to(dtype).requires_grad_() for t in (x, media))
    out = block(x, media, media_locations=locations, use_cached_media=cached)
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=draw).to(out) for _ in range(8)]
    named = {"x": x, "media": media, **dict(block.named_parameters())}
    gates = [named.pop("attn_gate"), named.pop("ff_gate")]
    grads = torch.autograd.grad(out, list(named.values()), cotangents[0], retain_graph=True)
    found = {f"gradient of {name}": grad for name, grad in zip(named, grads, strict=True)}
    # A single number may be exact by chance.
    each = [torch.cat(torch.autograd.grad(out, gates, c, retain_graph=True)) for c in cotangents]
    return {"output": out.detach(), **found, "gradient of gates": torch.cat(each)}


def assert_as_unpatched(block, x, media, *seen):
    """A patched block errs no more than it does unpatched, gradients included."""

    def run(model, factor):
        return learn(model, *((factor * t.double()).to(t.dtype) for t in (x, media)), *seen)

    if x.dtype != torch.float64:  # else its error has no measure
        assert_patched_matches(block, run)
        return
    wanted = run(block, 1)
    with comemo_kernels.patched(block):
        torch.testing.assert_close(run(block, 1), wanted)
