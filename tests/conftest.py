"""Fixtures that every test file shares."""

import contextlib
import copy
import gc
import importlib.util
import itertools
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
import virtual_gpu  # before comemo: it replaces how operators are registered
from harbour import draw_harbour
from hypothesis import Phase, settings
from PIL import Image
from transformers import AutoModel, AutoTokenizer

import comemo
from comemo.cli.tiny_checkpoint import make_checkpoint

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# torch.compile and opcheck trace with fake tensors, which the virtual GPU does not support.
TRACED = pytest.mark.no_virtual_gpu("Dynamo and opcheck cannot trace a function mode")

GPU = torch.cuda.is_available()  # a real one
# In the interpreter tensors report to be on a GPU, like elsewhere with VIRTUAL_GPU=1.
VIRTUAL = os.environ.get("VIRTUAL_GPU", "1" if INTERPRET else "0") == "1" and not GPU
DEVICE = "cuda" if GPU or VIRTUAL else "cpu"
NO_BFLOAT16 = None  # the reason if kernels cannot be tested in bfloat16
if INTERPRET:
    import interpreter

    NO_BFLOAT16 = interpreter.correct()
    interpreter.speed_up()
DTYPES = [torch.float16, torch.bfloat16, torch.float32]  # of kernels
if NO_BFLOAT16:
    DTYPES.remove(torch.bfloat16)
PRESENCE = pytest.StashKey[contextlib.ExitStack]()

settings.register_profile("comemo", derandomize=True, deadline=None, max_examples=20)
# Examples are slow in the interpreter, and on a GPU each may compile; shrinking takes minutes.
settings.register_profile(
    "kernels",
    settings.get_profile("comemo"),
    max_examples=4,
    phases=(Phase.explicit, Phase.generate),
)
PROFILE = settings.get_profile("kernels" if INTERPRET or GPU else "comemo")
settings.register_profile("quick", PROFILE)
settings.register_profile("all", PROFILE, max_examples=100)


SLOW = () if GPU else pytest.mark.slow  # for tests that are fast on a GPU
SLOW_ON_CPU = (lambda test: test) if GPU else pytest.mark.slow  # the same as a decorator
# For tests that draw shapes: bfloat16 and float32 are part of every run.
WITHOUT_HALF = [
    pytest.param(dtype, marks=SLOW if dtype == torch.float16 and len(DTYPES) > 2 else ())
    for dtype in DTYPES
]


def every_two(*axes):
    """All combinations as parameters; those not needed to cover every pair of values are slow."""
    rest = list(itertools.product(*axes))
    pairs = {values: set(itertools.combinations(enumerate(values), 2)) for values in rest}
    unmet, chosen = set().union(*pairs.values()), []
    while unmet:
        chosen.append(max(rest, key=lambda values: len(pairs[values] & unmet)))
        unmet -= pairs[chosen[-1]]
        rest.remove(chosen[-1])
    return chosen + [pytest.param(*values, marks=SLOW) for values in rest]


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", help="also slow tests, and more examples of each property"
    )


def pytest_configure(config):
    if os.environ.get("PYTEST_XDIST_WORKER"):  # one process per core
        torch.set_num_threads(1)
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    settings.load_profile("all" if config.getoption("--all") else "quick")
    config.addinivalue_line("markers", "slow: deselected without --all")
    config.addinivalue_line(
        "markers",
        "kernel: runs kernels, on a GPU or with TRITON_INTERPRET=1; deselected elsewhere, except"
        " kernel(reference=True), which then runs the reference",
    )
    config.addinivalue_line("markers", "gpu: needs a GPU; deselected elsewhere")
    config.addinivalue_line(
        "markers", "no_virtual_gpu(reason): runs on the CPU when others run on the virtual GPU"
    )
    if VIRTUAL:
        config.stash[PRESENCE] = contextlib.ExitStack()
        config.stash[PRESENCE].enter_context(virtual_gpu.present())


def pytest_unconfigure(config):
    if PRESENCE in config.stash:
        config.stash[PRESENCE].close()


def pytest_report_header():
    return f"kernels are not tested in bfloat16: {NO_BFLOAT16}" if NO_BFLOAT16 else []


def pytest_ignore_collect(collection_path):
    """In the interpreter, skip the import of files without a test of kernels."""
    is_test = INTERPRET and collection_path.match("test_*.py")
    return True if is_test and "mark.kernel" not in collection_path.read_text() else None


def pytest_collection_modifyitems(config, items):
    """Keep what can run here: in the interpreter only kernels, on a virtual GPU only models."""

    def runs_here(item):
        kernel = item.get_closest_marker("kernel")
        if item.get_closest_marker("slow") and not config.getoption("--all"):
            return False
        if item.get_closest_marker("gpu"):
            return GPU
        if INTERPRET:
            return kernel is not None
        if VIRTUAL:  # kernels run in the interpreter, benchmarks on real devices
            excluded = item.get_closest_marker("no_virtual_gpu") or "bench" in item.nodeid
            return kernel is None and not excluded
        return kernel is None or GPU or kernel.kwargs.get("reference", False)

    moving = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if moving:  # workers of pytest-xdist would collect different names
        raise pytest.UsageError(f"names of tests must not hold an address, got {moving}")
    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    items[:] = [item for item in items if runs_here(item)]


@pytest.fixture(scope="session")
def device() -> str:
    """Device of tensors: a GPU if there is one, real or virtual, otherwise the CPU."""
    return DEVICE


def here() -> str:
    """`DEVICE`, or the CPU in a test marked no_virtual_gpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def real_device() -> str:
    """Device of tensors in tests marked no_virtual_gpu."""
    return "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def virtual(request):
    """Whether there is a virtual GPU; afterwards there must be no mix of devices."""
    if not VIRTUAL:
        yield False
    elif request.node.get_closest_marker("no_virtual_gpu"):
        with virtual_gpu.absent():
            yield False
    else:
        virtual_gpu.faults.clear()
        yield True
        assert not virtual_gpu.faults


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the recorded inputs and outputs of the published model."""
    if not GOLDEN.is_dir():
        pytest.skip("no ../shared/golden next to the clone: no recorded outputs to compare with")
    return GOLDEN


@pytest.fixture(scope="session")
def inputs(golden) -> ModuleType:
    """The functions that generate the recorded inputs."""
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
    return model.eval().to(DEVICE)


@pytest.fixture
def model(_model):
    """The tiny model in float32; each test gets it with its original config and no gradients."""
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
    from pictures import COFFEE  # here: it skips if no photographs are installed

    return Image.open(COFFEE).convert("RGB").crop((100, 50, 400, 250)).copy()


@pytest.fixture
def made_up_limits(monkeypatch):
    """Benchmarks do not measure the machine's limits, and use one set of inputs."""
    from timed import COPY, GEMM

    from bench import limits, measure

    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: COPY)
    monkeypatch.setattr(limits, "read_rate", lambda device: COPY)
    monkeypatch.setattr(limits, "gemm_rate", lambda *_: GEMM)
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1)


@pytest.fixture(scope="module")
def small_heap():
    """Garbage collections pass over what earlier tests left: each takes a second otherwise."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def one_thread():
    """Threads slow a tiny model down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory):
    """A tiny untrained checkpoint in the published layout."""
    directory = tmp_path_factory.mktemp("demo") / "checkpoint"
    make_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def loaded(demo_checkpoint):
    """Model and tokenizer of `demo_checkpoint`."""
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    return AutoModel.from_pretrained(demo_checkpoint, dtype=torch.float32).to(DEVICE), tokenizer


@pytest.fixture
def core(loaded):
    """The model of `demo_checkpoint` without its head."""
    return loaded[0].model


@pytest.fixture
def fresh(core):
    """A copy of `core` that a test may change."""
    return copy.deepcopy(core)


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory):
    """A PNG of a drawing."""
    path = tmp_path_factory.mktemp("pictures") / "harbour.png"
    draw_harbour(320, 300).save(path)
    return path


@pytest.fixture
def light(demo_checkpoint, tmp_path):
    """A copy of a checkpoint that shares the weights; tests may change the other files."""
    copied = tmp_path / "light"
    copied.mkdir()
    for path in demo_checkpoint.iterdir():
        if path.suffix == ".safetensors":
            (copied / path.name).symlink_to(path)
        else:
            shutil.copy(path, copied)
    return copied


@pytest.fixture
def stored(core, tmp_path):
    """An image that a store has written to a file: its batch, its memory, the file."""
    from known import batch_of, files_of, memory_of  # here: `small` imports this file

    batch = batch_of(core, [2, "square", 3])
    memory_of(core, batch, comemo.MemoryStore(directory=tmp_path))
    (path,) = files_of(tmp_path)
    return batch, memory_of(core, batch), path
