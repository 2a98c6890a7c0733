"""A server under load: 1,000 mixed requests leave nothing behind and change no answer."""

import http.client
import json
import os
import random
import socket
import statistics
import threading
import time
from pathlib import Path

import pytest
from conftest import SLOW
from servers import about, drawn, process

pytest.importorskip("fastapi", reason="the packages of comemo serve are not installed")
pytestmark = [
    *([SLOW] if SLOW else []),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
]
NAME, REQUESTS, CLIENTS = "comemo-nano", 1000, 12
PICTURES = 5


def connect(address):
    return http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)


def body_of(messages, **options):
    return json.dumps({"model": NAME, "messages": messages, "max_tokens": 48} | options)


def post(address, body):
    """Status and JSON."""
    connection = connect(address)
    try:
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def streamed(address, body, pause=0.0):
    """The text of a stream, read slowly with a pause."""
    connection = connect(address)
    try:
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        text, done = "", False
        while line := response.readline():
            time.sleep(pause)
            data = line.decode().strip().removeprefix("data: ")
            done |= data == "[DONE]"
            if data.startswith("{"):
                for choice in json.loads(data)["choices"]:
                    text += choice["delta"].get("content", "")
        assert done
        return text
    finally:
        connection.close()


def killed(address, body, random):
    """A request whose client leaves: at once, with the answer under way, or with half a body."""
    parts = address.removeprefix("http://").split(":")
    with socket.create_connection((parts[0], int(parts[1])), timeout=60) as sock:
        data = body.encode()
        length = f"Content-Length: {len(data)}"
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n"
        sent = data if random.random() < 0.7 else data[: len(data) // 2]
        sock.sendall(head.encode() + sent)
        if random.random() < 0.5:
            time.sleep(random.random() * 0.2)
        if random.random() < 0.3 and sent is data:
            sock.recv(10)


MALFORMED = (
    "{",
    "[]",
    '{"model": 5}',
    body_of([]),
    body_of([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    body_of([{"role": "user", "content": "a"}], temperature="hot"),
    body_of([about("data:image/png;base64,AAAA", "a")]),
    body_of([{"role": "user", "content": "a"}], max_tokens=10**9),
)


class Load:
    """Clients that ask at once; what is wrong is collected."""

    def __init__(self, address, asked, wanted):
        self.address, self.asked, self.wanted = address, asked, wanted
        self.wrong, self.counts, self.lock = [], {}, threading.Lock()

    def run(self, requests, seed):
        numbers = iter(range(requests))

        def work():
            while True:
                with self.lock:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    self.one(random.Random(seed * 10_000 + number))
                except Exception as error:
                    self.wrong.append(repr(error))

        threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def one(self, random):
        index = random.randrange(len(self.asked))
        messages, wanted = self.asked[index], self.wanted[index]
        kind = random.choices(
            ("whole", "stream", "slow", "killed", "malformed", "several"), (5, 5, 1, 4, 3, 1)
        )[0]
        with self.lock:
            self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind == "whole":
            status, found = post(self.address, body_of(messages))
            texts = [found["choices"][0]["message"]["content"]] if status == 200 else [found]
        elif kind == "several":
            _, found = post(self.address, body_of(messages, n=2))
            texts = [choice["message"]["content"] for choice in found["choices"]]
        elif kind in ("stream", "slow"):
            pause = 0.05 if kind == "slow" else 0.0
            texts = [streamed(self.address, body_of(messages, stream=True), pause)]
        elif kind == "killed":
            stream = random.random() < 0.5
            killed(self.address, body_of(messages, stream=stream, max_tokens=400), random)
            return
        else:
            status, found = post(self.address, random.choice(MALFORMED))
            texts, wanted = [status in (400, 422) and "message" in found["error"]], True
        if any(text != wanted for text in texts):
            self.wrong.append((kind, index, texts, wanted))


def held(process):
    """Memory in MB, threads and open files of a process."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    files = len(os.listdir(f"/proc/{process.pid}/fd"))
    return int(facts["VmRSS"].split()[0]) / 1000, int(facts["Threads"]), files


def at_rest(address, process, files):
    """What a server holds once nothing is at work and its connections are closed."""
    end = time.monotonic() + 60
    while True:
        connection = connect(address)
        connection.request("GET", "/health")
        health = json.loads(connection.getresponse().read())
        connection.close()
        found = held(process)
        busy = health["waiting"] or health["reading"] or health["answering"]
        if not busy and (files is None or found[2] <= files):
            return found
        assert time.monotonic() < end, (health, found)
        time.sleep(0.1)


def test_a_thousand_mixed_requests():
    pictures = [drawn(number) for number in range(PICTURES)]
    asked = [[about(url, question)] for url, questions in pictures for question, _ in questions[:6]]
    asked.append([{"role": "user", "content": "Hello there"}])
    with process("--dtype", "float32", "--waiting", "100", "--waiting-each", "100") as (
        address,
        server,
    ):
        wanted = []
        for messages in asked:
            _, found = post(address, body_of(messages))
            wanted.append(found["choices"][0]["message"]["content"])
        load = Load(address, asked, wanted)
        load.run(REQUESTS // 2, seed=1)
        before = at_rest(address, server, None)
        load.run(REQUESTS // 2, seed=2)
        after = at_rest(address, server, before[2])
        assert load.wrong == []
        assert min(load.counts.values()) > 20
        assert after[0] - before[0] < 30, (before, after)
        assert after[1] <= before[1]
        assert after[2] <= before[2]


def test_slow_clients_do_not_slow_others():
    """Twelve streams that nobody reads on, and an answer as fast as without them."""
    url, questions = drawn(0)
    body = body_of([about(url, questions[0][0])])
    long = body_of([about(url, "Describe the picture.")], stream=True)

    def seconds():
        start = time.perf_counter()
        assert post(address, body)[0] == 200
        return time.perf_counter() - start

    with process() as (address, _):
        seconds()
        alone = statistics.median(seconds() for _ in range(15))
        waiting = []
        for _ in range(12):
            connection = connect(address)
            connection.request("POST", "/v1/chat/completions", long)
            waiting.append(connection)
        time.sleep(1)
        beside = statistics.median(seconds() for _ in range(15))
        for connection in waiting:
            connection.close()
    assert beside < 3 * alone + 0.05
