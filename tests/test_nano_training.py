"""The recipe of comemo-nano learns: short runs from an untrained start, on pictures of one thing.

The model has half the width and a third of the depth of comemo-nano, so that a minute of one core
is enough for colours.
"""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from nano_words import messages_about

import comemo
from comemo.nano.__main__ import SHARES, prepare
from comemo.nano.dataset import write_items
from comemo.nano.drawing import draw_item
from comemo.nano.scenes import SEEDS, make_item
from comemo.nano.start import make_start
from comemo.nano.words import COLOURS
from comemo.train.config import read_settings
from comemo.train.recipe import train
from comemo.train.settings import DataSettings, StageSettings, StartSettings, TrainSettings

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_heap"),
    pytest.mark.no_virtual_gpu("Trainer places by its own rules"),
]
SMALL = {
    "llm_config": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "vision_config": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    },
    "mixin_config": {
        "language_dim": 64,
        "vision_dim": 64,
        "num_heads": 2,
        "intermediate_size": 64,
        "mixin_every_n_layers": 1,
    },
}
ASKED = 64  # held-out things
RECIPE = Path(__file__).parents[1] / "examples" / "nano"


def learn(folder, items, **stage):
    """Train on so many pictures; returns the model's folder and the loss of every step."""
    make_start(folder / "start", **SMALL)
    write_items(folder / "data", items)
    settings = TrainSettings(
        output=str(folder / "run"),
        start=StartSettings(checkpoint=str(folder / "start")),
        data=DataSettings(
            train=str(folder / "data" / "items.jsonl"),
            max_tokens=1024,
            buffer=4,
            max_dynamic_patch=1,
            workers=0,
        ),
        run=("items",),
        stages={
            "items": StageSettings(
                train=("vision", "projector", "mixin", "language"),
                packs_per_step=1,
                learning_rate=2e-3,
                schedule="cosine",
                gradient_checkpointing=False,
                precision="float32",
                save_every=10**6,
                **stage,
            )
        },
        seed=1,
        tensorboard=False,
        device="cpu",
    )
    model = train(settings, [].append)
    lines = (folder / "run" / "items" / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return model, [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.slow
def test_the_loss_falls_from_the_first_steps(tmp_path):
    _, losses = learn(tmp_path, 160, steps=12, warmup=4.0)
    assert len(losses) == 12
    assert max(losses[-3:]) < 0.75 * losses[0]


@pytest.mark.slow
def test_colours_are_learnt_in_a_minute(tmp_path):
    """Of shapes that were never seen: chance is one of eight."""
    folder, losses = learn(tmp_path, 2560, epochs=2.0, warmup=20.0)
    assert sum(losses[-10:]) / 10 < 0.25 * losses[0]
    model = comemo.CoMemoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = comemo.CoMemoProcessor.from_pretrained(folder)
    items, seeds = [], []
    for seed in SEEDS["held-out"]:
        item = make_item(Random(f"held out {seed}"))
        if item.kind == "shape":
            items.append(item)
            seeds.append(seed)
        if len(items) == ASKED:
            break
    inputs = processor.apply_chat_template(
        [
            messages_about([draw_item(item, seed)], f"Which colour is the {item.text}?")
            for item, seed in zip(items, seeds, strict=True)
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "max_num": 1},
    )
    tokens = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False)
    own = tokens[:, inputs["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.batch_decode(own, skip_special_tokens=True)]
    right = sum(answer == item.colour for answer, item in zip(answers, items, strict=True))
    assert len({item.colour for item in items}) == len(COLOURS)
    assert right > 0.8 * ASKED


@pytest.mark.slow
def test_what_training_begins_with_is_prepared(tmp_path):
    """As `make nano` does it, with next to nothing of everything."""
    prepare(tmp_path, albums=1, shapes=2, lessons=2, pictures=4, tower=1, parts=1)
    comemo.CoMemoForConditionalGeneration.from_pretrained(tmp_path / "start")
    for stage, shares in SHARES.items():
        known = json.loads((tmp_path / "data" / f"{stage}.json").read_text())
        assert known.keys() == shares.keys()
        for name, entry in known.items():
            assert Path(entry["annotation"]).is_file()
            assert entry["repeat_time"] == shares[name]
    for file in sorted(RECIPE.glob("*.yaml")):
        settings = read_settings(file, [])
        assert tuple(settings.run) == (file.stem,)
        assert Path(settings.data.train).stem in SHARES
