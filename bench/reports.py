"""A pytest plugin that writes down what a run finds as it comes: `-p bench.reports --reports DIR`.

`collected`: how many tests there are. `tests.jsonl`: a line for each that ran or was skipped, and
for each file that could not be read: test, outcome, seconds, the error's message or the reason.
`errors-*.jsonl`, of each process that runs tests: a line for each comparison of the harness: file,
op, dtype, output, the share of its budget that the error takes, test. A run that is killed leaves
what it has written.

A worker of pytest-xdist whose GPU context a test has destroyed ends: in another the next tests are
what they are. Else it would fail them all, faster than the others could take them.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reports", help="folder for what tests find, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--reports")
    if folder is None:
        return
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker is None:  # alone, or what workers report to
        config.pluginmanager.register(Outcomes(Path(folder) / "tests.jsonl"))
    if worker is not None:
        config.pluginmanager.register(Health())
    if worker is not None or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Errors(Path(folder) / f"errors-{worker}.jsonl"))


class Outcomes:
    """Writes how each test ended."""

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
            # Of a file that cannot be read the last line is the error.
            text = crash.message if crash else str(report.longrepr).strip().rpartition("\n")[2]
            line["said"] = text.removeprefix("E ").strip()
        elif report.outcome == "skipped":
            told = report.longrepr
            line["said"] = told[2] if isinstance(told, tuple) else str(told)
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Health:
    """Ends a process that can do nothing more."""

    failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.outcome == "failed"

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        yield
        if self.failed and _is_lost():
            os._exit(1)  # what it has reported is sent; the test counts as one that crashed
        self.failed = False


def _is_lost() -> bool:
    """Whether every call of the GPU fails from now on."""
    import torch  # not where nothing but reports is done

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Errors:
    """Writes what the harness compares."""

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
