"""What all tests share."""

import shutil

import pytest
import torch
from layouts import write_cub, write_oxford

# Unless a test sets more: on a busy machine, the threads of small operations wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Drawn sets as the real ones are published, not to be changed; and the names of their images."""
    root = tmp_path_factory.mktemp("published")
    return root, {"cub": write_cub(root / "cub"), "oxford": write_oxford(root / "oxford")}


@pytest.fixture
def cub(published, tmp_path):
    """A copy of the drawn CUB-200-2011, to be changed."""
    return shutil.copytree(published[0] / "cub", tmp_path / "cub")


@pytest.fixture
def oxford(published, tmp_path):
    """A copy of the drawn Oxford-102, to be changed."""
    return shutil.copytree(published[0] / "oxford", tmp_path / "oxford")
