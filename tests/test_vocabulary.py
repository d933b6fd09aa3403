"""The glossary of CONTRIBUTING.md: one word for one thing. The words that it replaced do not come back."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("*.py", "*.pyi", "*.cpp", "*.cu", "*.cuh", "*.h", "*.md", "*.yaml", "*.toml", "Makefile")
# Captions and emoji names are data; the other files name old keys, or the replaced words themselves.
EXEMPT = {
    "icsd/data/emoji.py",
    "icsd/data/procedural.py",
    "icsd/training/renamed.py",
    "tests/cli/test_train_command.py",
    "tests/test_vocabulary.py",
    "tests/training/test_checkpoint.py",
}

REPLACED = {
    "paint": "generate",
    "picture": "image",
    "judge": "discriminator, or to evaluate",
    "scene": "micro-batch",
    "rehears": "dry run",
    "divergences": "loss",
    "make_divergence": "make_loss",
    "optimis": "optimiz",
    "normalis": "normaliz",
    "tokenis": "tokeniz",
    "initialis": "initializ",
    "synchronis": "synchroniz",
    "colour": "color",
    "centre": "center",
    "behaviour": "behavior",
    "neighbour": "neighbor",
    "labelled": "labeled",
}


def tracked_files() -> list[str]:
    command = ["git", "-c", "safe.directory=*", "ls-files", *SOURCES]  # the files may be another user's
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [name for name in listed.stdout.splitlines() if name not in EXEMPT and (ROOT / name).exists()]


@pytest.mark.parametrize("word", REPLACED)
def test_replaced_word_does_not_return(word):
    found = []
    for name in tracked_files():
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            if re.search(word, line, re.IGNORECASE):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found, f"write {REPLACED[word]!r} instead of {word!r} in\n" + "\n".join(found)


def test_a_figure_is_a_plot():
    found = []
    for name in tracked_files():
        text = (ROOT / name).read_text()
        if name.startswith("icsd/") and "matplotlib" not in text and re.search("(?<!con)figure", text, re.IGNORECASE):
            found.append(name)
    assert not found, f"write 'metric' for a number that an evaluation measures, in {', '.join(found)}"


def test_the_check_reads_the_sources():
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, which lists the files")
    names = tracked_files()
    assert {"README.md", "icsd/__init__.py", "csrc/binding/module.cpp"} <= set(names)


FRAGMENT = re.compile(r"(What|Whether|How|Of|As|Their|Whose|Where|So many|Likewise|Never|Not|To) ")


def docstring_starts(text: str) -> list[str]:
    """Return the first words of docstrings, of attribute docstrings, and of descriptions of arguments."""
    return re.findall(r'^\s*(?:"""|\w+: )([^\n]*)', text, re.MULTILINE)


def comment_starts(text: str) -> list[str]:
    """Return the first words of C++ comments on lines of their own that follow no other comment."""
    return re.findall(r"(?:^|\n)(?!\s*//)[^\n]*\n\s*// ([^\n]*)", text)


def test_docstrings_and_comments_are_sentences():
    found = []
    for name in tracked_files():
        text = (ROOT / name).read_text()
        starts = docstring_starts(text) if name.endswith((".py", ".pyi")) else []
        starts += re.findall(r"(?:^|\n)(?!\s*#)[^\n]*\n\s*# ([^\n]*)", text) if name.endswith(".py") else []
        if name.startswith(("csrc/", "tests/")) and not name.endswith((".py", ".md")):
            starts = comment_starts(text)
        found += [f"{name}: {start}" for start in starts if FRAGMENT.match(start)]
    assert not found, "give these a subject:\n" + "\n".join(found)
