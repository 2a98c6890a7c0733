"""`comemo train` as users see it: help, notes, faults, Ctrl-C, exit status."""

import logging
import sys
import types

import pytest
from commands import fails, run

from comemo.cli import main as cli
from comemo.cli import train
from comemo.cli.options.train import split_words
from comemo.train.config import layers, read_settings
from comemo.train.monitor import LossFault

NEEDED = ["output=runs/a", "data.train=a.jsonl", "start.checkpoint=model", "steps=5"]


@pytest.fixture
def recipe(monkeypatch):
    """A recipe that notes what it is called with."""
    called = []
    module = types.ModuleType("comemo.train.recipe")
    module.train = lambda settings, **_: called.append(settings) or "runs/a/model"
    part = types.SimpleNamespace(
        lines=1300, samples=1240, tokens=90_000, labels=20_000, tiles=3000, bad={"image missing": 7}
    )
    faults = types.SimpleNamespace(counts={"a\x1b": {"image missing": 7}})
    module.check = lambda settings: types.SimpleNamespace(
        packs=[[5, 6], [5, 4]],
        steps=11,
        filled=0.93,
        padding=0.0,
        datasets={"a\x1b": part, "b": part},
        faults=faults,
    )
    module.called = called
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_help_shows_the_forms_of_settings(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for text in ("CONFIG.yaml", "--check", "--print", "learning_rate=1e-5", "torchrun", "resumes"):
        assert text in out


def test_print_shows_settings_that_can_be_read_back(capsys, tmp_path):
    status, out, err = run(capsys, "train", *NEEDED, "--print", "--learning-rate", "1e-5")
    assert (status, err) == (0, "")
    file = tmp_path / "a.yaml"
    file.write_text(out)
    assert read_settings(file) == read_settings(None, [*NEEDED, "learning_rate=1e-5"])
    assert run(capsys, "train", file, "--print")[1] == out


@pytest.mark.parametrize(
    "argv",
    [
        ["FILE", "seed=7", "--workers", "--keep", "3"],
        ["--keep", "3", "FILE", "--seed=7"],
        ["--print", "--keep=3", "--seed", "7", "FILE"],
    ],
)
def test_the_file_is_found_among_the_words(tmp_path, argv):
    argv = [word for word in argv if word != "--workers"]
    options, words = split_words(argv)
    assert options == [word for word in argv if word == "--print"]
    file, words = train.split_file(words)
    assert file == "FILE"
    settings = read_settings(None, [*NEEDED, *words])
    assert (settings.seed, settings.stages["finetune"].keep) == (7, 3)


def test_training_and_checking(capsys, recipe):
    assert run(capsys, "train", *NEEDED) == (0, "runs/a/model\n", "")
    assert recipe.called == [read_settings(None, NEEDED)]
    words = ["run=[pretrain, finetune, own]", "stages.pretrain.epochs=2", "stages.own.epochs=3"]
    status, out, err = run(capsys, "train", *NEEDED, *words, "packs_per_step=2", "--check")
    assert (status, err, len(recipe.called)) == (0, "", 1)
    table, _, rest = out.partition("\n\n")
    assert [line.split() for line in table.splitlines()] == [
        ["dataset", "lines", "samples", "tokens", "labels", "tiles", "bad"],
        [r"a\x1b", "1,300", "1,240", "90,000", "20,000", "3,000", "7"],
        ["b", "1,300", "1,240", "90,000", "20,000", "3,000", "7"],
        ["all", "2,600", "2,480", "180,000", "40,000", "6,000", "14"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
    assert rest.splitlines() == [
        "2 epochs: 20 packs, 93% of 16,384 tokens, padding 0%",
        "stage pretrain: 2 epochs are 11 steps of 2 packs",
        "stage finetune: 5 steps of 2 packs read the data 1.00 times",
        "stage own: 3 epochs are about 15 steps of 2 packs",
        r"bad: a\x1b: 7 x image missing",
    ]


def test_notes_of_old_names(capsys, recipe):
    status, _, err = run(capsys, "train", *NEEDED, "--warmup_ratio", "0.1", "fp16=False")
    assert status == 0
    assert err.splitlines() == [
        "comemo: note: warmup_ratio is called warmup here",
        "comemo: note: fp16 has no effect: it is off here too",
    ]


def test_mistakes(capsys, tmp_path):
    assert "wanted CONFIG.yaml or settings" in fails(capsys, "train")
    assert "No such file" in fails(capsys, "train", tmp_path / "none.yaml")
    assert "did you mean seed?" in fails(capsys, "train", *NEEDED, "sed=1")
    status, out, err = run(capsys, "train", *NEEDED, "sed=1", "keep=0", "x\x1b=1")
    assert (status, out) == (2, "")
    lines = err.splitlines()
    assert lines[0] == "comemo: error: the command line has 3 faults:"
    assert [line.split()[0] for line in lines[1:]] == ["sed", "wanted", "keep"]
    assert "\x1b" not in err


def test_warnings_are_lines_without_control_characters(capsys, recipe):
    def warn(settings, tell):
        logging.getLogger("comemo.train.data").warning("%s:7: skipped", "a\x1b[2J.jsonl")
        tell("stage \x1b[2J finetune")
        return "runs/a/model"

    recipe.train = warn
    status, _, err = run(capsys, "train", *NEEDED)
    assert status == 0
    assert err.splitlines() == [
        "comemo: warning: a\\x1b[2J.jsonl:7: skipped",
        "stage \\x1b[2J finetune",
    ]
    assert not logging.getLogger("comemo").handlers


def test_only_the_first_of_several_processes_speaks(capsys, recipe, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "train", *NEEDED, "bf16=True") == (0, "", "")
    assert run(capsys, "train", *NEEDED, "sed=1") == (2, "", "")


def test_a_bad_loss_is_told_once(capsys, recipe, monkeypatch):
    def fail(settings, **_):
        raise LossFault("train: step 3: the loss is nan")

    recipe.train = fail
    assert fails(capsys, "train", *NEEDED) == "comemo: error: step 3: the loss is nan\n"
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "train", *NEEDED) == (2, "", "")


def test_ctrl_c_says_how_to_go_on(capsys, recipe):
    def interrupt(settings, **_):
        raise KeyboardInterrupt

    recipe.train = interrupt
    status, out, err = run(capsys, "train", *NEEDED)
    assert (status, out) == (130, "")
    assert err == "\nstopped: the same command resumes runs/a\n"


@pytest.mark.parametrize(
    ("missing", "words", "named"),
    [
        ("yaml", [], "yaml"),
        ("accelerate", [], "accelerate"),
        ("peft", ["lora.language=4"], "peft"),
        ("peft", [], None),
    ],
)
def test_missing_packages(capsys, recipe, monkeypatch, missing, words, named):
    find = layers.importlib.util.find_spec
    monkeypatch.setattr(
        layers.importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    if named is None:
        assert run(capsys, "train", *NEEDED, *words)[0] == 0
    else:
        said = fails(capsys, "train", *NEEDED, *words)
        assert f"training needs {named}: pip install" in said
        assert 'pip install "comemo-kernels[train]"' in said
