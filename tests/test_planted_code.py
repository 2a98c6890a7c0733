"""Code that a checkpoint holds or names is not run, and the user is not asked whether to run it."""

import builtins
import contextlib
import io
import json
import os
import shutil
import sys
import warnings

import pytest
import torch
from conftest import SLOW
from jinja2.exceptions import SecurityError
from planting import CODE, CONFIG, OF_MODEL, PLACES, PROCESSOR, TOKENIZER, edit
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)
from transformers.models.auto.feature_extraction_auto import AutoFeatureExtractor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from comemo import (
    CoMemoConfig,
    CoMemoForConditionalGeneration,
    CoMemoImageProcessor,
    CoMemoModel,
    CoMemoProcessor,
    InternLM2Tokenizer,
    prompts,
)
from comemo.cli import main as cli

pytestmark = pytest.mark.usefixtures("one_thread")


# --- ways to load ---


def chat(directory):
    """The first line of a user is a question, not consent to anything."""
    sys.stdin = io.StringIO("y\n")
    words = [
        "chat",
        str(directory),
        "--max-new-tokens",
        "1",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    status = cli.main(words)
    assert sys.stdin.read() == ("y\n" if status else "")
    if status:
        raise ValueError


def info(directory):
    if cli.main(["info", str(directory)]):
        raise ValueError


def generate(directory, **trust):
    model = CoMemoForConditionalGeneration.from_pretrained(directory, **trust)
    ids = torch.ones(1, 1, dtype=torch.long)
    model.generate(ids, max_new_tokens=1)
    with pytest.raises(ValueError, match="generate: custom_generate must be a function, got"):
        model.generate(ids, custom_generate=str(directory), **trust)
    with pytest.raises(ValueError, match="generate: custom_generate must be a function, got"):
        model.load_custom_generate(directory, **trust)
    return model


def pipe(directory, **trust):
    return pipeline("image-text-to-text", str(directory), **trust).processor


# Name -> a function that loads, and the class of the result if nothing is refused.
OURS = (CoMemoConfig, CoMemoImageProcessor, InternLM2Tokenizer, CoMemoProcessor)
MODELS = (CoMemoModel, CoMemoForConditionalGeneration)
DOORS = {own.__name__: (own.from_pretrained, own) for own in OURS + MODELS} | {
    "AutoConfig": (AutoConfig.from_pretrained, CoMemoConfig),
    "AutoModel": (AutoModel.from_pretrained, CoMemoForConditionalGeneration),
    "AutoModelFor": (AutoModelForSequenceClassification.from_pretrained, None),
    "AutoTokenizer": (AutoTokenizer.from_pretrained, InternLM2Tokenizer),
    "AutoImageProcessor": (AutoImageProcessor.from_pretrained, CoMemoImageProcessor),
    "AutoProcessor": (AutoProcessor.from_pretrained, CoMemoProcessor),
    "AutoVideoProcessor": (AutoVideoProcessor.from_pretrained, None),
    "AutoFeatureExtractor": (AutoFeatureExtractor.from_pretrained, None),
    "chat": (chat, type(None)),
    "info": (info, type(None)),
    "generate": (generate, CoMemoForConditionalGeneration),
    "pipeline": (pipe, CoMemoProcessor),
}
READ_PROCESSOR = {"CoMemoProcessor", "AutoProcessor", "pipeline"}
READ_TOKENIZER = {"InternLM2Tokenizer", "AutoTokenizer", "chat"} | READ_PROCESSOR
READ_WEIGHTS = {*(m.__name__ for m in MODELS), "AutoModel", "chat", "generate", "pipeline"}
TRUST = [{}, {"trust_remote_code": False}, {"trust_remote_code": True}]


def is_refused(place, door):
    if place in CONFIG:
        return door not in ("InternLM2Tokenizer", "AutoTokenizer")
    tokenizer = place in TOKENIZER and door in READ_TOKENIZER
    return tokenizer or (place in PROCESSOR and door in READ_PROCESSOR) or DOORS[door][1] is None


def is_slow(place, door):
    """It loads weights, and another place shows the same."""
    early = is_refused(place, door) and (door == "chat" or place in CONFIG)
    return door in READ_WEIGHTS and place not in OF_MODEL and not early


@pytest.fixture(scope="module")
def plant(demo_checkpoint, tmp_path_factory):
    """A checkpoint for every place, not to be written to."""
    made = {}

    def planted(place):
        if place not in made:
            made[place] = directory = tmp_path_factory.mktemp(place) / place
            shutil.copytree(demo_checkpoint, directory, copy_function=os.link)
            code = CODE.format(canary=str(directory / "canary"))
            (directory / "planted.py").write_text(code)
            PLACES[place](directory)
        return made[place]

    return planted


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Questions that the user is asked; the answer is yes."""
    questions = []
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(builtins, "input", lambda text="": questions.append(text) or "y")
    return questions


@pytest.mark.parametrize(
    ("place", "door"),
    [
        pytest.param(place, door, marks=SLOW if is_slow(place, door) else (), id=f"{place}-{door}")
        for place in PLACES
        for door in DOORS
    ],
)
def test_no_code_is_run_and_nobody_asked(plant, asked, place, door):
    directory, (load, own) = plant(place), DOORS[door]
    trusts = TRUST[:1] if door in ("chat", "info") else TRUST
    if own in MODELS and door != "AutoModel":
        trusts = TRUST[-1:]  # it is dropped at once, and loading weights is slow
    for trust in trusts:
        (directory / "canary").unlink(missing_ok=True)
        found = error = None
        try:
            found = load(directory, **trust)
        except ValueError as caught:
            error = caught
        assert not (directory / "canary").exists()
        assert not asked
        assert (error is not None) == is_refused(place, door), error
        assert error or type(found) is own
        assert "trust_remote_code" not in str(error)


@pytest.mark.parametrize("own", OURS + MODELS)
def test_our_classes_run_no_code_of_another_model(plant, asked, tmp_path, own):
    shutil.copytree(plant("everywhere"), directory := tmp_path / "copy")
    edit(directory, "config", model_type="planted")
    (directory / "planted.py").write_text(CODE.format(canary=str(directory / "canary")))
    (directory / "canary").unlink(missing_ok=True)
    without_config = own in (InternLM2Tokenizer, CoMemoImageProcessor)  # their files name no class
    refusal = pytest.raises(ValueError, match="model_type must be 'comemo_chat', got 'planted'")
    with contextlib.nullcontext() if without_config else refusal:
        own.from_pretrained(directory, trust_remote_code=True)
    assert not (directory / "canary").exists()
    assert not asked


@pytest.mark.parametrize("place", ["tokenizer", "processor", "everywhere", "pictures"])
def test_no_code_of_a_repository_is_run(plant, asked, place, tmp_path):
    """In the layout of the hub's cache."""
    repository, commit = tmp_path / "models--some--model", "0" * 40
    shutil.copytree(plant(place), directory := repository / "snapshots" / commit)
    (directory / "canary").unlink(missing_ok=True)
    (directory / "planted.py").write_text(CODE.format(canary=str(directory / "canary")))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = "CoMemoForConditionalGeneration"  # AutoModel would look for adapters outside the cache
    for door in (model, "AutoConfig", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor"):
        load, own = DOORS[door]
        where = {"cache_dir": tmp_path, "local_files_only": True}
        if is_refused(place, door):
            with pytest.raises(ValueError, match=r"must name .* or no class"):
                load("some/model", trust_remote_code=True, **where)
        else:
            assert type(load("some/model", trust_remote_code=True, **where)) is own
    assert not (directory / "canary").exists()
    assert not asked


@pytest.fixture
def own_copy(demo_checkpoint, tmp_path):
    """A checkpoint that a test may edit."""
    shutil.copytree(demo_checkpoint, directory := tmp_path / "copy", copy_function=os.link)
    return directory


def test_no_pickle_is_read_among_safetensors(own_copy, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    names = load_file(own_copy / "model.safetensors")
    (own_copy / "model.safetensors").rename(own_copy / "some.safetensors")
    torch.save({"weight": Bomb()}, own_copy / "other.bin")
    edit(
        own_copy,
        "model.safetensors.index",
        metadata={},
        weight_map=dict.fromkeys(names, "other.bin"),
    )
    for door in (CoMemoForConditionalGeneration, CoMemoModel, AutoModel):
        with pytest.raises(ValueError, match=r"must be safetensors, got \['other.bin'\]"):
            door.from_pretrained(own_copy, weights_only=False)
    assert not (tmp_path / "canary").exists()


def test_an_adapter_beside_the_weights_is_refused(own_copy):
    edit(own_copy, "adapter_config", peft_type="LORA", megatron_config={}, megatron_core="planted")
    for door in (CoMemoForConditionalGeneration, AutoModel):
        with pytest.raises(
            ValueError, match=r"adapter_config\.json must not be in the same directory"
        ):
            door.from_pretrained(own_copy)


def test_a_checkpoint_names_no_kernel(own_copy):
    kernel = {"attn_implementation": "some/kernel", "_attn_implementation": "some/kernel"}
    kernel |= {"experts_implementation": "some/kernel", "_experts_implementation": "some/kernel"}
    parts = json.loads((own_copy / "config.json").read_text())
    for name in ("text_config", "vision_config"):
        edit(own_copy, "config", **kernel, **{name: parts[name] | kernel})
    for door in (CoMemoForConditionalGeneration, AutoModel):
        model = door.from_pretrained(own_copy)
        for config in (model.config, model.config.text_config, model.config.vision_config):
            assert config._attn_implementation == "sdpa"
    for config in (
        CoMemoConfig.from_pretrained(own_copy, attn_implementation="eager"),
        CoMemoConfig.from_json_file(own_copy / "config.json"),
    ):
        assert config._attn_implementation in ("eager", None)
        assert "some/kernel" not in str(config.to_dict())


def test_generate_takes_a_function(loaded):
    ids = torch.ones(1, 2, dtype=torch.long, device=loaded[0].device)
    found = loaded[0].generate(
        ids, max_new_tokens=1, custom_generate=lambda _, ids, **rest: ids + 1
    )
    assert found.tolist() == [[2, 2]]


# --- chat templates ---

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "file",
    [
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/other.jinja",
        "processor_config.json",
        "tokenizer_config.json",
    ],
)
def test_no_template_of_a_checkpoint_is_used(own_copy, file):
    (own_copy / file).parent.mkdir(exist_ok=True)
    if file.endswith("jinja"):
        (own_copy / file).write_text(ENDLESS)
    else:
        edit(own_copy, file.removesuffix(".json"), chat_template=ENDLESS)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        processor = CoMemoProcessor.from_pretrained(own_copy)
    ours = [str(warning.message) for warning in warned if "is not a published one" in str(warning)]
    assert len(ours) == (file != "tokenizer_config.json")  # which only the tokenizer reads
    asked = [{"role": "user", "content": "who?"}]
    assert processor.apply_chat_template(asked).endswith("<|im_start|>user\nwho?<|im_end|>")
    assert processor.chat_template == prompts.chat_template()
    chosen = CoMemoProcessor.from_pretrained(own_copy, chat_template="{{ 'mine' }}")
    assert chosen.apply_chat_template(asked) == "mine"
    processor.save_pretrained(own_copy / "again")
    assert (own_copy / "again" / "chat_template.jinja").read_text() == processor.chat_template


def test_a_template_of_the_tokenizer_stays_in_its_sandbox(own_copy):
    edit(
        own_copy, "tokenizer_config", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"
    )
    tokenizer = InternLM2Tokenizer.from_pretrained(own_copy)
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "who?"}])
