"""Run an app until it is asked to end, and then finish or refuse what is under way."""

import asyncio
import logging
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from comemo.serve.work import Engine

_log = logging.getLogger("comemo.serve")
_AFTER = 5  # seconds for the last bytes of what the engine has ended


class _Server(uvicorn.Server):
    """A server that closes its engine when it is asked to end."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_s: float) -> None:
        super().__init__(config)
        self._engine, self._grace_s = engine, grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        closing = loop.run_in_executor(None, self._engine.close, self._grace_s)
        await super().shutdown(sockets)
        await closing


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that its port is known before anybody is told.

    Args:
        host: name or address.
        port: 0 for a free one.

    Raises:
        OSError: the address is not there, or is used.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(1024)
    except OSError:
        found.close()
        raise
    return found


def run_app(
    app: FastAPI,
    engine: Engine,
    sock: socket.socket,
    grace_s: float,
    started: Callable[[], None] = lambda: None,
    stoppable: Callable[[Callable[[], None]], None] = lambda stop: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Then nothing new is accepted, what is under way is finished
    within the grace, and the rest is told that the server shuts down. A second Ctrl-C ends at once.

    Args:
        app: to serve.
        engine: to close at the end.
        sock: that listens.
        grace_s: seconds.
        started: called when requests are accepted.
        stoppable: called before, with what ends the server like SIGTERM, from any thread.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(grace_s) + _AFTER,
        timeout_keep_alive=30,
    )
    server = _Server(config, engine, grace_s)

    def stop() -> None:
        server.should_exit = True

    stoppable(stop)

    async def serve() -> None:
        task = asyncio.ensure_future(server.serve(sockets=[sock]))
        while not (server.started or task.done()):
            await asyncio.sleep(0.01)
        if server.started:
            started()
        await task

    try:
        asyncio.run(serve())
    finally:
        engine.close(0)
