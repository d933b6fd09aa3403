"""The entry point: Ctrl-C at any moment of the imports is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

INTERRUPTED = """
import signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, {handler})
import icsd_command
sys.argv = ["icsd", "--version"]
sys.exit(icsd_command.main())
"""


def run(name, handler="signal.default_int_handler"):
    program = INTERRUPTED.format(name=name, handler=handler)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["icsd", "numpy.linalg", "torch._C", "jsonargparse"])
def test_ctrl_c_during_the_imports_is_one_line(name):
    ended = run(name)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "icsd: interrupted\n")


def test_a_signal_that_the_shell_ignores_stays_ignored():
    ended = run("icsd.cli.parser", handler="signal.SIG_IGN")
    assert ended.returncode == 0
    assert ended.stdout.startswith("icsd ")
