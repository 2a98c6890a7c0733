"""Training by other people's tools: Trainer, packing, checkpointing of gradients, DDP, FSDP2."""

import copy
import json

import pytest
import torch
from conftest import TRACED, here
from small import make_model, make_prompts, place
from transformers import (
    AutoModel,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import comemo
from comemo.checkpoint import from_published

pytest.importorskip("accelerate")  # which Trainer needs


def trainable(**llm):
    return make_model(**llm).requires_grad_(True)


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same_gradients(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        scale = grad.abs().max().clamp(min=1e-3)
        assert (found[name] - grad).abs().max() <= tolerance * scale, name


# --- Trainer ---

# Its clipping mixes a number on the CPU into sums on a GPU, which a real one allows.
ON_CPU = pytest.mark.no_virtual_gpu("Trainer places and clips by its own rules")

IDS = torch.arange(3, 3 + 4 * 24).view(4, 24)
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def collate(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class Noted(TrainerCallback):
    """The head's weights when training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}


def train(model, folder, rows=ROWS, resume=None, **options):
    options = {"learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1} | options
    options |= {"lr_scheduler_type": "constant", "report_to": [], "disable_tqdm": True}
    noted = Noted()
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), use_cpu=here() == "cpu", **options),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        callbacks=[noted],
    )
    trainer._get_train_sampler = lambda *_, **__: torch.utils.data.SequentialSampler(rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, noted.weights


@ON_CPU
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_do_not_depend_on_how_a_batch_is_split(golden, tmp_path, weighted):
    torch.manual_seed(0)
    rows = [dict(row, labels=row["labels"].clone()) for row in ROWS]
    if weighted:
        for i, row in enumerate(rows):
            row["loss_weights"] = torch.rand(24)
            row["labels"][: 3 * i] = -100  # samples of different lengths
    told = set()
    for batch, steps in ((4, 1), (2, 2), (1, 4)):
        model = AutoModel.from_pretrained(golden / "ckpt_a", dtype=torch.float32).to(here())
        trainer, _ = train(
            model,
            tmp_path,
            rows,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=1e9,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        told.add((round(log["loss"], 3), round(log["grad_norm"], 2)))
    assert len(told) == 1, told
    if not weighted:
        # Of 92 labels that are predicted; Trainer counted the first of a row too until 5.11.
        counted = int(trainer._get_num_items_in_batch([collate(rows)], "cpu"))
        assert counted in (92, 96)
        ((loss, norm),) = told
        assert loss == pytest.approx(9.696 * 92 / counted, abs=6e-4)
        assert norm == pytest.approx(20.06 * 92 / counted, abs=6e-3)


@ON_CPU
def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    options = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2}
    model = trainable()
    train(model, tmp_path, max_steps=2, **options)
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    _, started = train(trainable(), tmp_path, resume=str(checkpoint), max_steps=3)
    assert all(torch.equal(started[name], weight) for name, weight in saved.items())
    fresh = dict(trainable().named_parameters())
    assert not torch.equal(started["lm_head.weight"], fresh["lm_head.weight"])


@ON_CPU
def test_the_best_model_is_there_at_the_end(tmp_path):
    model = trainable()
    trainer, _ = train(
        model,
        tmp_path,
        learning_rate=1.0,  # far too large: the first step is the best
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    best = trainer.state.best_model_checkpoint
    assert best.endswith("-1")
    wanted = AutoModel.from_pretrained(best, dtype=torch.float32).to(here())
    for (name, weight), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(weight, other), name


# --- weights by load_state_dict, as trainers load them ---


def published_weights(model, folder, **options):
    from safetensors.torch import load_file

    model.save_pretrained(folder, **options)
    return [load_file(file) for file in sorted(folder.glob("*.safetensors"))]


@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("part", ["whole", "base", "shards"])
def test_published_names_are_loaded(tmp_path, architecture, part):
    model = trainable(architectures=[architecture])
    shards = published_weights(
        model, tmp_path, **({"max_shard_size": "60KB"} if part == "shards" else {})
    )
    assert (len(shards) > 1) == (part == "shards")
    other = trainable(architectures=[architecture])
    torch.nn.init.zeros_(other.lm_head.weight)
    for weight in other.model.parameters():
        torch.nn.init.zeros_(weight)
    found = other.model if part == "base" else other
    for weights in shards:
        result = found.load_state_dict(weights, strict=part != "shards")
        assert not result.unexpected_keys
    for name, weight in (model.model if part == "base" else model).state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


def test_weights_that_do_not_fit_leave_the_model_as_it_was(tmp_path):
    model = trainable()
    (weights,) = published_weights(model, tmp_path)
    before = copy.deepcopy(model.state_dict())
    name = "language_model.output.weight"
    for broken, told in (
        (weights | {"language_model.model.more.weight": torch.zeros(1)}, "unexpected.*more"),
        (weights | {name: torch.zeros(3, 64)}, r"of another shape.*\(3, 64\) for \(300, 64\)"),
        ({n: w for n, w in weights.items() if n != name}, "missing.*lm_head"),
    ):
        changed = {
            n: torch.zeros_like(w) if w.is_floating_point() else w for n, w in broken.items()
        }
        with pytest.raises(ValueError, match=f"load_state_dict: weights {told}"):
            model.load_state_dict(changed)
        if not told.startswith("missing"):  # which may be asked for
            with pytest.raises(ValueError, match=f"load_state_dict: weights {told}"):
                model.load_state_dict(changed, strict=False)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    ours = from_published(weights, model.config)
    assert ours.keys() == before.keys()


# --- packed rows ---


def alone(model, samples):
    """Logits of each sample by itself."""
    with torch.no_grad():
        return [model(input_ids=place(ids[None]), use_cache=False).logits[0] for ids in samples]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens", "cu_seqlens"])
def test_samples_that_transformers_packed_are_the_samples_alone(implementation, told):
    model = make_model()
    model.set_attn_implementation(implementation)
    samples = [torch.randint(10, 200, (n,)) for n in (7, 1, 12, 5)]
    collator = DataCollatorWithFlattening(
        return_position_ids=told == "position_ids", return_flash_attn_kwargs=told == "cu_seq_lens"
    )
    batch = collator([{"input_ids": ids.tolist()} for ids in samples])
    labels = batch.pop("labels")
    if told == "cu_seqlens":
        batch["cu_seqlens"] = torch.tensor([0, 7, 8, 20, 25])
    batch = place(dict(batch))
    with torch.no_grad():
        out = model(**batch, labels=place(labels))
    wanted = torch.cat(alone(model, samples))
    assert torch.allclose(out.logits[0], wanted, atol=2e-5)
    assert out.past_key_values is None
    assert out.cache is None
    assert out.loss.isfinite()


def test_pictures_of_a_pack_are_seen_by_their_own_sample():
    model = make_model()
    prompts = make_prompts(model)
    ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
    tiles, grids = prompts["pixel_values"], prompts["tile_grid"]
    text = place(torch.randint(10, 200, (6,)))
    samples = [(ids[0][mask[0]], [0]), (text, []), (ids[1], [1, 2])]
    logits, places = [], []
    with torch.no_grad():
        for own, which in samples:
            given = {"pixel_values": tiles[which], "tile_grid": [grids[i] for i in which]}
            given = given if which else {}
            logits.append(model(input_ids=own[None], use_cache=False, **given).logits[0])
            image = model.model.find_image_tokens(own[None])
            grid = given.get("tile_grid")
            places.append(model.model.prompt_position_ids(image, torch.ones_like(own[None]), grid))
        row = torch.cat([own for own, _ in samples])[None]
        lengths = torch.tensor([0, *(len(own) for own, _ in samples)]).cumsum(0)
        given = {"input_ids": row, "pixel_values": tiles, "tile_grid": grids}
        for packed in (
            {"position_ids": torch.cat(places, 1)},
            {"cu_seq_lens_q": place(lengths), "cu_seq_lens_k": place(lengths)},
        ):
            found = model(**given, **packed).logits[0]
            assert torch.allclose(found, torch.cat(logits), atol=5e-5), list(packed)


def test_a_memory_of_packed_rows_goes_on_being_read_by_its_samples():
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
        with pytest.raises(ValueError, match=r"spans say what each token reads, .*got \(1, 1, 2\)"):
            model(**embeds, **bounds, image_memory=whole.image_memory)


def test_two_rows_may_be_packed():
    model = make_model()
    samples = [torch.randint(10, 200, (n,)) for n in (4, 8, 6, 6)]
    rows = place(torch.stack([torch.cat(samples[:2]), torch.cat(samples[2:])]))
    places = [torch.arange(len(ids)) for ids in samples]
    ids = place(torch.stack([torch.cat(places[:2]), torch.cat(places[2:])]))
    with torch.no_grad():
        found = model(input_ids=rows, position_ids=ids).logits.flatten(0, 1)
    assert torch.allclose(found, torch.cat(alone(model, samples)), atol=2e-5)


@TRACED
def test_a_compiled_forward_packs_too(real_device):
    model = make_model().to(real_device)
    samples = [torch.randint(10, 200, (n,)) for n in (5, 9)]
    ids = torch.cat([torch.arange(len(s)) for s in samples])[None].to(real_device)
    row = torch.cat(samples)[None].to(real_device)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(input_ids=row, position_ids=ids, use_cache=False).logits[0]
        wanted = [model(input_ids=s[None].to(real_device)).logits[0] for s in samples]
    assert torch.allclose(found, torch.cat(wanted), atol=2e-5)


def test_what_a_pack_cannot_be():
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
    with pytest.raises(ValueError, match=r"must lead from 0 to 14.*got"):
        model(input_ids=row, cu_seqlens=bounds[:-1])
    with pytest.raises(ValueError, match="cu_seq_lens_q, cu_seq_lens_k must be the same bounds"):
        model(input_ids=row, cu_seq_lens_q=bounds, cu_seq_lens_k=torch.tensor([0, 14]))


# --- checkpointing of gradients ---


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pictures", [False, True])
def test_checkpointed_gradients_are_those_of_none(reentrant, pictures):
    model = trainable().train()
    batch = make_prompts(model)
    if not pictures:
        batch = {"input_ids": place(torch.randint(10, 200, (2, 9)))}
    labels = batch["input_ids"].clone()
    model(**batch, labels=labels).loss.backward()
    wanted = {n: g for n, g in gradients(model).items() if g is not None}
    assert pictures == ("model.vision_tower.embeddings.cls_token" in wanted)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    out = model(**batch, labels=labels)
    out.loss.backward()
    found = {n: g for n, g in gradients(model).items() if g is not None}
    assert_same_gradients(found, wanted)
    assert out.past_key_values is None


# --- several processes ---


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def cpu_model(real_device):
    return trainable().cpu().train()


def test_ddp_takes_batches_without_pictures(group, cpu_model):
    """Each step must bring a gradient for every weight: zero where no picture was seen."""
    text = {"input_ids": torch.randint(10, 200, (2, 9))}
    pictures = {n: x.cpu() if hasattr(x, "cpu") else x for n, x in make_prompts(cpu_model).items()}
    with torch.no_grad():
        plain = copy.deepcopy(cpu_model).eval()(**text).logits
    wrapped = torch.nn.parallel.DistributedDataParallel(cpu_model)
    for batch in (text, pictures, text):
        cpu_model.zero_grad()
        out = wrapped(**batch, labels=batch["input_ids"])
        out.loss.backward()
        assert all(p.grad is not None for p in cpu_model.parameters())
        assert (out.image_memory is None) == (batch is text)
    assert torch.allclose(out.logits, plain, atol=1e-6)
    blind = [n for n, g in gradients(cpu_model).items() if "vision_tower" in n or "mixin" in n]
    assert blind
    assert all(cpu_model.get_parameter(n).grad.abs().max() == 0 for n in blind)


def test_fsdp2_shards_the_layers_that_accelerate_finds(group, cpu_model):
    """By its choice of layers; its own wrapping asks for an accelerator."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    pictures = {n: x.cpu() if hasattr(x, "cpu") else x for n, x in make_prompts(cpu_model).items()}
    batches = [pictures, {"input_ids": torch.randint(10, 200, (2, 9))}]
    wanted = []
    for batch in batches:
        cpu_model.zero_grad()
        cpu_model(**batch, labels=batch["input_ids"]).loss.backward()
        wanted.append(gradients(cpu_model))
    mesh = init_device_mesh("cpu", (1,))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, cpu_model)
    layers = [module for module in cpu_model.modules() if wraps(module)]
    assert {type(layer).__name__ for layer in layers} == {
        "CoMemoDecoderLayer",
        "InternVLVisionLayer",
    }
    for module in (*layers, cpu_model):
        fully_shard(module, mesh=mesh)
    for batch, grads in zip(batches, wanted, strict=True):
        cpu_model.zero_grad()
        cpu_model(**batch, labels=batch["input_ids"]).loss.backward()
        found = gradients(cpu_model)
        assert all(isinstance(grad, DTensor) for grad in found.values())
        assert_same_gradients({n: grad.full_tensor() for n, grad in found.items()}, grads)


@ON_CPU
def test_a_checkpoint_of_a_trainer_tells_its_config(tmp_path):
    trainer, _ = train(trainable(), tmp_path, max_steps=1)
    trainer.save_model(str(tmp_path / "out"))
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["model_type"] == comemo.CoMemoConfig.model_type
    assert {"llm_config", "text_config", "vision_config", "mixin_config"} <= told.keys()


@ON_CPU
def test_predictions_are_the_logits_with_pictures_and_without(tmp_path):
    """A step of an evaluation may hold pictures, the next none; what they give is joined."""
    model = make_model()
    pictured = make_prompts(model)
    ids = pictured["input_ids"].masked_fill(pictured["input_ids"] == 299, 5)
    steps = [pictured, {"input_ids": ids, "attention_mask": pictured["attention_mask"]}]
    options = {"use_cpu": here() == "cpu", "report_to": [], "disable_tqdm": True}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=1, **options),
        data_collator=lambda rows: {**rows[0], "labels": rows[0]["input_ids"]},
    )
    found = trainer.predict(steps).predictions
    wanted = torch.cat([model(**step).logits for step in steps])
    torch.testing.assert_close(torch.from_numpy(found), wanted)
