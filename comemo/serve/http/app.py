"""The HTTP app: `/v1/chat/completions`, `/v1/models`, `/health`, `/metrics`, and the page."""

import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from comemo.serve.engine.reader import PromptReader
from comemo.serve.http.answers import Completion
from comemo.serve.http.asking import Asked, Asking, EventStream, until_gone
from comemo.serve.http.errors import HttpError, bad, over_limit
from comemo.serve.http.forms import parse_body
from comemo.serve.http.metrics import Metrics
from comemo.serve.http.page import page_router, picture_facts
from comemo.serve.http.pictures import PictureReader
from comemo.serve.http.settings import ServerSettings
from comemo.serve.work import Engine

_log = logging.getLogger("comemo.serve")
_CODES = {404: "not_found", 405: "method_not_allowed"}


@dataclass
class _Run:
    """A request while it is answered, for the log and the metrics."""

    namespace: str
    start: float = field(default_factory=time.perf_counter)
    completion: Completion | None = None
    question: str = ""


def make_app(
    engine: Engine, reader: PromptReader, config: Any, tokenizer: Any, settings: ServerSettings
) -> FastAPI:
    """An ASGI app in front of an engine. Closing the app does not close the engine.

    Args:
        engine: that answers.
        reader: of its prompts.
        config: of the model.
        tokenizer: of the checkpoint.
        settings: of the server.
    """
    threads = ThreadPoolExecutor(settings.readers, thread_name_prefix="comemo-read")
    pictures = PictureReader(config, settings, engine.holds)
    asking = Asking(engine, reader, pictures, tokenizer, settings, threads)
    server = _Server(engine, asking, pictures, config, reader.rope, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        threads.shutdown(wait=True, cancel_futures=True)

    app = FastAPI(
        title="comemo serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_api_route("/v1/chat/completions", server.complete, methods=["POST"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", server.model, methods=["GET"])
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.show_metrics, methods=["GET"])
    app.add_api_route("/comemo/picture", server.picture, methods=["POST"])
    app.include_router(page_router())
    app.add_exception_handler(HttpError, _tell)
    app.add_exception_handler(HTTPException, _tell_plain)
    app.add_exception_handler(Exception, _tell_fault)
    return app


class _Server:
    def __init__(
        self,
        engine: Engine,
        asking: Asking,
        pictures: PictureReader,
        config: Any,
        rope: str,
        settings: ServerSettings,
    ) -> None:
        self._engine, self._asking, self._pictures = engine, asking, pictures
        self._config, self._rope, self._settings = config, rope, settings
        self._metrics = Metrics(engine)
        self._created = int(time.time())
        self._at_work = 0

    async def complete(self, request: Request) -> Response:
        run = _Run(self._namespace(request))
        try:
            with self._one_more():
                end = time.monotonic() + self._settings.timeout_s
                asked, events, first = await self._begin(request, run, end)
                assert run.completion is not None
                if asked.form.stream:
                    self._at_work += 1  # until the stream ends
                    return EventStream(first, events, run.completion, end, self._closer(run))
                response = await until_gone(request.receive, self._whole(run, events, first))
            self._close(run, None)
            return response
        except HttpError as error:
            self._close(run, error)
            raise

    async def _begin(self, request: Request, run: _Run, end: float) -> tuple[Asked, Any, Any]:
        """Read a request, and await its first event: until then an error is a status."""
        body = await self._asking.body(request)
        asked = await self._asking.read(body, run.namespace, end)
        if self._settings.log_contents:
            run.question = asked.work.prompt.text
        run.completion = self._asking.completion(asked)
        events = self._asking.events(asked)
        try:
            first = await until_gone(request.receive, anext(events))
        except BaseException:
            await events.aclose()  # type: ignore[attr-defined]
            raise
        return asked, events, first

    async def _whole(self, run: _Run, events: Any, first: Any) -> Response:
        assert run.completion is not None
        try:
            run.completion.take(first)
            async for event in events:
                run.completion.take(event)
        finally:
            await events.aclose()
        return JSONResponse(run.completion.whole())

    async def models(self, request: Request) -> Response:
        self._namespace(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, name: str) -> Response:
        self._namespace(request)
        if name != self._settings.name:
            raise HttpError(404, f"there is no model {name!r:.80}", code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        facts = {"id": self._settings.name, "object": "model", "created": self._created}
        return facts | {"owned_by": "comemo"}

    async def health(self) -> Response:
        state = self._engine.state()
        counts = {name: getattr(state, name) for name in ("waiting", "reading", "answering")}
        body = {"status": "ok" if state.healthy else "unavailable", **counts}
        return JSONResponse(body, 200 if state.healthy else 503)

    async def show_metrics(self, request: Request) -> Response:
        self._namespace(request)
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def picture(self, request: Request) -> Response:
        """Tiles and position ids of a picture, for the page."""
        self._namespace(request)
        with self._one_more():
            item = parse_body(await self._asking.body(request))
            url = item.get("image")
            if not isinstance(url, str):
                raise bad("image must be a data: URL", "image")
            facts = await self._asking.in_thread(self._facts, url)
        return JSONResponse(facts)

    def _facts(self, url: str) -> dict[str, Any]:
        data = self._pictures.checked_bytes(url, "image")
        most = self._settings.max_tiles or self._config.max_dynamic_patch
        try:
            return picture_facts(data, self._config, most, self._rope)
        except (ValueError, OSError) as error:
            raise bad(str(error).partition(": ")[2] or "it cannot be read", "image") from None

    def _namespace(self, request: Request) -> str:
        header = request.headers.get("authorization", "")
        namespace = self._settings.namespace_of_header(header)
        if namespace is None:
            text = "an API key is needed: Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise HttpError(
                401, text, "authentication_error", code="invalid_api_key", headers=headers
            )
        return namespace

    @contextlib.contextmanager
    def _one_more(self) -> Any:
        most = self._settings.concurrent
        if self._at_work >= most:
            raise over_limit(429, "concurrent requests", most, f"{self._at_work + 1}")
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    def _closer(self, run: _Run) -> Any:
        def close(error: HttpError | None) -> None:
            self._at_work -= 1
            self._close(run, error)

        return close

    def _close(self, run: _Run, error: HttpError | None) -> None:
        """Count and log a request that has ended."""
        seconds = time.perf_counter() - run.start
        status = 200 if error is None else error.status
        self._metrics.requests.labels(str(status)).inc()
        self._metrics.whole.observe(seconds)
        facts: dict[str, Any] = {
            "event": "request",
            "status": status,
            "namespace": run.namespace,
            "total_s": round(seconds, 4),
        }
        done = run.completion
        if done is not None and done.begun is not None:
            begun = done.begun
            facts |= {
                "prompt_tokens": begun.prompt_tokens,
                "cached_tokens": begun.cached_tokens,
                "pictures": begun.pictures,
                "found_pictures": begun.found_pictures,
                "answer_tokens": done.tokens,
                "waited_s": round(begun.waited_s, 4),
                "finish": done.reasons,
            }
            self._metrics.waited.observe(begun.waited_s)
            if done.first_s:
                facts["first_s"] = round(done.first_s - run.start, 4)
                self._metrics.first.observe(done.first_s - run.start)
            if done.tokens > 1:
                each = (run.start + seconds - done.first_s) / (done.tokens - 1)
                self._metrics.per_token.observe(each)
            if self._settings.log_contents:
                facts |= {"prompt": run.question, "answers": done.texts}
        if error is not None:
            facts["error"] = error.code or error.kind
        _log.info(json.dumps(facts, ensure_ascii=False))


async def _tell(request: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _tell_plain(request: Request, error: Any) -> Response:
    known = HttpError(error.status_code, str(error.detail), code=_CODES.get(error.status_code))
    return JSONResponse(known.body(), known.status, error.headers)


async def _tell_fault(request: Request, error: Exception) -> Response:
    _log.error("a fault of the server", exc_info=error)
    known = HttpError(500, "a fault of the server", "server_error", code="internal")
    return JSONResponse(known.body(), 500)
