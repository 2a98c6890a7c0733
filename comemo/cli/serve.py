"""`comemo serve`: an OpenAI-compatible server with a page to look at."""

import argparse
import contextlib
import importlib.util
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from comemo.cli.arguments import NANO, find_checkpoint
from comemo.cli.info import read_config
from comemo.cli.terminal import is_watched, note, plain, tell
from comemo.serve.engine.settings import EngineSettings
from comemo.serve.http.settings import ServerSettings, find_keys
from comemo.serve.start import Served, start_engine, warm_up

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
_BYTES = 2**30


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit status.

    Raises:
        ValueError, OSError: a checkpoint, file or option that is wrong; missing packages; a port
            that is used.
    """
    start = time.perf_counter()
    check_packages()
    directory = find_checkpoint(args.model)
    served = read_served(args, directory)
    read_config(directory)
    from comemo.serve.http.run import listen, run_app  # needs packages of the extra

    try:
        sock = listen(args.host, args.port)
    except OSError as error:
        where = f"{args.host}:{args.port}"
        raise ValueError(f"{where} cannot be listened on: {error.strerror or error}") from None
    with sock:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        log_to(sys.stderr)
        ready = start_engine(served)
        try:
            warm_up(ready)
            host, port = sock.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            sizes = ready.engine.sizes
            if is_watched(args.verbose):
                note(
                    f"{plain(directory)}: on {ready.model.device} in {ready.model.dtype},"
                    f" {sizes.keys:,} tokens and {sizes.pictures:,} image tokens in"
                    f" {sizes.nbytes / _BYTES:.2f} GiB"
                )
                if not served.server.keys and host not in ("127.0.0.1", "::1"):
                    note("comemo: warning: without API keys everybody shares what is shown")

            def started() -> None:
                seconds = time.perf_counter() - start
                tell(f"{plain(served.server.name)} on http://{shown}:{port} after {seconds:.1f} s")
                sys.stdout.flush()

            # The server ends by SIGTERM in order, and then raises it again.
            with _handled(signal.SIGTERM):
                run_app(ready.app(served.server), ready.engine, sock, args.grace, started)
        finally:
            ready.engine.close(0)
    return 0


@contextlib.contextmanager
def _handled(number: int) -> Iterator[None]:
    """A signal that ends nothing by itself."""
    before = signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(number, before)


def read_served(args: argparse.Namespace, directory: str) -> Served:
    """What the arguments ask for.

    Raises:
        ValueError, OSError: a file of keys that is wrong, or options that exclude each other.
    """
    if args.store_budget is not None and args.store is None:
        raise ValueError("--store-budget needs --store DIR")
    name = args.name or (
        f"comemo-{NANO}" if args.model == NANO else Path(directory).resolve().name or "comemo"
    )
    server = ServerSettings(
        name=name,
        keys=find_keys(args.api_keys),
        body_bytes=int(args.body * 2**20),
        pixels=args.pixels,
        images=args.images,
        concurrent=args.concurrent,
        timeout_s=args.timeout,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        max_tiles=args.max_tiles,
        fetch_hosts=tuple(host.lower() for host in args.fetch),
        log_contents=args.log_contents,
    )
    engine = EngineSettings(
        memory=None if args.memory is None else args.memory * _BYTES,
        answers=args.answers,
        waiting=args.waiting,
        waiting_each=args.waiting_each,
        stall_s=args.stall,
        longest=args.longest,
    )
    return Served(
        directory,
        server,
        engine,
        args.device,
        args.dtype,
        args.rope,
        args.visibility,
        args.store,
        None if args.store_budget is None else args.store_budget * 1e9,
        args.quantize,
    )


def check_packages() -> None:
    """Refuse to start without the packages of the extra "serve".

    Raises:
        ValueError: names them.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(PACKAGES[name] for name in missing)
        raise ValueError(f"comemo serve needs {names}: pip install 'comemo-kernels[serve]'")


class _Lines(logging.Formatter):
    """A JSON object in each line."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        head = {"time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        text = record.getMessage()
        facts: Any = json.loads(text) if text.startswith("{") else {"message": text}
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return json.dumps(head | facts, ensure_ascii=False)


def log_to(stream: Any) -> None:
    """Write the log of the server, and of uvicorn what is worth a warning, to a stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines())
    for name, level in (("comemo.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
