"""A plugin of pytest that appends failures and the number of tests to a file of JSON lines: `--record FILE`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import records


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--record", type=Path, help="the file of JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    """Register the recorder, in the process that sees all reports."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.getoption("record")))


class Recorder:
    """Appends a record for each test that failed and one with the counts, also where the run is interrupted."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = (report.longreprtext or "").strip().splitlines()
            records.append(self.file, "failure", name=report.nodeid, detail=lines[-1] if lines else "")
        if report.failed or report.skipped or report.when == "call":
            self.counts[report.outcome] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        files = " ".join(session.config.args)
        records.append(self.file, "tests", files=files, collected=session.testscollected, **self.counts)
