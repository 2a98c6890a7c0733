"""What stands before the replicas: an ASGI app that sends each request to one of them.

Requests about one picture go to one replica, which then has its image memory. A request whose
replica is lost goes to another one, unless its client already has a part that nobody can repeat.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeAlias

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from comemo.serve.http.asking import until_gone
from comemo.serve.http.errors import HttpError
from comemo.serve.http.settings import ServerSettings
from comemo.serve.replicas.metrics import CONTENT_TYPE, merge_metrics
from comemo.serve.replicas.questions import Forwarded, Question, read_question
from comemo.serve.replicas.relay import AnswerDiffers, Relay, RepeatRefused, ReplicaLost
from comemo.serve.replicas.running import WholeResponse

# A request, the digest that chooses a replica, and the names of replicas that refused it -> the
# messages of a replica. Raises `ReplicaLost`, and `HttpError` if no replica takes it.
Ask: TypeAlias = Callable[[Forwarded, str | None, tuple[str, ...]], AsyncGenerator[Message, None]]
# A request -> the response of every replica.
AskAll: TypeAlias = Callable[[Forwarded], Awaitable[Sequence[WholeResponse]]]

REPEATS = 2  # times that a request is repeated: one that kills replicas must not kill all of them
_PAUSE_S = 1.0  # before a busy replica is asked again
_AFTER_S = 10.0  # after the time limit of the replicas

_log = logging.getLogger("comemo.serve")


class Front:
    """An ASGI app before replicas.

    Args:
        ask: has a request answered by one replica.
        ask_all: has a request answered by every replica.
        settings: of the server, the same as those of the replicas.
    """

    def __init__(self, ask: Ask, ask_all: AskAll, settings: ServerSettings) -> None:
        self._ask, self._ask_all, self._settings = ask, ask_all, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of HTTP."""
        relay = Relay(send, same=False)
        try:
            namespace = self._namespace(scope)
            request = Forwarded.of(scope, await self._body(scope, receive, namespace))
            if scope["method"] == "GET" and scope["path"].endswith("/metrics"):
                await (await self._metrics(request))(scope, receive, send)
                return
            question = Question()
            if request.body and scope["path"].endswith("/v1/chat/completions"):
                question = await asyncio.to_thread(
                    read_question, request.body, namespace or "", self._settings
                )
            relay = Relay(send, question.same)
            seconds = self._settings.timeout_s + _AFTER_S
            work = asyncio.wait_for(self._forward(request, question, relay), seconds)
            await until_gone(receive, work)
        except asyncio.TimeoutError:
            text = "no replica answered within the time that the server allows"
            await relay.fail(HttpError(504, text, "timeout_error", code="timeout"))
        except HttpError as error:
            if error.status != 499:
                await relay.fail(error)
        except Exception as error:
            _log.error("a fault of the server", exc_info=error)
            text = "a fault of the server"
            await relay.fail(HttpError(500, text, "server_error", code="internal"))

    async def _forward(self, request: Forwarded, question: Question, relay: Relay) -> None:
        avoid: tuple[str, ...] = ()
        lost = 0
        while not relay.done:
            relay.last = lost == REPEATS
            try:
                await self._try(request, question, avoid, relay)
            except ReplicaLost as error:
                lost += 1
                relay.repeats = lost
                if relay.last or not relay.can_repeat:
                    raise _given_up(lost) from error
                avoid += (error.replica,) if error.replica else ()
                _note("repeated", repeats=lost, reason=str(error)[:200])
                relay.begin_again()
            except RepeatRefused:
                await asyncio.sleep(_PAUSE_S)
                relay.begin_again()
            except AnswerDiffers as error:
                _note("not repeated", reason=str(error))
                raise _given_up(lost) from error

    async def _try(
        self, request: Forwarded, question: Question, avoid: tuple[str, ...], relay: Relay
    ) -> None:
        answer = self._ask(request, question.picture, avoid)
        try:
            async for message in answer:
                await relay.take(message)
        except HttpError as error:
            raise (RepeatRefused if relay.repeats and error.status == 429 else error) from None
        finally:
            await answer.aclose()
        if not relay.done:
            raise ReplicaLost("it ended before its answer")

    async def _metrics(self, request: Forwarded) -> Response:
        """Those of all replicas, with the name of the replica as a label."""
        responses = await self._ask_all(request)
        for one in responses:
            if one.status != 200:
                return Response(
                    one.body, one.status, {k.decode(): v.decode() for k, v in one.headers}
                )
        texts = {one.replica: one.body.decode() for one in responses}
        return Response(merge_metrics(texts), media_type=CONTENT_TYPE)

    def _namespace(self, scope: Scope) -> str | None:
        """The namespace of the key; None for a wrong one, which the app of a replica refuses."""
        header = Headers(scope=scope).get("authorization", "")
        return self._settings.namespace_of_header(header)

    async def _body(self, scope: Scope, receive: Receive, namespace: str | None) -> bytes:
        """The body; nothing of one that the app refuses unread, and little too much of a longer
        one, so that it is refused in the same words as by one server.

        Raises:
            HttpError: 408 if it does not arrive in time, 499 if the client is gone.
        """
        most = self._settings.body_bytes
        declared = Headers(scope=scope).get("content-length", "")
        if namespace is None or (declared.isdigit() and int(declared) > most):
            return b""

        async def collect() -> bytes:
            body = bytearray()
            while len(body) <= most:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise HttpError(499, "the client is gone")
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    break
            return bytes(body[: most + 1])

        seconds = self._settings.body_timeout_s
        try:
            return await asyncio.wait_for(collect(), seconds)
        except asyncio.TimeoutError:
            raise HttpError(408, f"the body did not arrive within {seconds:g} s") from None


def _given_up(lost: int) -> HttpError:
    text = f"the answer was lost with its replica, after {lost} tries: try again"
    headers = {"Retry-After": "1"}
    return HttpError(503, text, "server_error", code="replica_lost", headers=headers)


def _note(event: str, **facts: object) -> None:
    _log.warning(json.dumps({"event": event, **facts}, ensure_ascii=False))
