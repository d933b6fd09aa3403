"""The rules of CONTRIBUTING.md that a program can check: who may import whom, and what native code may include."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RULES = (ROOT / "CONTRIBUTING.md").read_text()


def folders(heading: str) -> list[str]:
    """Return the names in the first column of the table below a heading of CONTRIBUTING.md, from the top."""
    table = RULES.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [
        name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    ]


PACKAGES = [
    name.removeprefix("icsd/").removesuffix(".py") for name in folders("The layers") if name.startswith("icsd/")
]
NATIVE = [name.removeprefix("csrc/") for name in folders("The layers") if name.startswith("csrc/")]


def imported_packages(path: Path) -> set[str]:
    """Return the parts of `icsd` that a module imports, such as "ops" for `from icsd.ops import registry`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "icsd":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("icsd."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("icsd.")}
    return found & set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_stands_above_them(package):
    place = ROOT / "icsd" / package
    allowed = {package, *PACKAGES[: PACKAGES.index(package)]}
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        assert imported_packages(path) <= allowed, f"{path.relative_to(ROOT)} imports from below it"


def test_every_package_has_a_place_in_the_table():
    names = {path.stem for path in (ROOT / "icsd").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names - {"__init__"} == set(PACKAGES)


@pytest.mark.parametrize("folder", NATIVE)
def test_native_code_includes_only_what_stands_above_it(folder):
    allowed = {folder, "core"} | ({"cpu", "cuda"} if folder == "binding" else set())
    for path in sorted((ROOT / "csrc" / folder).rglob("*")):
        if path.is_file():
            included = re.findall(r'#include "(\w+)/', path.read_text())
            assert set(included) <= allowed, f"{path.relative_to(ROOT)} includes from a folder beside or below it"
            headers = re.findall(r'#include [<"](torch|ATen|c10)/', path.read_text())
            assert not headers, f"{path.relative_to(ROOT)} includes a torch header"


def test_importing_the_operator_loads_no_library_for_training():
    script = "import sys, torch; before = set(sys.modules); import icsd; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert not {"jsonargparse", "yaml", "PIL", "tqdm", "safetensors", "tensorboard", "triton"} & loaded


def test_one_file_of_the_operator_uses_private_interfaces_of_torch():
    files = sorted((ROOT / "icsd" / "ops").rglob("*.py"))
    found = [path.name for path in files if re.search(r"\btorch\._(?!_)", path.read_text())]
    assert found == ["library.py"]
