"""The clients in docs/serving.md, as they are, against a server."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from servers import SERVED, ready_nano, serving

from comemo.cli.main import main
from comemo.cli.options import serve, store
from comemo.serve.http.forms import HARMLESS, NUMBERS

openai = pytest.importorskip("openai", reason="the client of OpenAI is not installed")
pytest.importorskip("fastapi", reason="the packages of comemo serve are not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("an engine has a thread of its own"),
]
PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")


def block(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return found


@pytest.fixture(scope="module")
def address():
    ready = ready_nano()
    with serving(ready, replace(SERVED.server, name="comemo-nano")) as address:
        yield address
    ready.engine.close(0)


@pytest.fixture
def reader(tmp_path, monkeypatch, address):
    """The folder of somebody who follows the page; returns its blocks with the server's address."""
    monkeypatch.chdir(tmp_path)
    (drawing,) = re.findall(r"`comemo (draw .*?)`", PAGE)
    assert main(drawing.split()) == 0
    return lambda language: block(language).replace("http://127.0.0.1:8000", address)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(reader, tmp_path):
    path = tmp_path / "ask.sh"
    path.write_text(reader("bash"))
    found = subprocess.run(["bash", path], capture_output=True, text=True, check=True).stdout
    assert '"content":"white"' in found


def test_python(reader, capsys):
    capsys.readouterr()
    exec(compile(reader("py"), "docs/serving.md", "exec"), {})
    white, fox, known = capsys.readouterr().out.splitlines()
    assert (white, fox) == ("white", "FOX")
    cached, whole = map(int, re.fullmatch(r"(\d+) of (\d+) tokens were known", known).groups())
    assert 0.8 * whole < cached < whole


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_javascript(reader, tmp_path):
    path = tmp_path / "ask.mjs"
    path.write_text(reader("js"))
    found = subprocess.run(["node", path], capture_output=True, text=True, check=True)
    assert found.stdout == "white\n"


def test_options_and_fields_are_those_that_exist():
    options = set(re.findall(r"`(--[a-z-]+)[ `]", PAGE))
    text = Path(serve.__file__).read_text(encoding="utf-8")
    text += Path(store.__file__).read_text(encoding="utf-8")
    missing = {option for option in options if f'"{option}"' not in text}
    assert missing == set()
    for name in NUMBERS:
        assert f"`{name}`" in PAGE
    assert {"tools", "response_format", "logit_bias"} <= HARMLESS.keys()
