"""The driver of the published code, with a small package that has its interface."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timed import options_of

from bench import chat, measure, published_run
from bench.published_run import CHILD

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("a process of its own, on a CPU"),
]

# The modules and names of the published code that the driver needs; it has no `__init__.py` above.
CONFIGURATION = """
class CoMemoChatConfig:
    def __init__(self, vision_config, llm_config, mixin_config, use_temporal, **settings):
        assert llm_config["attn_implementation"] == "eager"
        assert not use_temporal
        self.llm_config = llm_config
"""
MODELING = """
import torch
from flash_attn.flash_attn_interface import flash_attn_varlen_func
from torch import nn


class CoMemoChatModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.img_context_token_id = config, None
        self.dtype = torch.get_default_dtype()

    def load_state_dict(self, weights, strict):
        names = ("language_model.output.weight", "vision_model.embeddings.class_embedding")
        assert strict and set(names) <= set(weights), list(weights)[:9]
        assert weights[names[0]].dtype == self.dtype

    @torch.no_grad()
    def generate(
        self, pixel_values, input_ids, attention_mask, position_ids,
        cross_attention_media_position_ids, max_new_tokens, streamer, **options
    ):
        image = input_ids == self.img_context_token_id
        assert image.sum() == 256 * len(pixel_values) == cross_attention_media_position_ids.numel()
        assert torch.equal(position_ids[image], cross_attention_media_position_ids[0])
        assert position_ids.shape == attention_mask.shape == input_ids.shape
        assert not options["do_sample"] and options["eos_token_id"] is None
        streamer.put(input_ids)
        for token in range(max_new_tokens):
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.arange(max_new_tokens)[None]
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with such a package, and one with a transformers of a version that it works with."""
    package = tmp_path / "clone" / "comemo" / "model" / "comemo_chat"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "configuration_comemo_chat.py").write_text(CONFIGURATION)
    (package / "modeling_comemo_chat.py").write_text(MODELING)
    old = tmp_path / "packages" / "transformers"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text("__version__ = '4.37.2'\n")
    return [str(tmp_path / "clone"), str(tmp_path / "packages")]


@pytest.mark.slow
def test_a_row_of_the_published_code(clone, loaded, monkeypatch, made_up_limits):
    monkeypatch.setattr(chat, "draw_model", lambda *_: loaded[0])
    words = ("--cols", "2", "--rows", "1", "--tokens", "3", "--batches", "--ways", "ours")
    options = options_of(chat, *words, "--published", "--published-at", *clone)
    row = list(chat.run(options))[-1]
    assert (row["pass"], row["way"]) == ("second question", "published code")
    assert row["read_tokens"] > 768
    assert 0 < row["first_s"] < 60
    assert 0 <= row["token_s"] < 60
    assert row["peak_gib"] > 0
    assert "same_tokens" not in row  # there is no stand-in to compare with


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda at: [], "--published-at names no folder"),
        (lambda at: at[1:], "has comemo/model: give the published repository"),
        pytest.param(
            lambda at: at[:1],
            "is not 4.37 to 4.41; pip install 'transformers==4.37.2'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda at: shutil.rmtree(Path(at[0], "comemo/model/comemo_chat")) or at,
            "cannot be imported",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["nothing", "no clone", "new transformers", "incomplete clone"],
)
def test_what_is_missing_is_told_before_anything_is_measured(clone, change, wanted):
    options = options_of(chat, "--published")
    options.published_at = [Path(folder) for folder in change(clone)]
    with pytest.raises(SystemExit, match="git clone https:") as stopped:
        next(chat.run(options))
    assert wanted in str(stopped.value)


def test_a_python_that_is_not_there(clone):
    words = ("--published-at", *clone, "--published-python", "/nowhere/python")
    with pytest.raises(SystemExit, match="/nowhere/python: No such file"):
        published_run.check(options_of(chat, *words))


@pytest.mark.slow
def test_the_child_imports_nothing_of_this_project(clone, tmp_path):
    """Our package may be installed in the same Python, under the published one's name."""
    job = {"check": True, "folders": clone}
    (tmp_path / "job.json").write_text(json.dumps(job))
    code = (
        f"import runpy, sys; sys.argv = [{str(CHILD)!r}, {str(tmp_path)!r}];"
        f"sys.path.insert(0, {str(measure.ROOT)!r});"
        f"sys.path.insert(0, {str(CHILD.parent)!r});"
        "runpy.run_path(sys.argv[0], run_name='__main__');"
        f"assert sys.modules['comemo'].__path__ == [{clone[0] + '/comemo'!r}];"
        "assert not {'bench', 'comemo_kernels'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["transformers"] == "4.37.2"
    assert found["torch"] == torch.__version__
    assert found["replaced"] == ["flash_attn"]
