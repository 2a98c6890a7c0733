"""Servers of comemo-nano under test, on free ports of this machine."""

import base64
import contextlib
import io
import os
import subprocess
import sys
import threading
from dataclasses import replace

import comemo.nano
from comemo.nano.drawing import draw
from comemo.nano.showing import shown_questions, shown_scene
from comemo.serve.engine.settings import EngineSettings
from comemo.serve.http.run import listen, run_app
from comemo.serve.http.settings import ServerSettings
from comemo.serve.start import Served, start_engine

NAME = "nano"
SERVED = Served(
    str(comemo.nano.checkpoint()),
    ServerSettings(NAME, readers=1),
    EngineSettings(memory=1e8),
    device="cpu",
    dtype="float32",
)


@contextlib.contextmanager
def serving(ready, settings=None, wrap=lambda app: app, grace_s=5.0):
    """A server in a thread of this process; yields the address it listens on.

    Args:
        ready: what `start_engine` returned; its engine is not closed.
        settings: of the server.
        wrap: changes the app.
    """

    class Lent:
        """The engine, which others use after this server."""

        def __getattr__(self, name):
            return getattr(ready.engine, name)

        def close(self, grace_s):
            pass

    app = wrap(ready.app(settings or SERVED.server))
    sock, started, stop = listen("127.0.0.1", 0), threading.Event(), []
    thread = threading.Thread(
        target=run_app, args=(app, Lent(), sock, grace_s, started.set, stop.append)
    )
    thread.start()
    try:
        assert started.wait(60)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        stop[0]()
        thread.join(60)
        assert not thread.is_alive()


def ready_nano(**changes):
    """comemo-nano with an engine at work."""
    return start_engine(replace(SERVED, **changes))


def drawn(number, layout=None):
    """A picture as a data URL, and its (question, right answer) pairs."""
    scene = shown_scene(number, layout)
    return as_url(draw(scene)), [(one.text, one.answer) for one in shown_questions(scene)]


def as_url(picture):
    """A picture as a data URL."""
    file = io.BytesIO()
    picture.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def about(url, question, **detail):
    """A message about a picture, as OpenAI clients send it."""
    shown = {"type": "image_url", "image_url": {"url": url, **detail}}
    return {"role": "user", "content": [shown, {"type": "text", "text": question}]}


@contextlib.contextmanager
def process(*words, env=None, stderr=None):
    """A server of comemo-nano in a process of its own; yields its address and the process.

    Args:
        words: arguments of `comemo serve` in addition.
        env: variables in addition.
        stderr: where its log goes.
    """
    command = [sys.executable, "-m", "comemo", "serve", "nano", "--port", "0", *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr or subprocess.DEVNULL, env=variables
    )
    try:
        line = started.stdout.readline().decode()  # type: ignore[union-attr]
        assert " on http://" in line, f"the server did not start: {line!r}"
        yield line.split(" on ")[1].split()[0], started
    finally:
        started.terminate()
        started.wait(60)
        started.stdout.close()  # type: ignore[union-attr]
