"""A browser for tests of the page, and a server whose engine does what a test says."""

import base64
import contextlib
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comemo import nano
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.nano.drawing import draw
from comemo.nano.showing import shown_questions, shown_scene
from comemo.processor import CoMemoProcessor
from comemo.serve.work import (
    Begun,
    Ended,
    EngineState,
    Failed,
    Finished,
    Looked,
    Piece,
    Refused,
    TokenFacts,
)

ROOT = Path(__file__).parents[1]
PATIENCE = 20  # seconds on quiet cores, at most
BROWSER_TESTS = [
    pytest.mark.slow,
    pytest.mark.no_virtual_gpu("a browser, and a server in a process of its own"),
]
# as WebDriver writes them
ENTER, ESCAPE, TAB, SHIFT = "\ue007", "\ue00c", "\ue004", "\ue008"
LEFT, UP, RIGHT, DOWN, HOME, END = "\ue012", "\ue013", "\ue014", "\ue015", "\ue011", "\ue010"


def until(condition, patience=PATIENCE):
    """Wait until something is true, and return it."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, f"it did not become true in {patience} s"
        time.sleep(0.02)
    return found


def find_browser():
    """A headless Chromium, or the test is skipped."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    options.add_argument("--hide-scrollbars")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def find_axe():
    """The source of axe-core, which checks accessibility, or the test is skipped."""
    folders = [ROOT / "node_modules", *os.environ.get("NODE_PATH", "").split(os.pathsep)]
    if npm := shutil.which("npm"):
        found = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=False)
        folders.append(found.stdout.strip())
    for folder in folders:
        file = Path(folder) / "axe-core" / "axe.min.js"
        if str(folder) and file.is_file():
            return file.read_text(encoding="utf-8")
    return pytest.skip("axe-core is not installed: npm install --global axe-core")


class Page:
    """The page in a browser, and what people do with it.

    Attributes:
        expected: parts of messages that the console may hold.
    """

    def __init__(self, driver):
        from selenium.webdriver import ActionChains

        self.driver, self.expected, self._chain = driver, [], ActionChains
        self.run("Emulation.setEmulatedMedia", features=[])
        self.resize(1200, 1000)

    def run(self, command, **options):
        """Run a command of Chromium's own protocol."""
        return self.driver.execute_cdp_cmd(command, options)

    def resize(self, width, height):
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.run("Emulation.setDeviceMetricsOverride", **sizes)

    def prefer(self, **features):
        """Emulate what people prefer, such as prefers_color_scheme="dark"."""
        named = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.run("Emulation.setEmulatedMedia", features=named)

    def open(self, url):
        self.driver.get(url)
        until(lambda: self.text("model") != "Connecting to the server")

    def script(self, text, *args):
        return self.driver.execute_script(text, *args)

    def find(self, name):
        return self.driver.find_element("id", name)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, name):
        return self.find(name).text

    def press(self, *keys):
        """Press keys where the focus is."""
        if self.focused().get_attribute("type") == "file":  # WebDriver would take them for paths
            self._chain(self.driver).send_keys(*keys).perform()
        else:
            self.focused().send_keys(*keys)

    def focused(self):
        return self.driver.switch_to.active_element

    def choose(self, *paths):
        """Add files, as the button does."""
        known = self.text("facts")
        self.find("file").send_keys("\n".join(map(str, paths)))
        name = Path(paths[-1]).name
        until(lambda: self.text("facts").startswith(f"{name}:") and self.text("facts") != known)

    def begin(self, question):
        """Ask, and await nothing."""
        self.find("question").send_keys(question, ENTER)

    def ask(self, question):
        """Ask, and return the answer when it is complete."""
        asked = len(self.all("#turns > li"))
        self.begin(question)
        until(lambda: len(self.all("#turns > li:not([aria-busy])")) > asked)
        return self.script("return [...document.querySelectorAll('.text')].at(-1).textContent")

    def show(self, view):
        self.all(f"input[value={view}]")[0].click()
        self.settle()

    def point(self, element, x=0, y=0):
        """Move the pointer, from the middle of an element."""
        self._chain(self.driver).move_to_element_with_offset(element, x, y).perform()

    def settle(self):
        """Until what was changed is drawn."""
        self.driver.execute_async_script(
            "const done = arguments[0];"
            "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)))"
        )

    def pixels(self, canvas="canvas"):
        """uint8 [height, width, 3] of a canvas."""
        self.settle()
        url = self.script("return document.getElementById(arguments[0]).toDataURL()", canvas)
        data = base64.b64decode(url.partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def complaints(self):
        """What the console holds that was not expected."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [m for m in messages if not any(part in m for part in self.expected)]


@contextlib.contextmanager
def serve_in_thread(app):
    """Serve an app on a free port of this machine; yields its address and what stops it."""
    import uvicorn

    from comemo.serve.http.run import listen

    with listen("127.0.0.1", 0) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()

        def stop():
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()

        try:
            yield "http://{}:{}/".format(*sock.getsockname()[:2]), stop
        finally:
            stop()


class ScriptedEngine:
    """Delivers the events that a test gives, some time apart.

    Attributes:
        script: the events after `Begun`, which may be endless; or a `Refused`.
        held: while it is not set, no request begins.
        works: what was asked.
        cancelled: set when a request is given up.
    """

    longest = 4096

    def __init__(self):
        self.script, self.works, self.cancelled = (), [], threading.Event()
        self.held = threading.Event()
        self.held.set()

    def submit(self, work, deliver):
        self.works.append(work)
        self.cancelled.clear()
        if isinstance(self.script, Refused):
            raise self.script
        gone = threading.Event()
        threading.Thread(target=self._play, args=(work, deliver, gone), daemon=True).start()
        return gone

    def _play(self, work, deliver, gone):
        self.held.wait(PATIENCE)
        pictures = len(work.pictures)
        deliver(Begun(work.tokens, 5, pictures, pictures // 2, 0.25, 0.5))
        for event in self.script:
            if gone.wait(0.02):
                return
            deliver(event)
            if isinstance(event, Failed):
                return
        deliver(Finished())

    def cancel(self, ticket):
        ticket.set()
        self.cancelled.set()

    def holds(self, namespace, key):
        return False

    def state(self):
        return EngineState(True, "", 0, 0, 0, 0, 1, 0, 1, {})

    def close(self, grace_s):
        self.held.set()


def nano_reader(rope="dhr"):
    """A reader of prompts for comemo-nano, and its config; the model has no weights."""
    from comemo.serve.engine.reader import PromptReader

    directory = nano.checkpoint()
    config = CoMemoForConditionalGeneration.config_class.from_pretrained(directory)
    with torch.device("meta"):
        model = CoMemoForConditionalGeneration(config)
    return PromptReader(model, CoMemoProcessor.from_pretrained(directory), rope), config


def scripted_app(engine, rope="dhr", **settings):
    """The real app in front of a scripted engine."""
    from comemo.serve.http.app import make_app
    from comemo.serve.http.settings import ServerSettings

    reader, config = nano_reader(rope)
    tokenizer = CoMemoProcessor.from_pretrained(nano.checkpoint()).tokenizer
    made = ServerSettings(name="scripted", **settings)
    return make_app(engine, reader, config, tokenizer, made)


def answer_of(words, *heat):
    """Events of an answer, with what each word read of each picture [words, down, across]."""
    pieces = [
        Piece(0, word if index == 0 else f" {word}", TokenFacts(5), None if index == 0 else 0.01)
        for index, word in enumerate(words)
    ]
    looked = [Looked(0, list(words), list(heat))] if heat else []
    return [*pieces, Ended(0, "stop", len(words)), *looked]


def endless():
    return (Piece(0, f"word{n} ", TokenFacts(5), 0.01) for n in itertools.count())


@pytest.fixture(scope="module")
def driver():
    driver = find_browser()
    yield driver
    driver.quit()


@pytest.fixture
def page(driver):
    page = Page(driver)
    driver.get_log("browser")
    yield page
    assert page.complaints() == []


@pytest.fixture(scope="module")
def address():
    """The command's own server with comemo-nano."""
    command = [sys.executable, "-m", "comemo", "serve", "nano", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            yield re.search(r"http://\S+", line)[0]
        finally:
            server.terminate()
            server.wait(PATIENCE)


@pytest.fixture
def engine():
    return ScriptedEngine()


@pytest.fixture
def scripted(engine):
    """A server that plays a script."""
    with serve_in_thread(scripted_app(engine)) as (url, _):
        yield url
        engine.close(0)


@pytest.fixture(scope="module")
def sign(tmp_path_factory):
    """A picture, its file and what is right to say about it."""
    scene = shown_scene(41, "sign")
    path = tmp_path_factory.mktemp("pictures") / "sign.png"
    draw(scene).save(path)
    truth = {question.text: question.answer for question in shown_questions(scene)}
    return path, truth


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A grey picture of 3 x 2 tiles."""
    path = tmp_path_factory.mktemp("pictures") / "grey.png"
    Image.new("RGB", (600, 400), (128, 128, 128)).save(path)
    return path
