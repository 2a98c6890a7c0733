"""What must be known of a request to choose its replica, and to repeat it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from comemo.serve.http.errors import HttpError
from comemo.serve.http.forms import COLDEST, parse_body
from comemo.serve.http.settings import ServerSettings

_KEPT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string")
_KEPT_TOO = ("root_path", "headers", "client", "server")


@dataclass(frozen=True)
class Forwarded:
    """An HTTP request on its way to a replica.

    Attributes:
        scope: of ASGI, without what belongs to one process.
        body: all of it, unless the app refuses the request without reading it.
    """

    scope: dict[str, Any]
    body: bytes

    @classmethod
    def of(cls, scope: Any, body: bytes) -> "Forwarded":
        """Keep what can be sent to another process."""
        return cls({name: scope[name] for name in (*_KEPT, *_KEPT_TOO) if name in scope}, body)


@dataclass(frozen=True)
class Question:
    """What a chat completion is about.

    Attributes:
        picture: digest of its namespace and its first picture; None for text alone. Requests of
            one conversation share it, so their replica has their prompts in its KV cache too.
        same: whether every replica gives the same answer, since it is greedy or seeded.
    """

    picture: str | None = None
    same: bool = False


def read_question(body: bytes, namespace: str, settings: ServerSettings) -> Question:
    """Read a chat completion as far as needed. A bad one may go anywhere: a replica refuses it.

    Args:
        body: of the request.
        namespace: of its key.
        settings: of the server.
    """
    try:
        item = parse_body(body)
    except HttpError:
        return Question()
    url = next(_pictures(item.get("messages")), None)
    picture = None
    if url is not None:
        whole = f"{namespace}\0{url}".encode("utf-8", errors="replace")
        picture = hashlib.sha256(whole).hexdigest()
    temperature = item.get("temperature")
    temperature = settings.temperature if temperature is None else temperature
    greedy = isinstance(temperature, (int, float)) and temperature < COLDEST
    return Question(picture, greedy or item.get("seed") is not None)


def _pictures(messages: Any) -> Iterator[str]:
    """URLs of pictures in their order, of messages that may have any form."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            held = part.get("image_url") if isinstance(part, dict) else None
            url = held.get("url") if isinstance(held, dict) else held
            if isinstance(url, str):
                yield url
