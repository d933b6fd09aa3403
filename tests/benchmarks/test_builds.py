"""Two checkouts are compared in processes that take turns."""

from pathlib import Path

import pytest

from benchmarks import builds

ROOT = Path(__file__).parents[2]


def test_a_checkout_is_compared_with_itself(capsys):
    few = ["--shapes", "4x16", "--losses", "kl", "--turns", "2", "--seconds", "0.01", "--threads", "1"]
    assert builds.main([str(ROOT), str(ROOT), *few]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[-3:] == ["new", "/", "old"]
    assert row.split()[:3] == ["4x16", "float32", "kl"]


def test_the_order_alternates(monkeypatch):
    order = []
    monkeypatch.setattr(builds, "_time", lambda command, checkout: order.append(checkout) or {"median": 1.0, "isa": ""})
    assert builds.main(["old", "new", "--shapes", "4x16", "--losses", "mse", "--turns", "3"]) == 2  # neither is built
    options = builds._parser().parse_args(["old", "new", "--turns", "3"])
    assert len(list(builds._pairs(options, "4x16", "float32", "mse"))) == 3
    assert [path.name for path in order] == ["old", "new", "new", "old", "old", "new"]


def test_another_package_than_the_checkout_is_an_error(tmp_path):
    command = ["python3", "-c", 'print(\'{"median": 1, "isa": "", "icsd": "/elsewhere/icsd/__init__.py"}\')']
    with pytest.raises(RuntimeError, match="was to be timed"):
        builds._time(command, tmp_path)
