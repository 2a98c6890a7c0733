"""What stands before several replicas: which one is asked, what is repeated when one is lost."""

import asyncio
import json

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("fastapi", reason="the packages of comemo serve are not installed")

from comemo.serve.http.errors import over_limit  # noqa: E402
from comemo.serve.http.settings import ServerSettings, digest_of_key  # noqa: E402
from comemo.serve.replicas import front as fronts  # noqa: E402
from comemo.serve.replicas.front import REPEATS, Front  # noqa: E402
from comemo.serve.replicas.metrics import merge_metrics  # noqa: E402
from comemo.serve.replicas.order import order_replicas  # noqa: E402
from comemo.serve.replicas.questions import Forwarded, Question, read_question  # noqa: E402
from comemo.serve.replicas.relay import ReplicaLost  # noqa: E402
from comemo.serve.replicas.running import run_app, whole_response  # noqa: E402

SETTINGS = ServerSettings("nano", body_bytes=1000, keys={digest_of_key("red-key"): "red"})
WORDS = ("one", " two", " three")
URL = "data:image/png;base64,AAAA"
LOST, GREEDY, DRAWN = "lost", {"temperature": 0}, {"temperature": 1}


def chunk(name, text):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return {"id": name, "created": len(name), "choices": [choice]}


def stream(name, words=WORDS, then=None):
    """Messages of a replica that streams; `then` is `LOST`, or an error that ends it."""
    kind = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-comemo-replica", b"a")]
    yield {"type": "http.response.start", "status": 200, "headers": kind}
    for word in words:
        data = f"data: {json.dumps(chunk(name, word))}\n\n".encode()
        yield {"type": "http.response.body", "body": data, "more_body": True}
    if then == LOST:
        raise ReplicaLost("it was killed")
    last = b"data: [DONE]\n\n" if then is None else f"data: {json.dumps(then)}\n\n".encode()
    yield {"type": "http.response.body", "body": last, "more_body": True}
    yield {"type": "http.response.body", "body": b"", "more_body": False}


def whole(status, body, name="a", then=None):
    kind = [(b"content-type", b"application/json"), (b"x-comemo-replica", name.encode())]
    yield {"type": "http.response.start", "status": status, "headers": kind}
    if then == LOST:
        raise ReplicaLost("it was killed")
    yield {"type": "http.response.body", "body": body}


class Replicas:
    """Answers each request with the next of some lists of messages."""

    def __init__(self, *tries):
        self.tries, self.asked, self.closed = list(tries), [], 0

    async def ask(self, request, picture, avoid):
        self.asked.append((request, picture, avoid))
        try:
            for message in self.tries.pop(0):
                if isinstance(message, Exception):
                    raise message
                yield message
        finally:
            self.closed += 1


def post(replicas, body, settings=SETTINGS, key="red-key", path="/v1/chat/completions"):
    """The response of a front, and the body's parts as they were sent."""
    app = Front(replicas.ask, None, settings)

    async def send():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://a"
        ) as one:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await one.post(path, content=data, headers={"Authorization": f"Bearer {key}"})

    return asyncio.run(send())


def events(response):
    items = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    return [item if item == "[DONE]" else json.loads(item) for item in items]


def test_a_response_passes_unchanged():
    replicas = Replicas(whole(400, b'{"error": 1}'))
    found = post(replicas, GREEDY)
    assert (found.status_code, found.content) == (400, b'{"error": 1}')
    assert found.headers["x-comemo-replica"] == "a"
    assert "x-comemo-repeats" not in found.headers
    assert replicas.asked[0][0].body == json.dumps(GREEDY).encode()


@pytest.mark.parametrize("options", [GREEDY, DRAWN])
def test_what_was_not_sent_is_repeated(options):
    replicas = Replicas(whole(200, b"{}", then=LOST), stream("x", (), LOST), whole(200, b"{}"))
    found = post(replicas, options)
    assert (found.status_code, found.content) == (200, b"{}")
    assert found.headers["x-comemo-repeats"] == "2"
    assert replicas.closed == 3


@pytest.mark.parametrize("then", [LOST, {"error": {"code": "closing"}}])
@pytest.mark.parametrize("options", [GREEDY, DRAWN | {"seed": 3}])
def test_a_stream_goes_on_where_it_was_lost(options, then):
    replicas = Replicas(stream("first", WORDS[:2], then), stream("second"))
    assert events(post(replicas, options)) == [chunk("first", word) for word in WORDS] + ["[DONE]"]


def test_a_stream_can_be_lost_twice():
    replicas = Replicas(stream("a", WORDS[:2], LOST), stream("b", WORDS[:1], LOST), stream("c"))
    assert events(post(replicas, GREEDY)) == [chunk("a", word) for word in WORDS] + ["[DONE]"]


@pytest.mark.parametrize(
    ("options", "second"),
    [
        (DRAWN, None),
        (GREEDY, stream("b", ("one", " other", " three"))),
        (GREEDY, stream("b", WORDS[:1])),
        (GREEDY, whole(500, b"{}")),
    ],
    ids=["drawn", "differs", "shorter", "fails"],
)
def test_a_stream_that_nobody_repeats_ends_with_an_error(options, second):
    replicas = Replicas(stream("a", WORDS[:2], LOST), *([second] if second else []))
    *sent, last = events(post(replicas, options))
    assert sent == [chunk("a", word) for word in WORDS[:2]]
    assert last["error"]["code"] == "replica_lost"
    assert not replicas.tries


def test_another_error_of_a_stream_is_not_repeated():
    error = {"error": {"code": "timeout"}}
    replicas = Replicas(stream("a", WORDS, error))
    assert events(post(replicas, GREEDY))[-1] == error


def test_a_replica_that_ends_is_avoided():
    refusal = b'{"error": "closing"}'
    replicas = Replicas(whole(503, refusal, "b"), whole(503, refusal, "c"), whole(200, b"{}"))
    assert post(replicas, GREEDY).status_code == 200
    assert [avoid for _, _, avoid in replicas.asked] == [(), ("b",), ("b", "c")]
    replicas = Replicas(*(whole(503, refusal) for _ in range(REPEATS + 1)))
    found = post(replicas, GREEDY)
    assert (found.status_code, found.content) == (503, refusal)


def test_a_request_that_kills_replicas_does_not_kill_all():
    replicas = Replicas(*(whole(200, b"", then=LOST) for _ in range(REPEATS + 2)))
    found = post(replicas, GREEDY)
    assert found.status_code == 503
    assert found.json()["error"]["code"] == "replica_lost"
    assert found.headers["retry-after"] == "1"
    assert len(replicas.tries) == 1


def test_what_was_accepted_waits_for_a_busy_replica(monkeypatch):
    monkeypatch.setattr(fronts, "_PAUSE_S", 0.01)
    busy = over_limit(429, "requests", 1, 2)
    replicas = Replicas(
        stream("a", WORDS[:1], LOST), whole(429, b"{}"), [busy], whole(429, b"{}"), stream("b")
    )
    assert events(post(replicas, GREEDY)) == [chunk("a", word) for word in WORDS] + ["[DONE]"]
    found = post(Replicas(whole(429, b"first")), GREEDY)
    assert (found.status_code, found.content) == (429, b"first")
    assert post(Replicas([busy]), GREEDY).json() == busy.body()


def test_a_fault_is_a_status():
    found = post(Replicas([RuntimeError("secret")]), GREEDY)
    assert found.status_code == 500
    assert "secret" not in found.text


def test_bodies_that_are_refused_unread_are_not_forwarded():
    replicas = Replicas(*(whole(401, b"") for _ in range(3)))
    post(replicas, b"x" * 500, key="other")
    post(replicas, b"x" * 1001)
    post(replicas, b"x" * 1000)
    assert [len(request.body) for request, _, _ in replicas.asked] == [0, 0, 1000]


def test_an_answer_has_a_time_limit(monkeypatch):
    monkeypatch.setattr(fronts, "_AFTER_S", 0.01)

    async def never(request, picture, avoid):
        await asyncio.sleep(60)
        yield {}

    replicas = Replicas()
    replicas.ask = never
    found = post(replicas, GREEDY, ServerSettings("nano", timeout_s=0.05))
    assert found.status_code == 504


def test_a_client_that_is_gone_ends_the_answer():
    async def talk():
        closed, reached = asyncio.Event(), asyncio.Event()

        async def ask(request, picture, avoid):
            try:
                for message in stream("a"):
                    yield message
                    reached.set()
                await asyncio.sleep(60)
            finally:
                closed.set()

        requests = [{"type": "http.request", "body": b"{}"}]

        async def receive():
            if requests:
                return requests.pop()
            await reached.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        front = Front(ask, None, ServerSettings("nano"))
        await asyncio.wait_for(front(scope, receive, send), 10)
        return closed.is_set()

    assert asyncio.run(talk())


def test_an_app_is_told_that_nobody_listens():
    async def talk():
        told = asyncio.Event()

        async def app(scope, receive, send):
            assert (await receive())["body"] == b"hello"
            await send({"type": "http.response.start", "status": 200, "headers": []})
            assert (await receive())["type"] == "http.disconnect"
            told.set()

        messages = run_app(app, Forwarded({"type": "http"}, b"hello"), "a")
        first = await anext(messages)
        await messages.aclose()
        return first[0]["headers"], told.is_set()

    assert asyncio.run(talk()) == ([(b"x-comemo-replica", b"a")], True)


def test_an_app_that_fails_is_an_error():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("fault")

    with pytest.raises(KeyError):
        asyncio.run(whole_response(app, Forwarded({"type": "http"}, b""), "a"))


def question(namespace="red", **fields):
    return read_question(json.dumps(fields).encode(), namespace, SETTINGS)


def about(*urls):
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": u}}]} for u in urls
    ]


def test_a_conversation_is_known_by_its_first_picture():
    first = question(messages=about(URL)).picture
    assert first == question(messages=about(URL, "data:other")).picture
    assert first != question(messages=about("data:other")).picture
    assert first != question("blue", messages=about(URL)).picture
    assert question(messages=[{"role": "user", "content": "text alone"}]).picture is None


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"messages": 3}', b'{"messages": [{"content": [3]}]}']
)
def test_a_bad_request_may_go_anywhere(body):
    assert read_question(body, "red", SETTINGS).picture is None


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({}, True),
        ({"temperature": None}, True),
        ({"temperature": 0}, True),
        ({"temperature": 0.7}, False),
        ({"temperature": 0.7, "seed": 0}, True),
        ({"temperature": "hot"}, False),
    ],
)
def test_greedy_and_seeded_answers_are_the_same_everywhere(fields, same):
    assert question(**fields) == Question(None, same)


def test_a_replica_that_comes_or_goes_moves_few_pictures():
    names = [f"replica-{number}" for number in range(8)]
    pictures = [f"{number:064x}" for number in range(400)]

    def firsts(names):
        return [order_replicas(names, picture, {})[0] for picture in pictures]

    before = firsts(names)
    assert before == firsts(names[::-1])
    assert min(before.count(name) for name in names) > 25  # 50 each, about
    after = firsts(names[:-1])
    assert all(old == new for old, new in zip(before, after, strict=True) if old != names[-1])


def test_idle_replicas_come_first():
    loads = {"a": 2, "b": 0, "c": 1}
    assert order_replicas(["a", "b", "c"], None, loads) == ["b", "c", "a"]
    own = order_replicas(["a", "b", "c", "d", "e"], "p", {})[:2]
    loads = {name: 9 if name in own else ord(name) for name in "abcde"}
    rest = sorted({*"abcde"} - {*own})
    assert order_replicas(["e", "d", "c", "b", "a"], "p", loads) == [*own, *rest]
    assert {order_replicas(["a", "b"], None, {})[0] for _ in range(40)} == {"a", "b"}


def test_replicas_to_avoid_come_last():
    assert order_replicas(["a", "b", "c"], "p", {"a": 1}, ("a", "b")) in (
        ["c", "a", "b"],
        ["c", "b", "a"],
    )
    assert order_replicas(["a"], None, {}, ("a",)) == ["a"]
    assert order_replicas(["a", "b"], None, {"b": 1}, ("a",)) == ["b", "a"]
    assert order_replicas([], "p", {}) == []


def test_metrics_of_replicas_keep_their_numbers():
    text = '# HELP a_total Words\n# TYPE a_total counter\na_total{status="200"} %d\n'
    merged = merge_metrics({"x": text % 1, "y": text % 2}).decode()
    assert merged.count("# TYPE a_total counter") == 1
    assert 'a_total{replica="x",status="200"} 1.0' in merged
    assert 'a_total{replica="y",status="200"} 2.0' in merged
