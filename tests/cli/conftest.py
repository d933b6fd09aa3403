import sys

import pytest

from icsd.cli.main import main

TINY = """
data: {name: procedural-flowers, size: 24}
text: {dim: 8, embedding_dim: 8}
generator: {resolutions: [8, 16], width: 4, noise_dim: 4, condition_dim: 4}
discriminator: {width: 4}
batch_size: 4
threads: 1
log_every: 1
evaluate: false
"""


@pytest.fixture
def program():
    """Return the beginning of a command line that runs the command in a process of its own."""
    return [sys.executable, "-c", "import sys; from icsd.cli.main import main; sys.exit(main())"]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder, with a small configuration in tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture
def icsd(capsys):
    """Run a command; returns its exit code, standard output and standard error."""

    def run(*arguments):
        try:
            code = main(list(arguments))
        except SystemExit as end:  # --help and --version end the process
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def fails(icsd):
    """Run a command that must fail on its input; returns the message."""

    def run(*arguments):
        code, out, err = icsd(*arguments)
        assert code == 2, err
        assert out == ""
        assert err.startswith("icsd: error: ")
        return err.removeprefix("icsd: error: ").rstrip("\n")

    return run
