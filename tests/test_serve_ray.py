"""Two replicas under Ray Serve: they answer as one server does, also when one of them is killed."""

import asyncio
import contextlib
import importlib.util
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from servers import about, drawn, serving

import comemo.nano
from comemo.serve.start import start_engine, warm_up

openai = pytest.importorskip("openai", reason="the client of OpenAI is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'comemo-kernels[ray]'", allow_module_level=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.no_virtual_gpu("replicas are other processes"),
    pytest.mark.filterwarnings("ignore:Using extra keyword:DeprecationWarning"),  # Ray's
]
CONFIG = Path(__file__).parents[1] / "examples" / "serve" / "ray.yaml"
NAME, END = "nano", "<|im_end|>"
KEYS = ("red-key", "blue-key")
# 200 tokens, others for each seed, of the model of `config`.
LONG = {
    "messages": [{"role": "user", "content": "Talk."}],
    "temperature": 0.7,
    "max_tokens": 200,
}


class Cluster:
    """An address, its log folder, and how to kill a replica."""

    def __init__(self, address, logs):
        self.address, self.logs = address, logs

    def kill(self, replica):
        import ray

        ray.kill(ray.get_actor(f"SERVE_REPLICA::comemo#Engine#{replica}", namespace="serve"))

    def counts(self, name):
        """A counter of each replica."""
        found = httpx.get(f"{self.address}/metrics", headers=authorised(), timeout=60).text
        line = rf'^comemo_{name}_total\{{replica="(\w+)"\}} (\S+)$'
        return {replica: float(number) for replica, number in re.findall(line, found, re.MULTILINE)}

    def count(self, name):
        """A counter of all replicas together."""
        return sum(self.counts(name).values())

    def replicas(self):
        return set(self.counts("steps"))

    def repeats(self):
        logs = (path.read_text(errors="replace") for path in self.logs.glob("worker-*.err"))
        return sum(log.count('"event": "repeated"') for log in logs)


def authorised(key="red-key"):
    return {"Authorization": f"Bearer {key}"}


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def variables():
    """Ray tells nobody that it is used, and its cluster obeys this test alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_AUTH_MODE", "")
        patch.delenv("RAY_AUTH_MODE")  # Ray sets it; this takes it away at the end
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The example, for a test, with a model that does not know how to end."""
    folder = tmp_path_factory.mktemp("ray")
    model = folder / NAME
    shutil.copytree(comemo.nano.checkpoint(), model)
    weights = load_file(model / "model.safetensors")
    end = comemo.CoMemoProcessor.from_pretrained(model).tokenizer.convert_tokens_to_ids(END)
    weights["language_model.output.weight"][end] = 0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (folder / "keys").write_text("red-key red\nblue-key blue\n")
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = free_port()
    config["applications"][0]["args"] |= {
        "model": str(model),
        "device": "cpu",
        "dtype": "float32",
        "store": str(folder / "store"),
        "api_keys": str(folder / "keys"),
        "server": {"body_bytes": 2**20, "readers": 1},
        "engine": {"memory": 1e8},
    }
    config["applications"][0]["deployments"][0]["autoscaling_config"]["max_replicas"] = 2
    return config


@pytest.fixture(scope="module")
def cluster(config, tmp_path_factory):
    """Two replicas of comemo-nano on this machine, started by the command."""
    import ray

    temporary = tempfile.mkdtemp(prefix="ray-")  # short, as names of sockets must be
    file, log = (tmp_path_factory.mktemp("serve") / name for name in ("ray.yaml", "log"))
    file.write_text(yaml.safe_dump(config))
    address = f"http://127.0.0.1:{config['http_options']['port']}"
    started = None
    try:
        context = ray.init(
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=80_000_000,
            _temp_dir=temporary,
            log_to_driver=False,
        )
        start = time.perf_counter()
        command = "from ray.serve.scripts import cli; cli()"
        words = ["run", "--address", context.address_info["gcs_address"], str(file)]
        with log.open("w") as out:
            started = subprocess.Popen(
                [sys.executable, "-c", command, *words], stdout=out, stderr=out
            )
        while not is_ready(address):
            assert started.poll() is None, log.read_text()
            assert time.perf_counter() - start < 150, log.read_text()
            time.sleep(0.2)
        print(f"\nready after {time.perf_counter() - start:.1f} s")
        yield Cluster(address, Path(temporary) / "session_latest" / "logs")
    finally:
        if started is not None:
            started.send_signal(signal.SIGINT)
            started.wait(60)
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


def is_ready(address):
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/health", timeout=60).status_code == 200
    return False


@pytest.fixture(scope="module")
def alone(config):
    """The address of one server with the same settings."""
    from comemo.serve.ray_app import read_args

    served, _ = read_args(config["applications"][0]["args"])
    ready = start_engine(replace(served, store=None))
    warm_up(ready)
    with serving(ready, served.server) as address:
        yield address
    ready.engine.close(0)


def clients(*addresses, key="red-key"):
    return [
        openai.OpenAI(base_url=f"{one}/v1", api_key=key, max_retries=0, timeout=120)
        for one in addresses
    ]


def ask(client, **options):
    """The texts of an answer and why they end."""
    answer = client.chat.completions.create(model=NAME, **options)
    return [(choice.message.content, choice.finish_reason) for choice in answer.choices]


def ask_stream(client, **options):
    texts = {}
    for part in client.chat.completions.create(model=NAME, stream=True, **options):
        for choice in part.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return [text for _, text in sorted(texts.items())]


def test_answers_are_those_of_one_server(cluster, alone):
    url, questions = drawn(4)
    many, one = clients(cluster.address, alone)
    for question, _ in questions[:3]:
        options = {"messages": [about(url, question)], "max_tokens": 40}
        assert ask(many, **options) == ask(one, **options)
        assert ask_stream(many, **options) == ask_stream(one, **options)
    drawn_twice = {**LONG, "max_tokens": 30, "seed": 5, "n": 2}
    assert ask(many, **drawn_twice) == ask(one, **drawn_twice)
    assert ask_stream(many, **drawn_twice) == ask_stream(one, **drawn_twice)


def test_a_picture_is_computed_by_one_replica(cluster):
    before = cluster.count("pictures_computed")
    pictures = [drawn(number) for number in range(10, 26)]

    async def talk():
        async with openai.AsyncOpenAI(
            base_url=f"{cluster.address}/v1", api_key="red-key", max_retries=0
        ) as client:
            raw = client.chat.completions.with_raw_response
            return await asyncio.gather(
                *(
                    raw.create(model=NAME, messages=[about(url, question)], max_tokens=8)
                    for _ in range(2)
                    for url, ((question, _), *_) in pictures
                )
            )

    answers = asyncio.run(talk())
    names = [answer.headers["x-comemo-replica"] for answer in answers]
    assert names[:16] == names[16:]
    assert set(names) == cluster.replicas()
    assert len(set(names)) == 2
    assert cluster.count("pictures_computed") == before + 16


def test_text_goes_to_the_idle_replica(cluster):
    async def talk():
        async with openai.AsyncOpenAI(
            base_url=f"{cluster.address}/v1", api_key="red-key", max_retries=0
        ) as client:
            create = client.chat.completions.with_raw_response.create
            answers = await asyncio.gather(
                *(create(model=NAME, **LONG | {"max_tokens": 60}) for _ in range(24))
            )
            return Counter(answer.headers["x-comemo-replica"] for answer in answers)

    counts = asyncio.run(talk())
    assert len(counts) == 2
    assert min(counts.values()) >= 8


def test_errors_pass_unchanged(cluster, alone):
    good = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}]}
    cases = [
        ("POST", "/v1/chat/completions", {"json": good | {"temperature": 3}}),
        ("POST", "/v1/chat/completions", {"json": good | {"model": "other"}}),
        ("POST", "/v1/chat/completions", {"content": b"{"}),
        ("POST", "/v1/chat/completions", {"content": b"x" * (2**20 + 1)}),
        ("POST", "/v1/chat/completions", {"content": iter([b"x" * 2**20, b"xx"])}),
        ("POST", "/v1/chat/completions", {"json": good, "headers": authorised("wrong")}),
        ("POST", "/v1/chat/completions", {"json": good, "headers": {}}),
        ("GET", "/metrics", {"headers": {}}),
        ("GET", "/v1/models/other", {}),
        ("GET", "/nothing", {}),
    ]
    statuses = []
    for method, path, options in cases:
        found = []
        for address in (cluster.address, alone):
            given = {"headers": authorised(), "timeout": 60, **options}
            if not isinstance(given.get("content", b""), bytes):
                given["content"] = iter([b"x" * 2**20, b"xx"])
            found.append(httpx.request(method, f"{address}{path}", **given))
        many, one = found
        assert (many.status_code, many.json()) == (one.status_code, one.json())
        assert many.headers.get("www-authenticate") == one.headers.get("www-authenticate")
        statuses.append(many.status_code)
    assert statuses == [400, 404, 400, 413, 413, 401, 401, 401, 404, 404]


def test_namespaces_do_not_share_pictures(cluster):
    url, ((question, _), *_) = drawn(30)
    before = cluster.count("pictures_computed")
    for key in (*KEYS, *KEYS):
        (client,) = clients(cluster.address, key=key)
        ask(client, messages=[about(url, question)], max_tokens=4)
    assert cluster.count("pictures_computed") == before + 2


def test_a_client_that_is_gone_ends_its_answer(cluster):
    before = cluster.count("cancelled")
    body = {"model": NAME, "stream": True, **LONG, "max_tokens": 1000}
    where = f"{cluster.address}/v1/chat/completions"
    with httpx.stream("POST", where, json=body, headers=authorised(), timeout=60) as response:
        assert next(response.iter_lines()).startswith("data: ")
    end = time.monotonic() + 20
    while cluster.count("cancelled") == before:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_killed_replica_loses_nothing_that_can_be_repeated(cluster, alone):
    """20 requests that every replica answers in the same way, and 4 streams that none repeats."""
    (one,) = clients(alone)
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda seed: ask(one, **LONG, seed=seed), range(20)))
    wanted = [text for ((text, _),) in found]
    computed = cluster.counts("pictures_computed")
    started, began, once_began = asyncio.Semaphore(0), [], []

    async def talk():
        client = openai.AsyncOpenAI(
            base_url=f"{cluster.address}/v1", api_key="red-key", max_retries=0, timeout=120
        )
        create = client.chat.completions.with_streaming_response.create

        async def whole(seed):
            found = await client.chat.completions.create(model=NAME, **LONG, seed=seed)
            return found.choices[0].message.content

        async def stream(**options):
            """The text, the replica that began it, why it ended, and the code of its error."""
            text, end, code, count = "", None, None, 0
            async with create(model=NAME, stream=True, **LONG | options) as response:
                name = response.headers["x-comemo-replica"]
                try:
                    async for part in await response.parse():
                        text += part.choices[0].delta.content or ""
                        end, count = part.choices[0].finish_reason, count + 1
                        if count == 5:
                            began.append(name) if "seed" in options else once_began.append(name)
                            started.release()
                except openai.APIError as error:
                    code = error.code
                return text, name, end, code

        async def kill():
            for _ in range(14):
                await started.acquire()
            victim = once_began[0]
            await asyncio.to_thread(cluster.kill, victim)
            return victim

        async with client:
            return await asyncio.gather(
                asyncio.gather(*(whole(seed) for seed in range(10))),
                asyncio.gather(*(stream(seed=seed) for seed in range(10, 20))),
                asyncio.gather(*(stream(max_tokens=400) for _ in range(4))),
                kill(),
            )

    start = time.perf_counter()
    wholes, streams, once, victim = asyncio.run(talk())
    print(f"\n24 answers after {time.perf_counter() - start:.1f} s, {cluster.repeats()} repeated")
    assert wholes == wanted[:10]
    assert [text for text, *_ in streams] == wanted[10:]
    assert {code for *_, code in streams} == {None}
    assert {(end, code) for *_, end, code in once} <= {
        ("length", None),
        ("stop", None),
        (None, "replica_lost"),
    }
    assert {name for _, name, _, code in once if code} == {victim}
    assert cluster.repeats() > 0
    (left,) = {*began, *once_began} - {victim}
    # Its pictures are in the store.
    (client,) = clients(cluster.address)
    for number in range(10, 26):
        url, ((question, _), *_) = drawn(number)
        ask(client, messages=[about(url, question)], max_tokens=2)
    assert cluster.counts("pictures_computed")[left] == computed[left]


def test_a_killed_replica_is_replaced(cluster):
    end = time.monotonic() + 120
    while len(cluster.replicas()) < 2:
        assert time.monotonic() < end
        time.sleep(0.5)
    (client,) = clients(cluster.address)
    assert ask(client, messages=[{"role": "user", "content": "Hello"}], max_tokens=2)
