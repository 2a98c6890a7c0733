"""Checkpoints that are wrong, broken or hostile: one line that names the key or the file."""

import copy
import json
import os
from pathlib import Path

import pytest
from commands import QUICK, broken, fails, run
from faults import EVIL, STEERING, endless, giant, in_time, listener, loop, pipe
from transformers import LlamaConfig

import comemo
from comemo.cli import info

pytestmark = pytest.mark.usefixtures("one_thread")
SLOW = pytest.mark.slow
WRONG = [None, "", "x", EVIL, 0, -1, 1, 7, 10**30, 1.5, float("nan"), float("inf")]
WRONG += [True, False, [], [1], {}, {"a": 1}]


def mutations(config):
    """(path of a key, config) without each key, and with each wrong value for it."""

    def paths(part, above=()):
        for name, value in part.items():
            yield (*above, name)
            if isinstance(value, dict):
                yield from paths(value, (*above, name))

    for path in list(paths(config)):
        for value in [..., *WRONG]:
            changed = part = copy.deepcopy(config)
            for name in path[:-1]:
                part = part[name]
            if value is ...:
                del part[path[-1]]
            else:
                part[path[-1]] = value
            yield path, changed


# The step and the number of values have no common factor: each value meets many keys.
@pytest.mark.parametrize("step", [29, pytest.param(1, marks=SLOW)])
def test_mutated_configs(capsys, light, step):
    config = json.loads((light / "config.json").read_text())
    refused = 0
    for path, changed in list(mutations(config))[::step]:
        (light / "config.json").write_text(json.dumps(changed))
        status, out, err = run(capsys, "info", light)
        assert not STEERING.search(out + err), (path, out, err)
        if status == 0:
            assert err == "", path
            continue
        refused += 1
        assert (status, out, err.count("\n")) == (2, "", 1), (path, err)
        assert err.startswith("comemo: error: "), path
        assert any(name in err for name in path), (path, err)
    assert refused > 1500 / step


@pytest.mark.parametrize(
    "kind", ["", "text_config", "mixin_config", pytest.param("vision_config", marks=SLOW)]
)
def test_no_setting_replaces_what_a_config_is(kind):
    """Names of methods and constants of the classes, in each part, with values of all kinds."""
    config = comemo.CoMemoConfig().to_dict()
    kinds = {"": comemo.CoMemoConfig, "text_config": LlamaConfig}
    for number, name in enumerate(dir(kinds.get(kind, comemo.MixinConfig))):
        changed = copy.deepcopy(config)
        (changed[kind] if kind else changed)[name] = WRONG[number % len(WRONG)]
        try:
            made = comemo.CoMemoConfig.from_dict(changed)
            made.check()
        except ValueError:
            continue
        assert made.to_dict()["llm_config"]["vocab_size"], name
        assert isinstance(made.mixin_layers, tuple), name


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("llm_config", {"hidden_size": "x"}, r"llm_config.hidden_size must be a whole .* got 'x'"),
        ("llm_config", {"num_hidden_layers": 10**9}, "from 1 to 4096, got 1000000000"),
        ("llm_config", {"architectures": 3}, "llm_config.architectures must be .*, got 3"),
        ("llm_config", {"num_attention_heads": 7}, "llm_config.num_attention_heads must .* got 7"),
        ("llm_config", {"num_key_value_heads": 5}, "num_key_value_heads must divide .* got 5"),
        ("llm_config", {"rope_scaling": 3}, "rope_scaling must be null or a dictionary, got 3"),
        ("vision_config", {"patch_size": 0}, "vision_config.patch_size must be .*, got 0"),
        ("vision_config", {"hidden_act": "x"}, "vision_config.hidden_act must be one of .* 'x'"),
        ("vision_config", {"num_attention_heads": 7}, "vision_config.num_attention_heads .* got 7"),
        ("mixin_config", {"head_dim": 31}, "head_dim of mixin_config must be even, .* got 31"),
        ("", {"downsample_ratio": 0.3}, r"downsample_ratio must be 1 / n .* got 0.3"),
        ("", {"min_dynamic_patch": 13}, "at most max_dynamic_patch 12, got 13"),
        ("", {"use_thumbnail": "no"}, "use_thumbnail must be true or false, got 'no'"),
        ("", {"dtype": "int3"}, "dtype must be null or the name of .*, got 'int3'"),
        ("", {"attribute_map": {}}, "attribute_map is not a setting"),
        ("", {"template": ["x"] * 10**6}, r"template must be .*\.\.\. of 5,000,000 characters$"),
    ],
)
def test_a_wrong_setting_is_named(part, values, said):
    config = comemo.CoMemoConfig().to_dict() | {"text_config": None}
    (config[part] if part else config).update(values)
    with pytest.raises(ValueError, match=f"^CoMemoConfig: .*{said}"):
        comemo.CoMemoConfig.from_dict(config)
    with pytest.raises(ValueError, match=r"^CoMemoConfig: "):
        comemo.CoMemoConfig(**config)


def test_numbers_may_be_whole():
    """JSON has one kind of numbers, transformers two."""
    config = comemo.CoMemoConfig().to_dict()
    config["vision_config"] |= {"initializer_factor": 1, "initializer_range": 0}
    config["llm_config"]["rms_norm_eps"] = config["text_config"]["rms_norm_eps"] = 1
    made = comemo.CoMemoConfig.from_dict(config)
    assert made.vision_config.layer_scale_init_value == 1.0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"template": "\xe9"}', "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b"3", "another model"),
        (b'{"model_type": {}}', "another model"),
        (b'{"model_type": "comemo_chat", "configuration_files": 3}', "cannot be read"),
        (b'{"model_type": "comemo_chat", "select_layer": ' + b"1" * 5000 + b"}", "is not JSON"),
        (Path.mkdir, "Is a directory"),
        (pipe, "wanted a file, got a pipe"),
        (listener, "wanted a file, got a socket"),
        (endless, "wanted a file, got a device"),
        (loop, "holds no config.json"),
        (giant, "must have at most 67,108,864 bytes, got 1,099,511,627,776"),
    ],
)
def test_files_that_are_not_a_config(capsys, light, content, said):
    path = light / "config.json"
    path.unlink()
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    for command in (["info"], ["chat", light, "a"]):
        with in_time():
            assert said in fails(capsys, *command[:1], light, *command[2:])
    if isinstance(content, bytes):
        with pytest.raises((ValueError, OSError)):
            comemo.CoMemoConfig.from_pretrained(light)


@pytest.mark.parametrize("make", [pipe, listener, endless])
def test_special_files_never_block(capsys, light, tmp_path, picture_file, make):
    """An image, and each file that loading a checkpoint reads."""
    make(tmp_path / "special.png")
    with in_time():
        special = tmp_path / "special.png"
        for argv in (
            ["chat", light, "a", "--image", special],
            ["map", special, "-o", tmp_path / "map.png"],
            ["map", picture_file, "-o", special],
            ["demo", "--image", special],
        ):
            assert "wanted a file, got a " in fails(capsys, *argv)
        (light / "additional_chat_templates").mkdir()
        names = ("tokenizer_config.json", "tokenizer.model", "generation_config.json")
        names += ("model.safetensors", "additional_chat_templates/x.jinja")
        for name in names:
            kept = light / "kept"
            if (light / name).exists():
                (light / name).rename(kept)
            make(light / name)
            assert name in fails(capsys, "chat", light, "a", *QUICK)
            assert name in fails(capsys, "info", light)
            (light / name).unlink()
            if os.path.lexists(kept):
                kept.rename(light / name)


def test_damaged_weights(capsys, demo_checkpoint, tmp_path):
    whole = (demo_checkpoint / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    copied = broken(demo_checkpoint, tmp_path, "model.safetensors", whole)
    facts = info.describe_checkpoint(copied)["total"]
    for place in range(0, length, length // 20):
        damaged = bytearray(whole[: length + 1000 * place])
        damaged[place] ^= 0x11
        (copied / "model.safetensors").write_bytes(damaged)
        assert "model.safetensors" in fails(capsys, "info", copied)
    with open(copied / "model.safetensors", "wb") as file:
        file.write(whole)
    assert info.describe_checkpoint(copied)["total"] == facts


def test_files_of_a_tokenizer_and_of_generation(capsys, light):
    """If a library fails, the user is told the directory or the key."""
    for name, change, said in (
        ("tokenizer_config.json", {"pad_token": {"a": 1}}, "cannot be loaded"),
        ("tokenizer_config.json", {"sp_model_kwargs": 3}, "cannot be loaded"),
        ("generation_config.json", {"bos_token_id": "x"}, "generation_config.bos_token_id must"),
    ):
        content = (light / name).read_text()
        (light / name).write_text(json.dumps(json.loads(content) | change))
        assert said in fails(capsys, "chat", light, "a", *QUICK)
        (light / name).write_text(content)
    for name in ("tokenizer_config.json", "generation_config.json", "added_tokens.json"):
        content = (light / name).read_bytes()
        for damage, said in (
            (b"", "is not JSON"),
            (b"[" * 10**5, "nested"),
            (b"[]", "JSON object"),
        ):
            (light / name).write_bytes(damage)
            told = fails(capsys, "chat", light, "a", *QUICK)
            assert said in told
            assert name in told
        (light / name).write_bytes(content)
    config = json.loads((light / "config.json").read_text())
    for part in ("llm_config", "text_config"):
        config[part]["vocab_size"] -= 1
    (light / "config.json").write_text(json.dumps(config))
    assert "at most the model's 448 tokens, got 449" in fails(capsys, "chat", light, "a")
