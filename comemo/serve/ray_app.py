"""The server on several machines, as an application of Ray Serve.

`build` is what a config file names; examples/serve/ray.yaml is one. The deployment "Engine" has the
replicas: each holds a model and the app of `comemo serve`. The deployment "Front" takes the
requests, and sends each to a replica.
"""

import asyncio
import difflib
import logging
import os
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from comemo import nano
from comemo.serve.engine.settings import EngineSettings
from comemo.serve.http.errors import HttpError
from comemo.serve.http.settings import ServerSettings, find_keys
from comemo.serve.replicas.front import Front
from comemo.serve.replicas.order import order_replicas
from comemo.serve.replicas.questions import Forwarded
from comemo.serve.replicas.relay import ReplicaLost
from comemo.serve.replicas.running import WholeResponse, run_app, whole_response
from comemo.serve.start import Served, start_engine, warm_up

ONGOING = 32  # requests of a replica: 16 answers, and as many that wait
_ALL_S = 10.0  # until every replica has told its metrics
_LOST = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of Ray Serve that a config file describes.

    Args:
        args: "model", a directory that every node has, or "nano"; optional the other fields of
            `Served` by name, "server" and "engine" as objects with the fields of `ServerSettings`
            and `EngineSettings`; "api_keys", a file for `read_keys`; "threads" of the CPU for each
            replica.

    Raises:
        ValueError, OSError: a field that is not known or wrong; a file that cannot be read.
    """
    served, threads = read_args(args)
    deployment: Any = serve.deployment  # Ray declares that it returns a function
    router: dict[str, Any] = {"request_router_class": PictureRouter}  # Ray declares another type
    engines = deployment(
        EngineReplica,
        name="Engine",
        max_ongoing_requests=ONGOING,
        graceful_shutdown_timeout_s=60,
        health_check_period_s=5,
        request_router_config=RequestRouterConfig(**router),
    )
    front = deployment(FrontReplica, name="Front", max_ongoing_requests=1000)
    app: serve.Application = front.bind(engines.bind(served, threads), served.server)
    return app


def read_args(args: Mapping[str, Any]) -> tuple[Served, int | None]:
    """What to serve, and threads of the CPU; see `build`."""
    given = dict(args)
    threads, keys = given.pop("threads", None), find_keys(given.pop("api_keys", None))
    # Ray's queue is the one that is limited: a request that it has accepted must not be refused.
    limits = {"waiting_each": ONGOING, **(given.pop("engine", None) or {})}
    engine = _make(EngineSettings, "engine", limits)
    server = dict(given.pop("server", None) or {})
    if "keys" in server:
        raise ValueError("build: server must have no keys: give api_keys, a file")
    model = given.get("model")
    if not isinstance(model, str):
        raise ValueError(f"build: model must be a directory or 'nano', got {model!r}")
    own = model == "nano" and not os.path.isdir(model)
    given["model"] = str(nano.checkpoint()) if own else model
    server.setdefault("name", "comemo-nano" if own else Path(model).resolve().name or "comemo")
    if "fetch_hosts" in server:
        server["fetch_hosts"] = tuple(server["fetch_hosts"])
    settings = _make(ServerSettings, "server", {**server, "keys": keys})
    return _make(Served, "args", {**given, "server": settings, "engine": engine}), threads


def _make(kind: Any, name: str, given: Mapping[str, Any]) -> Any:
    known = [field.name for field in fields(kind)]
    for field in given:
        if field not in known:
            near = difflib.get_close_matches(field, known, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"build: {name} has no field {field!r}{hint}")
    return kind(**given)


class EngineReplica:
    """A model, its engine and its app, in a process of their own.

    Args:
        served: what and how.
        threads: of the CPU; None for those that Ray chose.
    """

    def __init__(self, served: Served, threads: int | None) -> None:
        _log_to_ray()
        if threads is not None:
            torch.set_num_threads(threads)
        self._ready = start_engine(served)
        warm_up(self._ready)
        self._app = self._ready.app(served.server)
        self._name = serve.get_replica_context().replica_id.unique_id

    async def answer(
        self, request: Forwarded, picture: str | None, avoid: tuple[str, ...]
    ) -> AsyncIterator[list[Message]]:
        """The messages with which the app answers. The other arguments are for `PictureRouter`."""
        async with aclosing(run_app(self._app, request, self._name)) as parts:
            async for messages in parts:
                yield messages

    async def whole(self, request: Forwarded) -> WholeResponse:
        """The whole response of the app."""
        return await whole_response(self._app, request, self._name)

    async def check_health(self) -> None:
        """Ray replaces a replica whose app says that it is not healthy."""
        path = {"path": "/health", "raw_path": b"/health", "root_path": "", "query_string": b""}
        scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http"}
        response = await self.whole(Forwarded({**scope, **path, "headers": []}, b""))
        if response.status != 200:
            raise RuntimeError(f"/health: {response.status} {response.body.decode()}")

    def __del__(self) -> None:
        """Ray has waited for the requests, and sends no more."""
        if hasattr(self, "_ready"):
            self._ready.engine.close(0)


class FrontReplica:
    """Takes requests for the replicas.

    Args:
        engines: handle of their deployment.
        settings: of the server.
    """

    def __init__(self, engines: Any, settings: ServerSettings) -> None:
        _log_to_ray()
        self._engines = engines
        self._front = Front(self._ask, self._ask_all, settings)

    async def __call__(self, request: Request) -> Response:
        """A response that the front sends."""
        return _Sent(self._front)

    async def _ask(
        self, request: Forwarded, picture: str | None, avoid: tuple[str, ...]
    ) -> AsyncGenerator[Message, None]:
        handle = self._engines.options(stream=True, method_name="answer")
        answer = handle.remote(request, picture=picture, avoid=avoid)
        done = False
        try:
            async for messages in answer:
                for message in messages:
                    yield message
            done = True
        except _LOST as error:
            raise ReplicaLost(type(error).__name__) from error
        except BackPressureError:
            raise _refusal(429, "too many requests wait", "rate_limit_error") from None
        except DeploymentUnavailableError:
            raise _refusal(503, "there is no replica") from None
        finally:
            if not done:
                answer.cancel()

    async def _ask_all(self, request: Forwarded) -> Sequence[WholeResponse]:
        answers = self._engines.broadcast("whole", request)
        found = await answers.results_async(timeout_s=_ALL_S, return_exceptions=True)
        responses = [one for one in found if isinstance(one, WholeResponse)]
        if not responses:
            raise _refusal(503, "there is no replica")
        return responses


class _Sent(Response):
    """A response that an app sends."""

    def __init__(self, app: Front) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class PictureRouter(RequestRouter):
    """Sends requests about one picture to one replica, and others to the idlest: `order_replicas`.

    A replica that has `max_ongoing_requests` accepts no more, and the next one is asked. Loads are
    counted here: what Ray remembers of the lengths of queues is late by a burst of requests.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loads: Counter[str] = Counter()  # requests that this router has sent
        self._lock = Lock()  # requests complete in any thread

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Groups of one replica, in the order in which they are asked."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # when all are full
        await asyncio.sleep(0)  # requests that were just given a replica are sent, and counted
        asked = pending_request.kwargs
        names = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        with self._lock:
            self._loads = Counter({name: self._loads[name] for name in names})
            loads = dict(self._loads)
        order = order_replicas(list(names), asked.get("picture"), loads, asked.get("avoid", ()))
        return [[names[name]] for name in order]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Count a request that is sent."""
        super().on_send_request(replica_id)
        with self._lock:
            self._loads[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count a request that has ended, in whatever way."""
        super().on_request_completed(replica_id, internal_request_id)
        with self._lock:
            self._loads[replica_id.unique_id] = max(self._loads[replica_id.unique_id] - 1, 0)


def _refusal(status: int, reason: str, kind: str = "server_error") -> HttpError:
    headers = {"Retry-After": "1"}
    return HttpError(status, f"{reason}: try again later", kind, code="busy", headers=headers)


def _log_to_ray() -> None:
    """The log of the server, whose lines are JSON, to the log of this process, which Ray keeps."""
    logger = logging.getLogger("comemo.serve")
    logger.handlers, logger.propagate = [logging.StreamHandler(sys.stderr)], False
    logger.setLevel(logging.INFO)
