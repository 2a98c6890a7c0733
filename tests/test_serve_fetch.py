"""Pictures by http: what is never fetched, and what a host may answer."""

import http.server
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the packages of comemo serve are not installed")

from comemo.serve.http import fetch
from comemo.serve.http.errors import HttpError

MOST = 1000
PATHS = {
    "/a.png": (200, b"picture"),
    "/long": (200, b"x" * (MOST + 1)),
    "/away": (302, b""),
    "/missing": (404, b"secret words"),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow":
            time.sleep(0.3)
        status, body = PATHS.get(self.path.partition("?")[0], (200, b""))
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1/inner")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch):
    """A name that a test may fetch from, served on a free port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(fetch, "_PORTS", {"http": server.server_address[1], "https": 443})
    monkeypatch.setattr(fetch, "_is_public", lambda address: True)
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", server.server_address)
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *args, **kwargs: [entry])
    yield "pictures.example"
    server.shutdown()
    thread.join()
    server.server_close()


def get(url, hosts=("pictures.example",), seconds=5.0):
    return fetch.fetch_picture(url, hosts, MOST, seconds, "here")


def test_a_host_that_is_allowed(host):
    assert get(f"http://{host}/a.png?size=1") == b"picture"
    assert get(f"http://{host.upper()}/a.png", ("*",)) == b"picture"


@pytest.mark.parametrize(
    ("path", "status", "wanted"),
    [("/long", 413, "at most 1,000"), ("/away", 400, "302"), ("/missing", 400, "404")],
)
def test_what_a_host_may_not_answer(host, path, status, wanted):
    with pytest.raises(HttpError, match=wanted) as error:
        get(f"http://{host}{path}")
    assert error.value.status == status
    assert "secret" not in error.value.message


def test_a_slow_host(host):
    with pytest.raises(HttpError, match="could not be fetched: TimeoutError"):
        get(f"http://{host}/slow", seconds=0.1)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("ftp://pictures.example/a", "must be data:, http: or https:"),
        ("http://user@pictures.example/a", "without a user"),
        ("http://pictures.example:22/a", "usual port"),
        ("http://pictures.example:99999/a", "usual port"),
        ("http://other.example/a", "host 'other.example' are not fetched"),
        ("http:///a", "must be data:"),
    ],
)
def test_urls_that_are_not_fetched(url, wanted):
    with pytest.raises(HttpError, match=wanted) as error:
        get(url)
    assert (error.value.status, error.value.param) == (400, "here")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
    ],
)
def test_internal_addresses_are_never_asked(monkeypatch, address):
    """By any name that means one, even beside a public address."""
    entries = [(0, 0, 0, "", (one, 80)) for one in ("93.184.216.34", address)]
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *args, **kwargs: entries)

    def refuse(*args, **kwargs):
        raise AssertionError("a connection")

    monkeypatch.setattr(fetch.socket, "create_connection", refuse)
    with pytest.raises(HttpError, match="has an internal address"):
        get("http://pictures.example/a", ("*",))


def test_nothing_is_fetched_by_default():
    with pytest.raises(HttpError, match="this server fetches none"):
        get("http://pictures.example/a", ())
