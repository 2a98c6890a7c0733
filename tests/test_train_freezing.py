"""What a stage trains: frozen parts, stochastic depth, noise on embeddings."""

import pytest
import torch
from conftest import here
from small import make_prompts
from stage_models import deep_model, small, source, trained  # noqa: F401
from transformers.integrations.neftune import neftune_post_forward_hook

from comemo.train.models.drop_path import set_drop_path
from comemo.train.models.freezing import choose_trainable, part_of
from comemo.train.settings import LoraSettings, StageSettings

pytestmark = pytest.mark.usefixtures("one_thread")
GATES = ("attn_gate", "mlp_gate")


# --- freezing ---


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ({}, {"projector", "mixin", "gates"}),
        ({"freeze_gates": True}, {"projector", "mixin"}),
        (
            {"train": ("vision", "projector", "mixin", "language")},
            {*["vision", "projector", "mixin", "gates", "language", "head"]},
        ),
        ({"train": ("projector",), "unfreeze_lm_head": True}, {"projector", "head"}),
        ({"train": ("mixin",), "unfreeze_vit_layers": -1}, {"mixin", "gates", "vision layers"}),
    ],
)
def test_exactly_the_parts_of_a_stage_are_trained(small, stage, parts):
    choose_trainable(small, StageSettings(**stage))

    def kind(name):
        if name == "lm_head.weight":
            return "head"
        if name.endswith(GATES):
            return "gates"
        if "vision layers" in parts and ".encoder.layer." in name:
            return "vision layers"
        return part_of(name)

    names = dict(small.named_parameters())
    assert trained(small) == {name for name in names if kind(name) in parts}
    assert {kind(name) for name in trained(small)} == parts


@pytest.mark.parametrize(
    ("first", "select", "layers"),
    [(1, -1, [1, 2, 3]), (-2, -1, [2, 3]), (-4, -1, [0, 1, 2, 3]), (1, -2, [1, 2])],
)
def test_unfrozen_vision_layers(first, select, layers):
    model = deep_model(4, select)
    choose_trainable(model, StageSettings(train=(), unfreeze_vit_layers=first))
    assert {name.split(".")[4] for name in trained(model)} == set(map(str, layers))
    choose_trainable(model, StageSettings(train=("vision",)))
    run = {name.split(".")[4] for name in trained(model) if ".layer." in name}
    assert run == set(map(str, range(4 + 1 + select)))  # those that get a gradient


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"train": ()}, "something to train"),
        ({"train": ("mixins",)}, "stage.train: must be a list of parts"),
        ({"train": "mixin"}, "stage.train: must be a list of parts"),
        ({"train": ("mixin",), "unfreeze_vit_layers": 1}, "unfreeze_vit_layers: must be from -1"),
        ({"unfreeze_vit_layers": -2}, "unfreeze_vit_layers: must be from -1 to 0"),
        ({"unfreeze_vit_layers": "all"}, "unfreeze_vit_layers: must be the index"),
        ({"lora": LoraSettings(language=2)}, "the model must have adapters in language"),
    ],
)
def test_wrong_stages(small, stage, words):
    before = trained(small)
    with pytest.raises(ValueError, match=words):
        choose_trainable(small, StageSettings(**stage))
    assert trained(small) == before


# --- stochastic depth ---


def test_stochastic_depth_drops_whole_branches_of_single_tiles():
    model = deep_model(3).train()
    layers = model.model.vision_tower.encoder.layer
    set_drop_path(model, 0.5)
    x = torch.randn(4000, 2, 32, device=here())
    for layer, rate in zip(layers, (0, 0.25, 0.5), strict=True):
        layer.eval()
        wanted = {branch: as_tensor(branch(x)) for branch in (layer.attention, layer.mlp)}
        layer.train()
        kept = {}
        for branch, full in wanted.items():
            found = as_tensor(branch(x))
            kept[branch] = found.flatten(1).any(1)  # per tile
            assert torch.allclose(found, full * kept[branch][:, None, None] / (1 - rate), atol=1e-5)
            assert kept[branch].float().mean().item() == pytest.approx(1 - rate, abs=0.04)
        if rate:
            first, second = kept.values()
            assert not torch.equal(first, second)


def as_tensor(output):
    return output[0] if isinstance(output, tuple) else output


def test_stochastic_depth_only_while_training_and_until_removed(source):
    model = deep_model(3)
    tiles = torch.randn(2, 3, 112, 112, device=here())
    plain = model.model.project_images(tiles)
    set_drop_path(model, 0.9)
    assert torch.equal(model.model.project_images(tiles), plain)
    model.train()
    assert not torch.equal(model.model.project_images(tiles), plain)
    set_drop_path(model, 0.2)  # replaces
    assert sum(len(m._forward_hooks) for m in model.modules()) == 4  # two layers, two branches
    set_drop_path(model, 0)
    assert torch.equal(model.model.project_images(tiles), plain)
    for rate in (1, -0.1, True, "0.1", float("nan")):
        with pytest.raises(ValueError, match="set_drop_path: rate must be"):
            set_drop_path(model, rate)


# --- noise on embeddings ---


@pytest.mark.no_virtual_gpu("the noise is scaled by a CPU scalar, which a real GPU allows")
@pytest.mark.parametrize("packed", [True, False])
def test_noise_on_embeddings_reaches_packed_rows_and_text_beside_images(small, packed):
    """transformers' own: a hook of the embeddings. Image tokens are not embedded by them."""
    batch = make_prompts(small)
    if packed:
        N = batch["input_ids"].shape[1]
        batch["input_ids"] = batch["input_ids"].view(1, -1)
        del batch["attention_mask"]
        batch["input_ids"][0, : N // 2] = 5
        batch["cu_seqlens"] = torch.tensor([0, N, 2 * N], device=here())
    images = int((batch["input_ids"] == small.config.image_token_id).sum())
    tiles = images // small.config.tokens_per_tile
    batch["pixel_values"], batch["tile_grid"] = batch["pixel_values"][:tiles], [(1, 1)] * tiles
    plain = small(**batch, use_cache=False).logits
    embeddings = small.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    handle = embeddings.register_forward_hook(neftune_post_forward_hook)
    assert torch.equal(small(**batch, use_cache=False).logits, plain)  # not in evaluation
    small.train()
    noisy = small(**batch, use_cache=False)
    handle.remove()
    assert not torch.allclose(noisy.logits, plain, atol=1e-3)
    assert torch.equal(small(**batch, use_cache=False).logits, plain)
