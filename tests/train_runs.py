"""Ten pictures with questions, and the settings of a run over them that takes seconds."""

import json

import torch
from PIL import Image
from safetensors.torch import load_file
from small import make_model

from comemo.cli.tiny_checkpoint import make_checkpoint
from comemo.tokenizer import InternLM2Tokenizer
from comemo.train.settings import (
    DataSettings,
    LoraSettings,
    StageSettings,
    StartSettings,
    TrainSettings,
)

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "pink")
STAGES = ("pretrain", "pretrain_fixed_gates", "finetune")


def write_data(folder):
    """data.jsonl: ten pictures of one colour each, some wide, two in one sample, and a text."""
    rows = []
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (100 + 40 * (i % 3), 100), colour).save(folder / f"{i}.png")
        asked = {"from": "human", "value": "<image>\nWhich colour is it?"}
        said = {"from": "gpt", "value": f"It is {colour}."}
        rows.append({"image": f"{i}.png", "conversations": [asked, said]})
    asked = {"from": "human", "value": "<image> or <image>?"}
    said = {"from": "gpt", "value": "red and green."}
    rows.append({"image": ["0.png", "1.png"], "conversations": [asked, said]})
    asked, said = {"from": "human", "value": "Hello."}, {"from": "gpt", "value": "good day."}
    rows.append({"conversations": [asked, said]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(text, encoding="utf-8")


def make_start(folder, heads=3):
    """A checkpoint of `small.make_model` with a tokenizer, and data beside it."""
    make_checkpoint(folder / "tiny")
    words = len(InternLM2Tokenizer.from_pretrained(folder / "tiny"))
    make_model(vocab_size=words, heads=heads).cpu().save_pretrained(folder / "tiny")
    write_data(folder)


def entries_of(output, stage="pretrain"):
    """Loss by step, from the log of a stage."""
    lines = (output / stage / "log.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {entry["step"]: entry["loss"] for entry in found if "loss" in entry}


def weights_of(folder):
    """All weights of a checkpoint or a model, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def changed(before, after):
    """The names of weights that differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def settings_of(folder, output, run=("pretrain",), lora=None, **stage):
    """Settings of a run on the CPU; `stage` is for all stages, `lora` for the last."""
    own = {"steps": 4, "packs_per_step": 2, "save_every": 2, "learning_rate": 1e-3}
    own |= {"gradient_checkpointing": False} | stage
    stages = {
        "pretrain": StageSettings(drop_path=0.1, **own),
        "pretrain_fixed_gates": StageSettings(freeze_gates=True, **own),
        "finetune": StageSettings(
            train=("vision", "projector", "mixin", "language"),
            **({"schedule": "cosine"} | own),
        ),
    }
    if lora:
        stages[run[-1]].lora = LoraSettings(**lora)
    return TrainSettings(
        output=str(output),
        start=StartSettings(checkpoint=str(folder / "tiny"), model={"decode_positions": "raw"}),
        data=DataSettings(
            train=str(folder / "data.jsonl"),
            max_tokens=256,
            max_tiles=4,
            buffer=2,
            max_dynamic_patch=2,
            workers=0,
        ),
        run=run,
        stages={name: stages[name] for name in run},
        seed=1,
        shard_optimizer=True,
        tensorboard=False,
        device="cpu",
    )
