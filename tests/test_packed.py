"""A packed training forward compared with recordings: logits, losses, every gradient."""

import copy
import json

import pytest
import torch
from conftest import every_two
from harness import LOGITS, assert_relative, recorded
from small import place
from transformers.core_model_loading import revert_weight_conversion

import comemo_kernels as ops
from comemo import load_image, prompts
from comemo.checkpoint import conversions
from comemo_kernels import ImageMemory, spans_from_cu_seqlens


def load(golden, case):
    """A recorded batch and the tiles of each of its samples."""
    notes = json.loads((golden / "packed.json").read_text())
    batch = place(recorded(golden, "packed.safetensors", f"{case}/"))
    if case == "single1":  # the image of the pack's second sample
        batch["pixel_u8"] = place(
            recorded(golden, "packed.safetensors", "packed3/pixel_u8")[""][1:4]
        )
    return batch, notes[case]["seq_imgs"][0], notes


def forward(model, inputs, batch, seq_imgs, weighted, absolute=False, **options):
    """Forward of a published batch: each sample reads its own tiles, dummies included."""
    tokens = model.config.tokens_per_tile
    media = model.model.project_images(
        inputs.normalise(batch["pixel_u8"].cpu().numpy()).to(model.device)
    )
    tiles = torch.tensor([0, *seq_imgs], device=model.device).cumsum(0)
    cu_seqlens = batch["cu_seqlens"][0].long()
    input_ids = batch["input_ids"].long()
    memory = ImageMemory.from_media(
        media.flatten(0, 1),
        batch["cross_attention_media_position_ids"][0].long(),
        [count * tokens for count in seq_imgs],
        absolute=absolute,
    ).reading(spans_from_cu_seqlens(cu_seqlens, tiles * tokens, input_ids.shape[1]))
    image_mask = model.model.find_image_tokens(input_ids)
    embeds = model.get_input_embeddings()(input_ids)
    embedded = media[batch["image_flags"].bool()].flatten(0, 1)
    return model(
        inputs_embeds=embeds.masked_scatter(image_mask[..., None], embedded),
        position_ids=batch["position_ids"].long(),
        image_memory=memory,
        cu_seqlens=cu_seqlens,
        labels=batch["labels"].long(),
        loss_weights=batch["loss_weight"] if weighted else None,
        use_cache=False,
        **options,
    )


@pytest.mark.parametrize(
    ("case", "loss", "absolute"),
    every_two(["packed3", "single1"], ["weighted", "plain"], [False, True]),
)
def test_recorded_pack(golden, inputs, model, case, loss, absolute):
    batch, seq_imgs, notes = load(golden, case)
    out = forward(model, inputs, batch, seq_imgs, loss == "weighted", absolute)
    wanted = notes[f"{case}/a/{loss}"]
    assert out.loss.item() == pytest.approx(wanted["loss"], abs=1e-5)
    rows = batch["a/logits_rows"].long()
    assert (out.logits[0, rows] - batch["a/logits"]).abs().max() < LOGITS
    assert_relative(out.logits[0].norm(dim=-1), batch["a/logits_rownorm"], "norms of all rows")
    out.loss.backward()
    grads = published_gradients(model)
    norms = wanted["grad_norms"]
    assert grads.keys() == norms.keys()
    for name, norm in norms.items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), name
    if loss == "weighted":
        found = {name: t for name, t in batch.items() if name.startswith("a/grad/")}
        assert found or case == "single1"  # only its norms were recorded
        for name, grad in found.items():
            assert_relative(grads[name.removeprefix("a/grad/")], grad, name)


def test_the_recorded_loss_without_logits(golden, inputs, model):
    """Losses of single labels, and their weighted mean; the gradient of every weight."""
    batch, seq_imgs, notes = load(golden, "packed3")
    model.zero_grad()
    out = forward(model, inputs, batch, seq_imgs, True, skip_logits=True)
    assert out.logits is None
    wanted = notes["packed3/a/weighted"]
    assert out.loss.item() == pytest.approx(wanted["loss"], abs=1e-5)
    weights = batch["loss_weight"] * (batch["labels"] != -100)
    mean = (out.label_losses * weights).sum() / weights[:, 1:].sum()
    assert mean.item() == pytest.approx(wanted["loss"], abs=1e-5)
    out.loss.backward()
    for name, grad in published_gradients(model).items():
        norm = wanted["grad_norms"][name]
        assert grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), name


def published_gradients(model):
    """Gradients with names and fused layouts of the published weights."""
    model._weight_conversions = conversions(model.config.llm_architecture)
    grads = {name: p.grad for name, p in model.named_parameters()}
    return revert_weight_conversion(model, grads)


def test_gradient_checkpointing_changes_nothing(golden, inputs, model):
    batch, seq_imgs, _ = load(golden, "single1")
    model = copy.deepcopy(model)  # because hooks of checkpointing remain
    losses, grads = [], []
    for enable in (False, True):
        model.zero_grad(set_to_none=True)
        if enable:
            model.gradient_checkpointing_enable()
            model.train()
        try:
            out = forward(model, inputs, batch, seq_imgs, True)
            out.loss.backward()
        finally:
            model.gradient_checkpointing_disable()
            model.eval()
        assert out.past_key_values is None
        losses.append(out.loss.item())
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, grad in grads[0].items():
        assert_relative(grads[1][name], grad, name)


def test_a_sample_alone_equals_the_sample_in_its_pack(golden, inputs, model):
    batch, seq_imgs, _ = load(golden, "packed3")
    with torch.no_grad():
        packed = forward(model, inputs, batch, seq_imgs, True).logits[0]
        bounds, start = batch["cu_seqlens"][0].tolist(), 0
        for tiles, left, right in zip(seq_imgs, bounds, bounds[1:], strict=False):
            mine = slice(start * 256, (start + tiles) * 256)
            sample = {
                name: batch[name][:, left:right]
                for name in ("input_ids", "position_ids", "labels", "loss_weight")
            } | {
                "pixel_u8": batch["pixel_u8"][start : start + tiles],
                "image_flags": batch["image_flags"][start : start + tiles],
                "cu_seqlens": torch.tensor([[0, right - left]], device=model.device),
                "cross_attention_media_position_ids": batch["cross_attention_media_position_ids"][
                    :, mine
                ],
            }
            alone = forward(model, inputs, sample, [tiles], True).logits[0]
            assert (packed[left:right] - alone).abs().max() < LOGITS
            start += tiles


@pytest.mark.parametrize("name", ["text", "single", "multi"])
def test_ids_of_recorded_samples(golden, tokenizer, name):
    wanted = recorded(golden, "packed.safetensors", f"sample/{name}/")
    item = json.loads((golden / "train_data" / f"{name}.jsonl").read_text())
    said = [message["value"] for message in item["conversations"]]
    files = item.get("image", [])
    files = [files] if isinstance(files, str) else files
    most = 4 // max(len(files), 1)
    grids = [load_image(golden / "train_data" / file, max_num=most)[1] for file in files]
    prompt = prompts.build_prompt(list(zip(said[::2], said[1::2], strict=True)))
    prompt = prompts.expand_images(prompt, [ops.image_tokens(grid) for grid in grids])
    input_ids = torch.tensor([prompts.encode_prompt(tokenizer, prompt)])
    assert torch.equal(input_ids[0], wanted["input_ids"].long())
    image = input_ids == tokenizer.convert_tokens_to_ids(prompts.IMAGE_CONTEXT)
    ids = ops.rope_dhr_positions(image, torch.ones_like(image), grids, tile_order="column")
    assert torch.equal(ids[0], wanted["position_ids"].long())
    if files:
        assert torch.equal(ids[image], wanted["cross_attention_media_position_ids"].long())
