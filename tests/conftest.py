"""Fixtures that every test file shares."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from PIL import Image
from transformers import AutoModel, AutoTokenizer

import comemo
from comemo import demo

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"

settings.register_profile("comemo", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("comemo")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the recorded inputs and outputs of the published model."""
    if not GOLDEN.is_dir():
        pytest.skip("no ../shared/golden beside the clone: nothing recorded to compare with")
    return GOLDEN


@pytest.fixture(scope="session")
def inputs(golden) -> ModuleType:
    """The functions that draw the recorded inputs."""
    spec = importlib.util.spec_from_file_location("golden_inputs", golden / "inputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def checkpoint(golden) -> Path:
    """A tiny checkpoint in the published layout."""
    return golden / "ckpt_a"


@pytest.fixture(scope="session")
def _model(checkpoint):
    model = comemo.CoMemoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval()


@pytest.fixture
def model(_model):
    """The tiny model in float32; its config and gradients are as loaded in every test."""
    before = dict(vars(_model.config))
    yield _model
    vars(_model.config).update(before)
    _model.zero_grad(set_to_none=True)


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return comemo.InternLM2Tokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def processor(checkpoint):
    return comemo.CoMemoProcessor.from_pretrained(checkpoint)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def photograph():
    from pictures import CHINA  # here: it skips where no photographs are installed

    return Image.open(CHINA).convert("RGB").crop((100, 50, 400, 250)).copy()


@pytest.fixture(scope="module")
def one_thread():
    """Threads cost a tiny model more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory):
    """The tiny checkpoint that `comemo demo` makes."""
    directory = tmp_path_factory.mktemp("demo") / "checkpoint"
    demo.make_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def loaded(demo_checkpoint):
    """Model and tokenizer of `demo_checkpoint`."""
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    return AutoModel.from_pretrained(demo_checkpoint, dtype=torch.float32), tokenizer


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory):
    """A PNG of the picture that `comemo demo` draws."""
    path = tmp_path_factory.mktemp("pictures") / "harbour.png"
    demo.draw_picture(320, 300).save(path)
    return path
