"""Runs the tests of a folder in a process of their own, with other environment variables.

Some settings are read when a module is imported, such as TRITON_INTERPRET. The conftest.py of such a folder has:

    process = OwnProcess(__file__, TRITON_INTERPRET="1")
    pytest_runtest_protocol, pytest_sessionfinish = process.run_test, process.stop

Then its tests are reported as usual, each with its own name and traceback, but run in one child process, which loads
this module as a plugin.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import pytest

CHANNEL = "ICSD_TEST_CHANNEL"  # the file descriptor by which a child talks to its parent


class OwnProcess:
    """The child process of a folder. It starts when the first of its tests runs.

    Args:
        conftest: The path of the conftest.py of the folder. pytest calls the hooks there for the tests of all folders.
        variables: The environment variables of the child.
    """

    def __init__(self, conftest: str, **variables: str) -> None:
        self.folder = Path(conftest).parent
        self.variables = variables
        self.process: subprocess.Popen | None = None

    def run_test(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Run a test of the folder in the child. In the child itself, leave it to pytest."""
        if CHANNEL in os.environ or self.folder not in item.path.parents:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item, nextitem):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def stop(self) -> None:
        """End the child."""
        if self.process is not None:
            self.channel.close()
            self.process.kill()
            self.process.wait()
            self.output.close()
            self.process = None

    def _reports(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[pytest.TestReport]:
        try:
            if self.process is None:
                self._start(item.config)
            self.channel.send((item.nodeid, nextitem and nextitem.nodeid))
            while (data := self.channel.recv()) is not None:
                yield item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        except (EOFError, OSError, pytest.fail.Exception) as error:  # it died, or the time is up
            self.output.seek(0)
            message = f"the process of this test ended: {error!r}\n{self.output.read()[-4000:]}"
            self.stop()
            yield pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")

    def _start(self, config: pytest.Config) -> None:
        self.channel, theirs = Pipe()
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- it stays open as long as the child
        channel = {CHANNEL: str(theirs.fileno()), "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "own_process", "-p", "no:cacheprovider", "-n0", self.folder],
            cwd=config.rootpath,
            env=os.environ | self.variables | channel,
            pass_fds=[theirs.fileno()],
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        theirs.close()


class _Child:
    """The plugin of the child, which runs the tests that it is told to."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.channel = Connection(int(os.environ[CHANNEL]))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        while True:
            try:
                name, next_name = self.channel.recv()
            except EOFError:
                return True
            items[name].ihook.pytest_runtest_protocol(item=items[name], nextitem=items.get(next_name))
            self.channel.send(None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.channel.send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin of the child in the child."""
    if CHANNEL in os.environ:
        config.pluginmanager.register(_Child(config))
