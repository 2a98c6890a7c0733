"""A pytest plugin that writes outcomes as they come: `-p bench.reports --reports DIR`.

`collected`: the number of tests. `tests.jsonl`: a line for each test that ran or was skipped, and
for each file that could not be imported: test, outcome, seconds, the error's message or the reason.
`errors-*.jsonl`, one per process: a line for each comparison of the harness: file, op, dtype,
output, the error's share of its budget, test. Lines are complete if the run is killed.

A worker of pytest-xdist exits if a test has destroyed its GPU context; a new one runs the next
tests. Otherwise it would fail all remaining tests, faster than other workers could run them.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reports", help="folder for outcomes and errors, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--reports")
    if folder is None:
        return
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker is None:  # the only process, or the controller of the workers
        config.pluginmanager.register(Outcomes(Path(folder) / "tests.jsonl"))
    if worker is not None:
        config.pluginmanager.register(Health())
    if worker is not None or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Errors(Path(folder) / f"errors-{worker}.jsonl"))


class Outcomes:
    """Writes the outcome of each test."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._count(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._count(len(ids))

    def _count(self, tests: int) -> None:
        self.file.with_name("collected").write_text(f"{tests}\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._write(report, 0.0)

    def _write(self, report: Any, seconds: float) -> None:
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 3)}
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            # Without a crash entry, as for a failed import, the last line is the error.
            text = crash.message if crash else str(report.longrepr).strip().rpartition("\n")[2]
            line["message"] = text.removeprefix("E ").strip()
        elif report.outcome == "skipped":
            skip = report.longrepr
            line["message"] = skip[2] if isinstance(skip, tuple) else str(skip)
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Health:
    """Exits a worker that has lost its GPU."""

    failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.outcome == "failed"

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        yield
        if self.failed and _is_lost():
            os._exit(1)  # reports are sent already; xdist counts the test as crashed
        self.failed = False


def _is_lost() -> bool:
    """Whether the CUDA context is destroyed: every further call fails."""
    import torch  # here: the controller needs no torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Errors:
    """Writes the comparisons of the harness."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_sessionstart(self) -> None:
        from bench import harness

        harness.observers.append(self.observe)

    def observe(self, op: str, dtype: Any, output: str, share: float) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        name = Path(test.split("::")[0]).stem.removeprefix("test_")
        line = {"file": name, "op": op, "dtype": str(dtype).removeprefix("torch.")}
        with self.file.open("a") as file:
            file.write(json.dumps(line | {"output": output, "share": share, "test": test}) + "\n")
