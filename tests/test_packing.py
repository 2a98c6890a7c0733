"""Packed rows as transformers' collator makes them: each sample computes what it does alone."""

import pytest
import torch
from conftest import TRACED
from harness import assert_relative
from small import make_model, make_prompts, place
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening


def alone(model, samples):
    """Logits of each sample in a forward of its own."""
    with torch.no_grad():
        return [model(input_ids=place(ids[None]), use_cache=False).logits[0] for ids in samples]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens", "cu_seqlens"])
def test_samples_packed_by_transformers_equal_the_samples_alone(implementation, given):
    model = make_model()
    model.set_attn_implementation(implementation)
    samples = [torch.randint(10, 200, (n,)) for n in (7, 1, 12, 5)]
    collator = DataCollatorWithFlattening(
        return_position_ids=given == "position_ids",
        return_flash_attn_kwargs=given == "cu_seq_lens",
    )
    batch = collator([{"input_ids": ids.tolist()} for ids in samples])
    labels = batch.pop("labels")
    if given == "cu_seqlens":
        batch["cu_seqlens"] = torch.tensor([0, 7, 8, 20, 25])
    batch = place(dict(batch))
    with torch.no_grad():
        out = model(**batch, labels=place(labels))
    wanted = torch.cat(alone(model, samples))
    assert torch.allclose(out.logits[0], wanted, atol=2e-5)
    assert out.past_key_values is None
    assert out.cache is None
    assert out.loss.isfinite()


def test_samples_read_only_their_own_images():
    model = make_model()
    prompts = make_prompts(model)
    ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
    tiles, grids = prompts["pixel_values"], prompts["tile_grid"]
    text = place(torch.randint(10, 200, (6,)))
    samples = [(ids[0][mask[0]], [0]), (text, []), (ids[1], [1, 2])]
    logits, ids_alone = [], []
    with torch.no_grad():
        for own, which in samples:
            given = {"pixel_values": tiles[which], "tile_grid": [grids[i] for i in which]}
            given = given if which else {}
            logits.append(model(input_ids=own[None], use_cache=False, **given).logits[0])
            image = model.model.find_image_tokens(own[None])
            grid = given.get("tile_grid")
            ids_alone.append(
                model.model.prompt_position_ids(image, torch.ones_like(own[None]), grid)
            )
        row = torch.cat([own for own, _ in samples])[None]
        lengths = torch.tensor([0, *(len(own) for own, _ in samples)]).cumsum(0)
        given = {"input_ids": row, "pixel_values": tiles, "tile_grid": grids}
        for packed in (
            {"position_ids": torch.cat(ids_alone, 1)},
            {"cu_seq_lens_q": place(lengths), "cu_seq_lens_k": place(lengths)},
        ):
            found = model(**given, **packed).logits[0]
            assert torch.allclose(found, torch.cat(logits), atol=5e-5), list(packed)


def test_a_memory_can_be_read_again_in_a_pack():
    model = make_model()
    prompts = make_prompts(model)
    ids = prompts["input_ids"][1]
    row = torch.cat([ids, place(torch.randint(10, 200, (5,)))])[None]
    given = {"input_ids": row, "cu_seqlens": torch.tensor([0, len(ids), row.shape[1]])}
    tiles, grids = prompts["pixel_values"][1:], prompts["tile_grid"][1:]
    with torch.no_grad():
        packed = model(**given, pixel_values=tiles, tile_grid=grids)
        whole = model(input_ids=ids[None], pixel_values=tiles, tile_grid=grids, use_cache=True)
        again = model(**given, image_memory=whole.image_memory, tile_grid=grids)
        assert torch.allclose(again.logits, packed.logits, atol=2e-5)
        embeds = {"inputs_embeds": model.get_input_embeddings()(row)}
        bounds = {"cu_seqlens": given["cu_seqlens"]}
        model(**embeds, **bounds, image_memory=packed.image_memory)
        with pytest.raises(ValueError, match=r"span for each token, .*got \(1, 1, 2\)"):
            model(**embeds, **bounds, image_memory=whole.image_memory)


def test_two_packed_rows():
    model = make_model()
    samples = [torch.randint(10, 200, (n,)) for n in (4, 8, 6, 6)]
    rows = place(torch.stack([torch.cat(samples[:2]), torch.cat(samples[2:])]))
    numbers = [torch.arange(len(ids)) for ids in samples]
    ids = place(torch.stack([torch.cat(numbers[:2]), torch.cat(numbers[2:])]))
    with torch.no_grad():
        found = model(input_ids=rows, position_ids=ids).logits.flatten(0, 1)
    assert torch.allclose(found, torch.cat(alone(model, samples)), atol=2e-5)


@TRACED
def test_packed_rows_under_torch_compile(real_device):
    model = make_model().to(real_device)
    samples = [torch.randint(10, 200, (n,)) for n in (5, 9)]
    ids = torch.cat([torch.arange(len(s)) for s in samples])[None].to(real_device)
    row = torch.cat(samples)[None].to(real_device)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(input_ids=row, position_ids=ids, use_cache=False).logits[0]
        wanted = [model(input_ids=s[None].to(real_device)).logits[0] for s in samples]
    assert torch.allclose(found, torch.cat(wanted), atol=2e-5)


def test_invalid_packs_are_refused():
    model = make_model(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=8)
    row, bounds = place(torch.randint(10, 200, (1, 14))), torch.tensor([0, 5, 14])
    with pytest.raises(ValueError, match=r"trained range of 8.*got 9: pass it alone"):
        model(input_ids=row, cu_seqlens=bounds)
    bounds[1] = 7
    model(input_ids=row, cu_seqlens=bounds, attention_mask=torch.ones_like(row))
    with pytest.raises(ValueError, match=r"packed rows .* got use_cache=True or a cache"):
        model(input_ids=row, cu_seqlens=bounds, use_cache=True)
    mask = torch.ones_like(row)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=r"packed rows .* got padding"):
        model(input_ids=row, cu_seqlens=bounds, attention_mask=mask)
    with pytest.raises(ValueError, match=r"must run from 0 to 14.*got"):
        model(input_ids=row, cu_seqlens=bounds[:-1])
    with pytest.raises(ValueError, match="cu_seq_lens_q, cu_seq_lens_k must be the same bounds"):
        model(input_ids=row, cu_seq_lens_q=bounds, cu_seq_lens_k=torch.tensor([0, 14]))


def test_sdpa_attends_packed_samples_one_by_one():
    """As with a mask of all pairs of tokens, which is never made."""
    model = make_model().requires_grad_(True).train()
    ids = place(torch.randint(10, 200, (2, 40)))
    bounds = place(torch.tensor([0, 15, 40, 41, 41, 80]))
    found, pairs = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-2:] == (40, 40):
                pairs.append(func)
            return out

    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        model.zero_grad()
        pairs.clear()
        with Watch():
            out = model(input_ids=ids, cu_seqlens=bounds, labels=ids)
            out.loss.backward()
        assert bool(pairs) == (name == "eager")
        found.append((out.logits, [p.grad for p in model.parameters() if p.grad is not None]))
    (ours, gradients), (wanted, others) = found
    assert torch.allclose(ours, wanted, atol=1e-4)
    for gradient, other in zip(gradients, others, strict=True):
        assert_relative(gradient, other)
