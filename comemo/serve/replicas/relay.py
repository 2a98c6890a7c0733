"""A response on its way to a client, from one replica or, if that is lost, from the next.

Nothing is sent before it can be kept. A response that is not streamed is sent whole; a stream that
was begun is continued by another replica only if that repeats every event that was sent.
"""

import json
from typing import Any

from starlette.types import Message, Send

from comemo.serve.http.errors import HttpError
from comemo.serve.replicas.running import REPLICA

REPEATS = b"x-comemo-repeats"
_CLOSING = "closing"  # code of the error of an engine that ends


class ReplicaLost(Exception):
    """A replica did not finish its answer.

    Args:
        reason: for the log.
        replica: its name, if it is known.
    """

    def __init__(self, reason: str, replica: str | None = None) -> None:
        super().__init__(reason)
        self.replica = replica


class RepeatRefused(Exception):
    """A replica is too busy for a request that was accepted before."""


class AnswerDiffers(Exception):
    """A replica does not repeat what was sent."""


class Relay:
    """Where the messages of all tries of one request go.

    Args:
        send: of ASGI, to the client.
        same: whether every replica gives the same answer.

    Attributes:
        repeats: replicas that were lost before this try.
        last: whether this try is the last one: then a refusal is an answer.
        done: whether the response is complete.
    """

    def __init__(self, send: Send, same: bool) -> None:
        self._send, self._same = send, same
        self._start: Message | None = None  # of this try
        self._begun = False  # whether the client has a start
        self._stream = False
        self._rest = b""  # of the body: what is not sent yet
        self._sent: list[int] = []  # hashes of the events that the client has
        self._place = 0  # events of this try
        self._head: dict[str, Any] = {}  # of the events that the client has
        self.repeats, self.last, self.done = 0, False, False

    @property
    def can_repeat(self) -> bool:
        """Whether another replica can answer, or go on."""
        return not self._begun or (self._stream and self._same)

    def begin_again(self) -> None:
        """The next messages are those of another replica."""
        self._start, self._rest, self._place = None, b"", 0

    async def take(self, message: Message) -> None:
        """A message of the app of a replica.

        Raises:
            ReplicaLost: the replica ends; another one may answer.
            RepeatRefused: it is busy, but the request had been accepted.
            AnswerDiffers: it cannot go on where the first one was lost.
        """
        if message["type"] == "http.response.start":
            self._take_start(message)
            return
        last = not message.get("more_body", False)
        self._rest += message.get("body", b"")
        if self._stream:
            *events, self._rest = self._rest.split(b"\n\n")
            for event in events:
                await self._take_event(event + b"\n\n")
        if last:
            if self._place < len(self._sent):
                raise AnswerDiffers("it ended before")
            await self._put(self._rest, more=False)
            self.done = True

    async def fail(self, error: HttpError) -> None:
        """Tell the client that nobody finishes the answer."""
        body = json.dumps(error.body(), ensure_ascii=False).encode()
        if self._begun:
            await self._put(b"data: " + body + b"\n\n", more=False)
        else:
            headers = {"content-type": "application/json", "content-length": str(len(body))}
            pairs = [
                (name.lower().encode(), value.encode())
                for name, value in {**headers, **error.headers}.items()
            ]
            self._start = {
                "type": "http.response.start",
                "status": error.status,
                "headers": pairs,
            }
            await self._put(body, more=False)
        self.done = True

    def _take_start(self, message: Message) -> None:
        headers = dict(message["headers"])
        status = message["status"]
        if status == 503 and not self.last:
            raise ReplicaLost("it does not accept requests", headers.get(REPLICA, b"").decode())
        if status == 429 and self.repeats:
            raise RepeatRefused
        stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        if self._begun and not (stream and status == 200):
            raise AnswerDiffers(f"status {status}")
        self._start, self._stream = message, stream

    async def _take_event(self, event: bytes) -> None:
        """An event of a stream. What the client has is compared, and not sent again."""
        if not self._same:
            await self._put(event)
            return
        item = _read_event(event)
        error = item.get("error") if isinstance(item, dict) else None
        if error is not None and error.get("code") == _CLOSING and not self.last:
            raise ReplicaLost("it ends")
        facts = hash(_facts(item))
        self._place += 1
        if self._place <= len(self._sent):
            if facts != self._sent[self._place - 1]:
                raise AnswerDiffers(f"event {self._place}")
            return
        if isinstance(item, dict) and "id" in item:
            self._head = self._head or {"id": item["id"], "created": item["created"]}
            if item["id"] != self._head["id"]:
                text = json.dumps(item | self._head, ensure_ascii=False)
                event = f"data: {text}\n\n".encode("utf-8", errors="replace")
        await self._put(event)
        self._sent.append(facts)

    async def _put(self, body: bytes, more: bool = True) -> None:
        """Send a part of the body, after the start."""
        if not self._begun:
            assert self._start is not None
            headers = list(self._start["headers"])
            if self.repeats:
                headers.append((REPEATS, str(self.repeats).encode()))
            self._begun = True
            await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _read_event(event: bytes) -> Any:
    """What an event holds; its text if that is not JSON."""
    text = event.decode("utf-8", errors="replace").removeprefix("data: ").strip()
    try:
        return json.loads(text)
    except ValueError:
        return text


def _facts(item: Any) -> str:
    """What must be the same in a repeated event: not its name, its times, or digits of floats."""
    choices = item.get("choices") if isinstance(item, dict) else None
    if not choices:
        return "" if isinstance(item, dict) else str(item)
    names = ("index", "delta", "finish_reason")
    return json.dumps([[choice.get(name) for name in names] for choice in choices])
