"""Fixtures that every test file shares."""

import copy
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import Phase, settings
from PIL import Image
from transformers import AutoModel, AutoTokenizer

import comemo
from comemo import demo

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_BFLOAT16 = None  # why kernels cannot be tested in it
if INTERPRET:
    import interpreter

    NO_BFLOAT16 = interpreter.correct()
DTYPES = [torch.float16, torch.bfloat16, torch.float32]  # of kernels
if NO_BFLOAT16:
    DTYPES.remove(torch.bfloat16)

settings.register_profile("comemo", derandomize=True, deadline=None, max_examples=40)
# In the interpreter an example takes its time, on a GPU the compiler does; shrinking one takes
# minutes.
settings.register_profile(
    "kernels",
    settings.get_profile("comemo"),
    max_examples=10,
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("kernels" if INTERPRET or DEVICE == "cuda" else "comemo")


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "kernel: runs kernels, on a GPU or with TRITON_INTERPRET=1; deselected elsewhere unless"
        " kernel(reference=True), which is worth running on the reference too",
    )
    config.addinivalue_line("markers", "gpu: needs a GPU; deselected elsewhere")


def pytest_report_header():
    return f"kernels are not tested in bfloat16: {NO_BFLOAT16}" if NO_BFLOAT16 else []


def pytest_collection_modifyitems(config, items):
    """Keep what can run here: under the interpreter kernels alone, it is slow for the rest."""

    def runs_here(item):
        kernel = item.get_closest_marker("kernel")
        if item.get_closest_marker("gpu"):
            return DEVICE == "cuda"
        if INTERPRET:
            return kernel is not None
        return kernel is None or DEVICE == "cuda" or kernel.kwargs.get("reference", False)

    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    items[:] = [item for item in items if runs_here(item)]


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: on a GPU if there is one, else on the CPU in Triton's interpreter."""
    return DEVICE


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


@pytest.fixture
def core(loaded):
    """The model of `demo_checkpoint` without its head."""
    return loaded[0].model


@pytest.fixture
def fresh(core):
    """One of its own, to be changed."""
    return copy.deepcopy(core)


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory):
    """A PNG of the picture that `comemo demo` draws."""
    path = tmp_path_factory.mktemp("pictures") / "harbour.png"
    demo.draw_picture(320, 300).save(path)
    return path
