"""An ASGI app that answers requests of another process."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

from comemo.serve.replicas.questions import Forwarded

REPLICA = b"x-comemo-replica"
_END_S = 5.0  # for an app whose client is gone


@dataclass(frozen=True)
class WholeResponse:
    """A whole response of one replica.

    Attributes:
        replica: its name.
        status, headers, body: of HTTP.
    """

    replica: str
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


async def run_app(
    app: ASGIApp, request: Forwarded, replica: str
) -> AsyncGenerator[list[Message], None]:
    """The messages with which an app answers, those that are there at once in one list.

    If nobody takes them any more, the app is told that its client is gone.

    Args:
        app: of ASGI.
        request: to answer.
        replica: name of this replica, added to the headers of the response.

    Raises:
        Exception: of an app that failed before its response was complete.
    """
    queue: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    rest: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if rest:
            return rest.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (REPLICA, replica.encode())]}
        queue.put_nowait(message)

    scope = {"asgi": {"version": "3.0", "spec_version": "2.3"}, "extensions": {}, **request.scope}
    task = asyncio.ensure_future(app(scope, receive, send))
    task.add_done_callback(lambda _: queue.put_nowait(None))
    complete = False
    try:
        while True:
            messages = [await queue.get()]
            while not queue.empty():
                messages.append(queue.get_nowait())
            found = [message for message in messages if message is not None]
            complete = complete or any(
                message["type"] == "http.response.body" and not message.get("more_body", False)
                for message in found
            )
            if found:
                yield found
            if messages[-1] is None:
                break
        if not complete:
            task.result()
            raise RuntimeError("run_app: the app ended without a response")
    finally:
        gone.set()
        await asyncio.wait({task}, timeout=_END_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def whole_response(app: ASGIApp, request: Forwarded, replica: str) -> WholeResponse:
    """The response of an app, when it is complete."""
    status, headers, body = 500, [], bytearray()
    async for messages in run_app(app, request, replica):
        for message in messages:
            if message["type"] == "http.response.start":
                status, headers = message["status"], message["headers"]
            else:
                body += message.get("body", b"")
    return WholeResponse(replica, status, headers, bytes(body))
