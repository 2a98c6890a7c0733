"""Random packs for `small.make_model`, and a trainer for them."""

import torch
from small import make_model
from transformers import TrainingArguments

from comemo.train import ranks
from comemo.train.trainer import RecipeTrainer


def make_pack(stream, index):
    """Two samples of 30 and a few tokens; every other pack has an image in the first."""
    draw = torch.Generator().manual_seed(1000 * stream + index)
    N = 40 + int(torch.randint(0, 9, (1,), generator=draw))
    ids = torch.randint(10, 200, (1, N), generator=draw)
    image = bool((stream + index) % 2)
    if image:
        ids[:, 5:21] = 299
    labels = ids.clone()
    labels[:, :22] = labels[:, 30:33] = -100
    weights = torch.rand(1, N, generator=draw) * (labels != -100)
    places = torch.cat([torch.arange(30), torch.arange(N - 30)])[None]
    pack = {"input_ids": ids, "labels": labels, "loss_weights": weights, "position_ids": places}
    pack |= {"cu_seqlens": torch.tensor([0, 30, N])}
    pack["samples"] = [("a", "a.jsonl", 2 * index + 1), ("b", "b.jsonl", index + 1)]
    if image:
        tiles = torch.randint(0, 256, (1, 3, 112, 112), generator=draw, dtype=torch.uint8)
        pack |= {"pixel_values": tiles, "tile_grid": [(1, 1)]}
    return pack


def make_filler():
    """What stands in for a stream without data."""
    ids = torch.tensor([[5, 6]])
    return {
        "input_ids": ids,
        "labels": torch.full_like(ids, -100),
        "loss_weights": torch.zeros(1, 2),
        "position_ids": torch.tensor([[0, 1]]),
        "cu_seqlens": torch.tensor([0, 2]),
        "samples": [],
    }


class Packs:
    """Endless packs of some streams; `ends` says after how many packs a stream has only fillers."""

    def __init__(self, streams, ends=None):
        self.places, self.ends = dict.fromkeys(streams, 0), ends or {}

    def __iter__(self):
        while True:
            for stream, index in list(self.places.items()):
                self.places[stream] += 1
                ended = index >= self.ends.get(stream, index + 1)
                yield make_filler() if ended else make_pack(stream, index)

    def filler(self):
        return make_filler()

    def state_dict(self):
        return {"streams": {str(stream): place for stream, place in self.places.items()}}

    def load_state_dict(self, state):
        self.places = {stream: state["streams"][str(stream)] for stream in self.places}


def make_trainer(folder, total=2, steps=3, model=None, watch=None, ends=None, held_out=None, **own):
    """A trainer, on the CPU by default; `own` are transformers' arguments or RecipeTrainer's."""
    torch.manual_seed(0)
    model = model or make_model().cpu().requires_grad_(True)
    streams = list(range(ranks.rank(), total, ranks.world_size()))
    named = ("eval_every", "shard_optimizer", "tell")
    more = {name: own.pop(name) for name in named if name in own}
    options = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "save_steps": 1,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "use_cpu": True,
        **own,
    }
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(streams),
        ignore_data_skip=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    reports = []

    def keep(trainer, report):
        reports.append(report)
        if watch:
            watch(trainer, report)

    trainer = RecipeTrainer(
        model,
        arguments,
        loader=Packs(streams, ends),
        streams=streams,
        save=model.save_pretrained,
        watch=keep,
        held_out=held_out,
        **more,
    )
    return trainer, reports
