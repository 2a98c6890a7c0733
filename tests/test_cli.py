"""The command line as users see it: output, exit status, one line for an error."""

import json
import warnings

import pytest
from commands import QUICK, broken, fails, run
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import comemo
from comemo.cli import info
from comemo.cli import main as cli

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint):
    return demo_checkpoint


@pytest.fixture(scope="module")
def picture(picture_file):
    return picture_file


def test_help_and_version(capsys):
    assert run(capsys)[:2] == (0, cli.make_parser().format_help())
    for argv in (["--version"], ["chat", "--help"], ["map", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        assert ended.value.code == 0
    assert comemo.__version__ in capsys.readouterr().out


def test_map(capsys, picture, tmp_path):
    status, out, err = run(capsys, "map", picture, "-o", tmp_path / "map.png", "--bias", "20")
    assert (status, out, err) == (0, f"{tmp_path / 'map.png'}\n", "")
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.width > 400


def test_info(capsys, checkpoint, loaded):
    status, out, err = run(capsys, "info", checkpoint, "--json")
    facts, model = json.loads(out), loaded[0]
    assert (status, err) == (0, "")
    assert facts == json.loads(json.dumps(info.describe_checkpoint(checkpoint)))
    assert facts["total"]["parameters"] == model.num_parameters()
    assert facts["total"]["bytes"] == 4 * model.num_parameters()
    layers = model.model.language_model.layers
    mixins = sum(p.numel() for layer in layers if layer.mixin for p in layer.mixin.parameters())
    assert facts["parts"]["mixin layers"]["parameters"] == mixins
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    assert facts["parts"]["vision tower"]["parameters"] == tower
    assert facts["mixin"]["before_layers"] == [2, 4]
    assert facts["memory_bytes_per_tile"]["float32"] == 2 * 2 * 4 * 64 * 256 * 4
    _, out, _ = run(capsys, "info", checkpoint)
    assert f"{model.num_parameters():,}" in out
    assert max(map(len, out.splitlines()[1:])) <= 100


def test_info_of_a_published_checkpoint(capsys, golden):
    facts = info.describe_checkpoint(golden / "ckpt_a")
    assert set(facts["parts"]) == set(info.PARTS)
    assert facts["total"]["dtypes"] == ["BF16"]
    assert facts["total"]["bytes"] == 2 * facts["total"]["parameters"]
    assert (facts["tile_order"], facts["decode_positions"]) == ("column", "raw")


def test_info_of_transformers_layout(tmp_path, loaded, checkpoint):
    loaded[0].save_pretrained(tmp_path, save_original_format=False)
    assert (
        info.describe_checkpoint(tmp_path)["parts"] == info.describe_checkpoint(checkpoint)["parts"]
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["chat"], "MODEL"),
        (["sing"], "invalid choice: 'sing'"),
        (["chat", "M", "a", "b"], "unrecognized arguments: b"),
        (["chat", "M", "a", "--colour"], "--colour"),
        (["chat", "M", " "], "empty"),
        (["chat", "/no/such", "a"], "no directory '/no/such'"),
        (["info", "/no/such"], "no directory '/no/such'"),
        (["chat", "M", "a", "--max-new-tokens", "0"], "at least 1 and at most 1,000,000, got '0'"),
        (["chat", "M", "a", "--max-new-tokens", "many"], "got 'many'"),
        (["chat", "M", "a", "--top-p", "1.5"], "at most 1, got '1.5'"),
        (["chat", "M", "a", "--temperature", "nan"], "got 'nan'"),
        (["chat", "M", "a", "--max-tiles", "5000"], "5000"),
        (["chat", "M", "a", "--rope", "square"], "invalid choice: 'square'"),
        (["chat", "M", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["map", "/no/such.png", "-o", "map.png"], "/no/such.png"),
        (["map", "/no/such.png"], "-o"),
        (["map", "a.png", "-o", "a.png", "--bias", "-1"], "--bias"),
        (["demo", "--image", "/no/such.png"], "/no/such.png"),
        (["demo", "--tiles", "41"], "at most 40"),
    ],
)
def test_mistakes_on_the_command_line(capsys, argv, said):
    assert said in fails(capsys, *argv)


def test_mistakes_with_files(capsys, checkpoint, picture, tmp_path):
    for path, said in (
        (tmp_path / "no.png", "No such file"),
        (tmp_path, "image file"),
        (checkpoint / "config.json", "not an image"),
    ):
        assert said in fails(capsys, "chat", checkpoint, "a", "--image", path)
    assert "no config.json" in fails(capsys, "chat", tmp_path, "a")
    assert "no device 'abacus'" in fails(capsys, "chat", checkpoint, "a", "--device", "abacus")
    assert ".png" in fails(capsys, "map", picture, "-o", tmp_path / "map.jpg")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "JSON"),
        ("config.json", b'{"model_type": "llama"}', "another model"),
        ("config.json", b'{"model_type": "comemo_chat", "tile_order": "zigzag"}', "zigzag"),
        ("config.json", b"[]", "another model"),
        ("tokenizer.model", None, "tokenizer.model"),
        ("tokenizer.model", b"no model", "wanted a sentencepiece model"),
        ("tokenizer_config.json", None, "has no tokenizer_config.json"),
        ("model.safetensors", None, "safetensors"),
        ("model.safetensors", b"no weights", "model.safetensors"),
    ],
)
def test_broken_checkpoints(capsys, checkpoint, tmp_path, name, content, said):
    copy = broken(checkpoint, tmp_path, name, content)
    assert said in fails(capsys, "chat", copy, "a", *QUICK)
    if not name.startswith("tokenizer"):
        assert said in fails(capsys, "info", copy)


def test_missing_weights_are_named(capsys, checkpoint, tmp_path):
    copy = broken(checkpoint, tmp_path, "generation_config.json")
    weights = load_file(copy / "model.safetensors")
    del weights["mlp1.1.bias"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "multi_modal_projector.1.bias" in fails(capsys, "chat", copy, "a", *QUICK)


def test_debug_shows_the_traceback(capsys):
    status, _, err = run(capsys, "chat", "/no/such", "a", "--debug")
    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("comemo: error: ")


def test_settings_of_the_libraries_are_restored(capsys, checkpoint):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)
    run(capsys, "info", checkpoint)
    fails(capsys, "info", "/no/such")
    assert before == (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        list(warnings.filters),
    )
