"""Recorded chats and prompts for tests of `generate`."""

import json

import pytest
import torch
from PIL import Image
from small import place

import comemo
import comemo_kernels as ops
from comemo.mixin import MixinLayer

CHATS = [
    "dhr_2x1",
    "rope_2x1",
    "dhr_1x1",
    "rope_1x1",
    "dhr_2x3",
    "rope_2x3",
    "dhr_two",
    "rope_two",
    "dhr_hist_1img",
    "rope_hist_1img",
    "dhr_hist_2img",
    "eos_1x1",
    "dhr_1x1_reppen",
    "e2e_wide_max12",
    "e2e_tall_max4",
]


GREEDY = {"max_new_tokens": 24, "do_sample": False}


RAW = {"output_logits": True, "return_dict_in_generate": True}


def case_of(golden, inputs, name):
    """The recorded call: its record, and the arguments of `chat`."""
    record = json.loads((golden / "generate.json").read_text())[f"a/{name}"]
    if name.startswith("e2e"):
        file = golden / "train_data" / record["image"]
        pixel_values, grid = comemo.load_image(file, max_num=record["max_num"], published=True)
        assert [list(grid)] == record["ratios"]
    else:
        pixel_values = torch.cat([inputs.tiles(s, n) for s, n in record["tile_seeds"]])
    history = record.get("history")
    config = dict(GREEDY)
    if name.endswith("reppen"):
        config |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    return record, {
        "pixel_values": pixel_values,
        "question": record["question"],
        "generation_config": config,
        "history": None if history is None else [tuple(turn) for turn in history],
        "num_patches_list": record.get("num_patches_list"),
        "target_aspect_ratio": record["ratios"] and [tuple(g) for g in record["ratios"]],
    }


def prepared(model, tokenizer, case):
    """The inputs that `chat` passes to `generate`."""
    turns = [*(case["history"] or []), (case["question"], None)]
    rest = (case["num_patches_list"], case["target_aspect_ratio"])
    return model.prepare_chat(tokenizer, case["pixel_values"], turns, *rest)[1]


@pytest.fixture
def count_builds(monkeypatch):
    """Returns a function that returns how often keys and values were built since it was made."""
    count = [0]
    build_memory, build = ops.build_memory, MixinLayer.build

    def all_layers(media, kv_weights, *args, **kwargs):
        count[0] += len(kv_weights)
        return build_memory(media, kv_weights, *args, **kwargs)

    def one_layer(*args):
        count[0] += 1
        return build(*args)

    monkeypatch.setattr(ops, "build_memory", all_layers)
    monkeypatch.setattr(MixinLayer, "build", one_layer)

    def since():
        before = count[0]
        return lambda: count[0] - before

    return since


def message(text, image=None):
    content = [{"type": "text", "text": text}]
    return [
        {"role": "user", "content": [{"type": "image", "image": image}] * bool(image) + content}
    ]


@pytest.fixture
def prompts_of(processor, inputs):
    """Model inputs of one or several conversations; the last has no image."""
    pictures = [
        Image.fromarray(inputs.picture(7, 900, 448)),
        Image.fromarray(inputs.picture(8, 448, 448)),
        None,
    ]
    texts = ["what is this?", "hello world, describe the image in some more words", "hi"]

    def build(*which):
        return place(
            dict(
                processor.apply_chat_template(
                    [message(texts[i], pictures[i]) for i in which],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                )
            )
        )

    return build


def answers(model, batch, **options):
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | options
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()
