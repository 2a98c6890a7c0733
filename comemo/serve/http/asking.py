"""A request from its body to its last byte: read, queued, answered, watched, logged."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from comemo.serve.engine.reader import PromptReader
from comemo.serve.http.answers import Completion
from comemo.serve.http.errors import HttpError, bad, over_limit, refused
from comemo.serve.http.forms import Form, parse_body, read_form
from comemo.serve.http.pictures import PictureReader
from comemo.serve.http.settings import ServerSettings
from comemo.serve.work import Engine, Event, Failed, Finished, Refused, Work

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A request that was read, ready for an engine."""

    form: Form
    work: Work


class Asking:
    """Reads requests and has them answered.

    Args:
        engine: that answers.
        reader: of its prompts.
        pictures: of its pictures.
        tokenizer: of the checkpoint.
        settings: of the server.
        threads: in which bodies are read.
    """

    def __init__(
        self,
        engine: Engine,
        reader: PromptReader,
        pictures: PictureReader,
        tokenizer: Any,
        settings: ServerSettings,
        threads: Executor,
    ) -> None:
        self._engine, self._reader, self._pictures = engine, reader, pictures
        self._tokenizer, self._settings, self._threads = tokenizer, settings, threads

    async def body(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            HttpError: 413 for too many bytes, 408 if it does not arrive in time.
        """
        most = self._settings.body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > most:
            raise over_limit(413, "bytes of a request", f"{most:,}", f"{int(declared):,}")

        async def collect() -> bytes:
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise over_limit(413, "bytes of a request", f"{most:,}", "more")
            return bytes(body)

        try:
            return await asyncio.wait_for(collect(), self._settings.body_timeout_s)
        except asyncio.TimeoutError:
            seconds = self._settings.body_timeout_s
            raise HttpError(408, f"the body did not arrive within {seconds:g} s") from None
        except ClientDisconnect:
            raise HttpError(499, "the client is gone") from None

    async def read(self, body: bytes, namespace: str, end: float) -> Asked:
        """Check a body and encode its prompt, in another thread.

        Args:
            body: of the request.
            namespace: of its key.
            end: seconds of `time.monotonic` at which it is given up.

        Raises:
            HttpError: what is wrong with it.
        """
        return await self.in_thread(self._read, body, namespace, end)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in one of the threads that read."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *args)

    def _read(self, body: bytes, namespace: str, end: float) -> Asked:
        form = read_form(parse_body(body), self._settings)
        messages, opened = self._pictures.read(form.messages, namespace)
        try:
            read = self._reader.read(messages, opened)
        except ValueError as error:
            raise bad(str(error).partition(": ")[2] or str(error), "messages") from None
        sampling = form.sampling
        if form.open_end:
            room = max(self._engine.longest - len(read.transcript), 1)
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        work = Work(
            namespace, read.prompt, read.transcript, read.pictures, sampling, form.look, end
        )
        return Asked(form, work)

    async def events(self, asked: Asked) -> AsyncIterator[Event]:
        """The events of a request; it is cancelled if nobody takes them any more.

        Raises:
            HttpError: what the engine refuses.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        try:
            ticket = self._engine.submit(asked.work, deliver)
        except Refused as error:
            raise refused(error) from None
        done = False
        try:
            while not done:
                event = await queue.get()
                done = isinstance(event, (Failed, Finished))
                if isinstance(event, Failed):
                    raise refused(event.error)
                yield event
        finally:
            if not done:
                self._engine.cancel(ticket)

    def completion(self, asked: Asked) -> Completion:
        """Where the events of a request are collected."""
        return Completion(self._settings.name, asked.form, self._tokenizer)


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects.

    Raises:
        HttpError: 499, which nobody receives.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HttpError(499, "the client is gone")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. A client that is gone, or does not read for too long, ends the work.

    Args:
        first: the first event, which was awaited: until then an error is a status.
        rest: the others; closed in any case.
        completion: that they are collected in.
        end: seconds of `time.monotonic` at which it is given up.
        closed: called once at the end, with the error if there was one.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: Event,
        rest: AsyncIterator[Event],
        completion: Completion,
        end: float,
        closed: Callable[[HttpError | None], None],
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(media_type=self.media_type, headers=headers)
        del self.headers["content-length"]
        self._first, self._rest, self._completion = first, rest, completion
        self._end, self._closed = end, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: HttpError | None = None
        try:
            seconds = max(self._end - time.monotonic(), 0) + 5  # the engine's own comes first
            await asyncio.wait_for(until_gone(receive, self._send(send)), seconds)
        except asyncio.TimeoutError:
            error = HttpError(504, "the client did not read the answer in time")
        except HttpError as found:
            error = found
        except OSError:
            error = HttpError(499, "the client is gone")
        except asyncio.CancelledError:
            error = HttpError(503, "the server is shutting down")
            raise
        finally:
            await self._rest.aclose()  # type: ignore[attr-defined]
            self._closed(error)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def put(item: object) -> None:
            text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
            data = f"data: {text}\n\n".encode("utf-8", errors="replace")
            await send({"type": "http.response.body", "body": data, "more_body": True})

        failed: HttpError | None = None
        try:
            for part in self._completion.take(self._first):
                await put(part)
            async for event in self._rest:
                for part in self._completion.take(event):
                    await put(part)
            for part in self._completion.last_parts():
                await put(part)
            await put("[DONE]")
        except HttpError as error:
            failed = error
            await put(error.body())
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if failed is not None:
            raise failed
