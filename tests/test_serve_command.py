"""The command `comemo serve`: its arguments, its start and its end."""

import json
import os
import signal
import socket
import threading
import time
import urllib.request

import pytest
from conftest import SLOW
from servers import about, drawn, process

from comemo.cli import serve
from comemo.cli.main import main, make_parser
from comemo.serve.http.settings import KEY, digest_of_key

pytest.importorskip("fastapi", reason="the packages of comemo serve are not installed")


def served(*words):
    return serve.read_served(make_parser().parse_args(["serve", "nano", *words]), "/some/where")


def test_arguments_reach_the_settings(monkeypatch, tmp_path):
    monkeypatch.delenv(KEY, raising=False)
    found = served()
    assert (found.server.name, found.server.keys) == ("comemo-nano", {})
    assert (found.engine.memory, found.server.temperature, found.store) == (None, 0.0, None)
    found = served(
        *("--memory", "2", "--answers", "3", "--stall", "0.5", "--longest", "99"),
        *("--body", "1", "--images", "2", "--fetch", "Example.org", "--temperature", "0.7"),
        *("--store", str(tmp_path), "--store-budget", "1", "--name", "mine", "--log-contents"),
    )
    assert (found.engine.memory, found.engine.answers) == (2 * 2**30, 3)
    assert (found.engine.stall_s, found.engine.longest) == (0.5, 99)
    assert (found.server.body_bytes, found.server.images) == (2**20, 2)
    assert found.server.fetch_hosts == ("example.org",)
    assert (found.server.name, found.server.temperature) == ("mine", 0.7)
    assert (found.store, found.store_bytes) == (str(tmp_path), 1e9)
    assert found.server.log_contents
    monkeypatch.setenv(KEY, "secret")
    assert list(served().server.keys) == [digest_of_key("secret")]
    (tmp_path / "keys").write_text("other team\n")
    assert served("--api-keys", str(tmp_path / "keys")).server.keys == {
        digest_of_key("other"): "team"
    }


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--port", "70000"], "at most 65,535"),
        (["--temperature", "3"], "at most 2"),
        (["--memory", "0"], "above 0"),
        (["--store-budget", "1"], "--store-budget needs --store"),
        (["--api-keys", "nowhere"], "No such file"),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, tmp_path, words, wanted):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "nano", "--port", "0", *words]) == 2
    assert wanted in capsys.readouterr().err


def test_missing_packages_are_named(capsys, monkeypatch):
    monkeypatch.setitem(serve.PACKAGES, "no_such_package", "no-such-package")
    assert main(["serve", "nano"]) == 2
    assert "needs no-such-package: pip install 'comemo-kernels[serve]'" in capsys.readouterr().err


def test_a_port_that_is_used(capsys):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert main(["serve", "nano", "--port", str(port)]) == 2
    assert (
        f"127.0.0.1:{port} cannot be listened on: Address already in use" in capsys.readouterr().err
    )


def post(address, body, key=None):
    headers = {"Content-Type": "application/json"}
    headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
    data = json.dumps(body | {"model": "comemo-nano"}).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", data, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


@pytest.mark.slow if SLOW else pytest.mark.filterwarnings("default")
def test_a_fresh_start_answers_within_20_seconds(tmp_path):
    url, questions = drawn(4)
    start = time.monotonic()
    with (
        open(tmp_path / "log", "w+") as log,
        process(env={"COMEMO_API_KEY": "secret"}, stderr=log) as (address, server),
    ):
        body = {"messages": [about(url, questions[0][0])]}
        found = json.loads(post(address, body, "secret"))
        assert time.monotonic() - start < 20
        assert found["choices"][0]["message"]["content"]
        # SIGTERM: what is under way is finished, and the server ends.
        streamed = []
        body |= {"stream": True, "max_tokens": 3000, "temperature": 2}
        thread = threading.Thread(target=lambda: streamed.append(post(address, body, "secret")))
        thread.start()
        time.sleep(0.3)
        os.kill(server.pid, signal.SIGTERM)
        thread.join(60)
        assert streamed[0].endswith("data: [DONE]\n\n")
        assert server.wait(60) == 0
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.startswith("{")]
    told = [json.loads(line) for line in lines]
    assert [one["status"] for one in told] == [200, 200]
    assert "secret" not in "".join(lines)
