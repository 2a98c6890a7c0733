"""Wrong or hostile arguments, streams and answers: one line, an exit status, no traceback."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from commands import QUICK, fails, run
from faults import EVIL, NO_TEXT, STEERING, in_time
from transformers.utils import logging

import comemo
from comemo.cli import chat, info, terminal

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bytes_that_are_not_text(capsys, demo_checkpoint, tmp_path, picture_file, monkeypatch):
    for argv in (["chat", demo_checkpoint, NO_TEXT], ["chat", demo_checkpoint, "a", "--system"]):
        words = argv if argv[-1] == NO_TEXT else [*argv, NO_TEXT]
        assert r"must be text, got bytes that are not: 'ab\udcff'" in fails(capsys, *words)
    (tmp_path / NO_TEXT).symlink_to(demo_checkpoint)
    for argv in (["info"], ["chat"], ["demo", "--keep"]):
        path = tmp_path / (NO_TEXT if argv != ["demo", "--keep"] else f"new{NO_TEXT}")
        assert "must be UTF-8" in fails(capsys, *argv, path)
        assert not (tmp_path / f"new{NO_TEXT}").exists()
    named = tmp_path / f"{NO_TEXT}.png"
    shutil.copy(picture_file, named)  # the file name of an image may be anything
    status, out, _ = run(capsys, "map", named, "-o", tmp_path / f"{NO_TEXT}map.png")
    assert (status, out) == (0, f"{tmp_path}/ab\\udcffmap.png\n")
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n/image \xff.png\nhello\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    status, out, err = run(capsys, "chat", demo_checkpoint, *QUICK)
    assert (status, out.count("\n")) == (2, 1)
    assert [line.split(":")[2] for line in err.splitlines()] == [
        " the question must be text, got bytes that are not",
        " No such file or directory",
    ]


def test_commands_of_a_conversation(capsys, demo_checkpoint, monkeypatch):
    asked = []

    def ask(self, question, images, *, streamer):
        asked.append(question)
        streamer.end()

    monkeypatch.setattr(comemo.ChatSession, "ask", ask)
    typed = "/help\n/hlep me\n/new all\n/image\n//etc/fstab?\n//\nwhat is /etc?\n/quit\n"
    status, _, err = run(
        capsys, "chat", demo_checkpoint, *QUICK, stdin=typed, monkeypatch=monkeypatch
    )
    assert asked == ["/etc/fstab?", "/", "what is /etc?"]
    assert status == 2
    assert err.startswith(chat.HELP)
    for form in ("/image PATH", "/again", "/new", "/help", "/quit", "//..."):
        assert form in chat.HELP
    lines = err.removeprefix(chat.HELP).strip().splitlines()
    assert lines == [
        "comemo: error: there is no command '/hlep': wanted one of /image PATH, /again, /new,"
        " /help, /quit, //...",
        "comemo: error: wanted /new, got '/new all'",
        "comemo: error: wanted /image PATH, got '/image'",
    ]


def test_a_line_without_an_end(capsys, demo_checkpoint, monkeypatch):
    class Zeros(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:] = bytes(len(buffer))
            return len(buffer)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Zeros())))
    with in_time():
        assert "must have less than 1,048,576 characters" in fails(
            capsys, "chat", demo_checkpoint, *QUICK
        )


def test_nothing_controls_the_terminal(capsys, light, tmp_path, picture_file, monkeypatch):
    config = json.loads((light / "config.json").read_text()) | {"template": EVIL}
    (light / "config.json").write_text(json.dumps(config))
    evil = tmp_path / EVIL
    light.rename(evil)
    (tmp_path / f"{EVIL}.png").write_bytes(picture_file.read_bytes())
    for argv in (
        ["info", evil],
        ["info", evil, "--json"],
        ["info", tmp_path / f"no{EVIL}"],
        ["chat", evil, "a"],
        ["chat", evil, "a", EVIL],
        ["chat", evil, "a", "--debug"],
        ["chat", demo_file(light, evil), "a", "--image", tmp_path / f"no{EVIL}", "-v"],
        ["map", tmp_path / f"{EVIL}.png", "-o", tmp_path / f"map{EVIL}.png"],
        ["store", "stats", evil],
        ["store", "ls", tmp_path / f"no{EVIL}"],
        ["store", "rm", evil, EVIL],
        [EVIL],
    ):
        _, out, err = run(capsys, *argv)
        assert not STEERING.search(out + err), (argv, out, err)
        assert "\nerror: none" not in out + err, argv
    assert r"\x1b[2J\x9b31m\x07\u202e\x0d\x0aerror: none" in run(capsys, "info", evil)[1]

    def talkative(directory, debug):
        warnings.warn(EVIL, stacklevel=1)
        logging.get_logger("transformers.any").warning(EVIL)
        raise KeyError(EVIL)

    monkeypatch.setattr(info, "describe_checkpoint", talkative)
    status, _, err = run(capsys, "info", evil, "--debug")
    assert (status, STEERING.search(err), err.count("UserWarning: ")) == (1, None, 1)
    assert err.count(r"\x1b[2J\x9b31m") >= 3
    assert run(capsys, "info", evil)[2].count("\n") == 1
    written = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: written.append(words))
    terminal.tell(f"a\tb\n{EVIL}")
    assert written == [("a\tb\n\\x1b[2J\\x9b31m\\x07\\u202e\\x0d\nerror: none",)]
    for path in Path(comemo.__file__).parent.rglob("*.py"):  # nothing else prints
        prints = len(re.findall(r"(?<![\w.])print\(", path.read_text()))
        assert prints == {"terminal.py": 2, "published.py": 1}.get(path.name, 0), path.name


def demo_file(light, evil):
    """The same checkpoint with its template."""
    shutil.copytree(evil, light, symlinks=True)
    text = (light / "config.json").read_text()
    config = json.loads(text) | {"template": "internlm2-chat"}
    (light / "config.json").write_text(json.dumps(config))
    return light


def test_exit_statuses(capsys, demo_checkpoint, monkeypatch):
    def raising(error):
        def ask(self, *args, **kwargs):
            raise error

        monkeypatch.setattr(comemo.ChatSession, "ask", ask)
        status, out, err = run(capsys, "chat", demo_checkpoint, "a", *QUICK)
        assert (out, err.count("\n")) == ("", 1)
        return status, err

    memory = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")
    assert raising(memory) == (
        1,
        "comemo: error: there is not enough memory: CUDA out of memory. Tried to allocate 9 GiB\n",
    )
    assert raising(MemoryError())[0] == 1
    assert "not enough memory" not in raising(KeyError("image_memory"))[1]
    assert raising(RuntimeError("shapes\ndiffer")) == (
        1,
        "comemo: error: RuntimeError: shapes differ (--debug shows where)\n",
    )
    assert raising(OSError(28, "No space left on device")) == (
        1,
        "comemo: error: No space left on device\n",
    )
    assert raising(PermissionError(13, "Permission denied", "x"))[0] == 2
    assert raising(ValueError("ask: wanted more")) == (2, "comemo: error: wanted more\n")
    status, _, err = run(capsys, "chat", demo_checkpoint, "a", *QUICK, "--debug")
    assert (status, err.count("Traceback")) == (2, 1)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--threads", "100000", "at most 1,024"),
        ("--num-beams", "100000", "at most 256"),
        ("--temperature", "1e-320", "at least 0.001"),
        ("--temperature", "inf", "at most 1,000"),
        ("--repetition-penalty", "1e300", "at most 100"),
        ("--max-new-tokens", "9" * 30, "at most 1,000,000"),
        ("--top-k", "9" * 30, "at most 1,000,000"),
    ],
)
def test_numbers_that_would_crash(capsys, option, value, said):
    assert said in fails(capsys, "chat", "M", "a", option, value)


STREAMS = """
import os, sys
from comemo.cli import main as cli

def closed(number, name):
    os.close(number)
    setattr(sys, name, None)

def to(number, path):
    os.dup2(os.open(path, os.O_WRONLY), number)

def unread(number):
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)

def ascii_only():
    sys.stdout = open(1, "w", encoding="ascii", closefd=False)

directory = sys.argv[1]
for change, argv in (
    (lambda: closed(0, "stdin"), ["chat", directory]),
    (lambda: closed(1, "stdout"), ["info", directory]),
    (lambda: closed(2, "stderr"), ["info", "/no/such"]),
    (lambda: to(1, "/dev/full"), ["info", directory]),
    (lambda: to(2, "/dev/full"), ["info", "/no/such"]),
    (lambda: unread(1), ["info", directory]),
    (lambda: unread(2), ["info", "/no/such"]),
    (ascii_only, ["info", directory]),
):
    child = os.fork()
    if not child:
        change()
        status = cli.main(argv)
        if status == 141:
            sys.exit(status)  # Python flushes once more at its end, which takes a second
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(1, f"status {status}\\n".encode())
"""


@pytest.mark.slow
def test_streams_that_are_closed_full_or_unread(light, tmp_path):
    named = tmp_path / "Modell-\u732b"
    light.rename(named)
    ended = subprocess.run(
        [sys.executable, "-c", STREAMS, named],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    *seen, last = ended.stdout.decode().split("status ")
    statuses = [text.split("\n")[0] for text in [*seen[1:], last]]
    assert statuses == ["2", "1", "2", "1", "2", "141", "2", "0"]
    assert ended.stderr.decode().splitlines() == [
        "comemo: error: there is no QUESTION, and stdin is closed",
        "comemo: error: stdout is closed, nobody would see what is printed",
        "comemo: error: No space left on device",
    ]
    assert "Modell-\\u732b\n  language model" in ended.stdout.decode()


@pytest.mark.parametrize("command", [["-m", "comemo"], ["bin/comemo"]])
@pytest.mark.parametrize("library", ["torch", "argparse"])  # of one command, of them all
def test_ctrl_c_while_the_libraries_are_imported(tmp_path, command, library):
    stub = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / f"{library}.py").write_text(stub)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "comemo").write_text("from comemo.cli.main import main\nmain()\n")
    here = str(Path(comemo.__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, *command, "chat", "x"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{here}"},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"")
