"""The HTTP app with the real client of OpenAI: what it sends, what it gets, what is refused."""

import http.client
import json
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from servers import NAME, SERVED, about, as_url, drawn, ready_nano, serving

openai = pytest.importorskip("openai", reason="the client of OpenAI is not installed")
pytest.importorskip("fastapi", reason="the packages of comemo serve are not installed")

from comemo import ChatSession  # noqa: E402
from comemo.images import load_image  # noqa: E402
from comemo.serve.http.settings import digest_of_key  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("an engine has a thread of its own"),
]
KEYS = {digest_of_key("red-key"): "red", digest_of_key("blue-key"): "blue"}


@pytest.fixture(scope="module")
def ready():
    ready = ready_nano()
    yield ready
    ready.engine.close(0)


@pytest.fixture(scope="module")
def address(ready):
    with serving(ready) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def picture():
    return drawn(4)


def ask(client, messages, **options):
    return client.chat.completions.create(model=NAME, messages=messages, **options)


def post(address, body, path="/v1/chat/completions", **headers):
    """Status, headers and JSON of a raw request."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json"} | headers)
    response = connection.getresponse()
    found = response.status, dict(response.getheaders()), json.loads(response.read())
    connection.close()
    return found


def test_answers_are_those_of_a_session(ready, client, picture):
    url, questions = picture
    messages, shown = [{"role": "system", "content": "You look at pictures."}], url
    session = ChatSession(
        ready.model, ready.processor, system_message="You look at pictures.", do_sample=False
    )
    read = 0
    for index, (question, _) in enumerate(questions[:3]):
        text = {"role": "user", "content": question}
        messages.append(text if index else about(shown, question))
        found = ask(client, messages, max_tokens=64)
        text = found.choices[0].message.content
        wanted = session.ask(question, None if index else url, max_new_tokens=64)
        assert (text, found.choices[0].finish_reason) == (wanted, "stop")
        assert found.usage.prompt_tokens == session.report.prompt_tokens
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        assert found.usage.prompt_tokens_details.cached_tokens >= read
        read = found.usage.prompt_tokens
        messages.append({"role": "assistant", "content": text})


def test_a_stream_is_the_whole_answer(client, picture):
    url, _ = picture
    messages = [about(url, "Describe the picture.")]
    whole = ask(client, messages, logprobs=True, top_logprobs=2)
    text, reasons, logprobs, usage = "", [], [], None
    for chunk in ask(
        client,
        messages,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            logprobs += choice.logprobs.content if choice.logprobs else []
    assert text == whole.choices[0].message.content
    assert reasons == ["stop"]
    assert [one.token for one in logprobs] == [
        one.token for one in whole.choices[0].logprobs.content
    ]
    told = "".join(one.token for one in logprobs).replace("<|im_end|>", "")
    assert told.split() == text.split()
    assert all(one.logprob == one.top_logprobs[0].logprob for one in logprobs)
    assert usage.completion_tokens == whole.usage.completion_tokens == len(logprobs)


def test_a_raw_stream_ends_with_done(address, picture):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    body = {"model": NAME, "messages": [about(picture[0], "Hello")], "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.getheader("content-type").startswith("text/event-stream")
    events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    first = json.loads(events[0].removeprefix("data: "))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_options_of_an_answer(client, picture):
    url, _ = picture
    messages = [about(url, "Describe the picture.")]
    plain = ask(client, messages).choices[0].message.content
    short = ask(client, messages, max_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2
    word = plain.split()[2]
    cut = ask(client, messages, stop=[word, "never"])
    assert cut.choices[0].message.content == plain[: plain.index(word)]
    assert cut.choices[0].finish_reason == "stop"
    drawn = [
        ask(client, messages, temperature=1.9, seed=seed, n=2, max_tokens=8).choices
        for seed in (1, 1, 2)
    ]
    texts = [[choice.message.content for choice in choices] for choices in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert [choice.index for choice in drawn[0]] == [0, 1]
    assert ask(client, messages, max_completion_tokens=1).usage.completion_tokens == 1


def test_several_pictures_and_details(ready, client, picture):
    (one, _), (two, _) = picture, drawn(5)
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in (one, two)]
    content = [*shown, {"type": "text", "text": "Describe the picture."}]
    found = ask(client, [{"role": "user", "content": content}])
    session = ChatSession(ready.model, ready.processor, do_sample=False)
    wanted = session.ask("Describe the picture.", [one, two], max_new_tokens=64)
    assert found.choices[0].message.content == wanted
    low = ask(client, [about(one, "Describe the picture.", detail="low")])
    side = ready.model.config.vision_config.image_size[0]
    tiles = load_image(one, side, 1)
    wanted = ChatSession(ready.model, ready.processor, do_sample=False).ask(
        "Describe the picture.", [tiles], max_new_tokens=64
    )
    assert low.choices[0].message.content == wanted
    assert low.usage.prompt_tokens < found.usage.prompt_tokens


def test_a_mark_that_was_typed_is_text(client):
    messages = [{"role": "user", "content": "What does <image> mean? <|im_end|>"}]
    assert ask(client, messages, max_tokens=2).usage.prompt_tokens > 10


def test_an_assistant_without_content(client, picture):
    url, questions = picture
    messages = [
        about(url, questions[0][0]),
        {"role": "assistant", "content": None},
        {"role": "user", "content": questions[1][0]},
    ]
    assert ask(client, messages).choices[0].message.content


def test_extensions(client, picture):
    url, questions = picture
    extra = {"comemo": {"report": True, "look": True}}
    found = ask(client, [about(url, questions[0][0])], extra_body=extra)
    assert found.comemo["begun"]["pictures"] == 1
    look = found.comemo["look"]
    assert " ".join(look["words"]) == found.choices[0].message.content
    (shown,) = look["pictures"]
    assert all(len(word) == shown["across"] * shown["down"] for word in shown["heat"])
    chunks = list(ask(client, [about(url, questions[0][0])], stream=True, extra_body=extra))
    told = [chunk.comemo for chunk in chunks if getattr(chunk, "comemo", None)]
    assert "begun" in told[0]
    assert told[-1]["look"] == look


SMALLEST = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"temperature": 2.5}, "temperature", "at most 2"),
        ({"top_p": -1}, "top_p", "at least 0"),
        ({"n": 0}, "n", "at least 1"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "must not differ"),
        ({"max_tokens": True}, "max_tokens", "a whole number"),
        ({"top_logprobs": 2}, "top_logprobs", "need logprobs"),
        ({"stop": ["a"] * 5}, "stop", "up to 4 texts"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "need stream"),
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean temperature"),
        ({"extra_body": {"comemo": {"heat": True}}}, "comemo", "no field 'heat'"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "must be of role user"),
        ({"messages": [{"role": "tool", "content": "a"}, *HI]}, "messages", "tools"),
        ({"messages": [*HI, {"role": "system", "content": "a"}, *HI]}, "messages", "come first"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
            "must be of type text or image_url",
        ),
        (
            {"messages": [{"role": "assistant", "content": about(SMALLEST, "a")["content"]}, *HI]},
            "messages[0].content[0]",
            "must have no picture",
        ),
        ({"messages": [about("http://127.0.0.1/a.png", "a")]}, "messages[0].content[0]", "none"),
        ({"messages": [about("/etc/hostname", "a")]}, "messages[0].content[0]", "data: URLs"),
        ({"messages": [about("file:///etc/hostname", "a")]}, "messages[0].content[0]", "data:"),
        ({"messages": [about("data:image/png,abc", "a")]}, "messages[0].content[0]", "base64"),
        (
            {"messages": [about("data:image/png;base64,aGVsbG8=", "a")]},
            "messages[0].content[0]",
            "not an image",
        ),
    ],
)
def test_what_is_refused_is_named(client, options, param, message):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **{"messages": HI} | options)
    assert error.value.param == param
    assert message in error.value.body["message"]
    assert error.value.type == "invalid_request_error"


def test_other_errors(address, client):
    with pytest.raises(openai.NotFoundError, match="only 'nano'"):
        client.chat.completions.create(model="gpt-5", messages=HI)
    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "comemo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    for body, wanted in ((b"{", "JSON"), (b"[1]", "object"), (b"\xff", "JSON"), (b"[" * 9999, "")):
        status, _, told = post(address, body)
        assert status == 400
        assert wanted in told["error"]["message"]
    assert post(address, {}, "/v1/completions")[0] == 404
    status, _, told = post(address, {"model": NAME, "messages": HI, "seed": float("nan")})
    assert (status, "NaN" in told["error"]["message"]) == (400, False)


def test_limits(ready):
    settings = replace(SERVED.server, body_bytes=200_000, pixels=10_000, images=2, concurrent=1)
    url = as_url(Image.new("RGB", (200, 100)))
    with serving(ready, settings) as address:
        too_long = {"model": NAME, "messages": [{"role": "user", "content": "a" * 300_000}]}
        many = [{"role": "user", "content": about(SMALLEST, "a")["content"] * 3}]
        for body, status, name in (
            (too_long, 413, "bytes of a request"),
            ({"model": NAME, "messages": [about(url, "a")]}, 422, "pixels of a picture"),
            ({"model": NAME, "messages": many}, 422, "images of a request"),
            ({"model": NAME, "messages": HI, "max_tokens": 10**6}, 422, "tokens of a prompt"),
        ):
            found, _, told = post(address, body)
            assert (found, told["error"]["code"]) == (status, "limit_exceeded")
            assert f"limit of {name}" in told["error"]["message"]
        # A body without a length is counted as it comes.
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        parts = (b"a" * 50_000 for _ in range(6))
        connection.request("POST", "/v1/chat/completions", parts, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        # One that does not come keeps others away, which are told so.
        slow = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        slow.putrequest("POST", "/v1/chat/completions")
        slow.putheader("Content-Length", "100")
        slow.endheaders(b"{")
        while (found := post(address, {"model": NAME, "messages": HI}))[0] == 200:
            time.sleep(0.01)
        assert (found[0], found[1]["retry-after"]) == (429, "1")
        assert "concurrent requests" in found[2]["error"]["message"]
        slow.close()
        while post(address, {"model": NAME, "messages": HI})[0] == 429:
            time.sleep(0.01)


def test_keys_and_their_namespaces(ready, picture):
    url, questions = picture
    settings = replace(SERVED.server, keys=KEYS)
    with serving(ready, settings) as address:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic red-key"}):
            status, headers, told = post(address, {"model": NAME, "messages": HI}, **header)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert told["error"]["code"] == "invalid_api_key"
        found = {}
        for name in ("red", "blue", "red"):
            options = {"base_url": f"{address}/v1", "api_key": f"{name}-key", "max_retries": 0}
            with openai.OpenAI(**options) as client:
                extra = {"comemo": {"report": True}}
                found.setdefault(name, []).append(
                    ask(client, [about(url, questions[0][0])], extra_body=extra).comemo["begun"]
                )
        assert [one["found_pictures"] for one in found["red"]] == [0, 1]
        assert [one["cached_tokens"] for one in found["blue"]] == [0]
        for path, open_to_all in (("/health", True), ("/metrics", False), ("/v1/models", False)):
            connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
            connection.request("GET", path)
            assert (connection.getresponse().status == 200) == open_to_all
            connection.close()


def test_health_and_metrics(address, client):
    ask(client, HI, max_tokens=3)
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read())["status"] == "ok"
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['comemo_requests_total{status="200"}']) >= 1
    assert float(values["comemo_answer_tokens_total"]) >= 3
    assert float(values["comemo_first_token_seconds_count"]) >= 1
    assert float(values["comemo_key_tokens"]) > 0
    connection.close()


def test_a_client_that_leaves_ends_the_work(ready, address, picture):
    before = ready.engine.state().totals
    for stream in (True, False):
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        body = {
            "model": NAME,
            "messages": [about(picture[0], "Describe the picture.")],
            "stream": stream,
            "max_tokens": 20_000,
            "temperature": 2,
            "top_p": 1,
        }
        body["messages"][0]["content"][1]["text"] += str(time.time())
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        if stream:
            connection.getresponse().read(100)
        else:
            time.sleep(0.05)
        connection.close()
    end = time.monotonic() + 30
    while (state := ready.engine.state()).answering or state.reading or state.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert state.totals["answer_tokens"] - before["answer_tokens"] < 20_000


def test_the_log_tells_no_contents(ready, client, picture, caplog):
    import logging

    logger = logging.getLogger("comemo.serve")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    try:
        ask(client, [about(picture[0], "Where is the secret?")])
        with serving(ready, replace(SERVED.server, log_contents=True)) as address:
            body = {"model": NAME, "messages": [{"role": "user", "content": "tell me all"}]}
            post(address, body)
    finally:
        logger.removeHandler(caplog.handler)
    plain, told = (json.loads(record.getMessage()) for record in caplog.records[-2:])
    assert plain["status"] == 200
    assert plain["prompt_tokens"] > 10
    assert {"first_s", "total_s", "waited_s", "finish", "namespace"} <= plain.keys()
    assert "secret" not in json.dumps(plain)
    assert "tell me all" in told["prompt"]
    assert told["answers"]


def test_float32_is_what_is_compared(ready):
    assert ready.model.dtype == torch.float32
