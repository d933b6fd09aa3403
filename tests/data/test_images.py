import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from icsd.data.files import Files
from icsd.data.images import image_to_tensor, open_images
from icsd.errors import InputError


@pytest.mark.parametrize(
    ("mode", "color"),
    [("RGB", (255, 0, 0)), ("L", 76), ("CMYK", (0, 255, 255, 0)), ("P", (255, 0, 0)), ("LA", (76, 255)), ("1", 1)],
)
def test_every_mode_becomes_rgb(mode, color):
    image = Image.new("RGB", (6, 6), color).convert("P") if mode == "P" else Image.new(mode, (6, 6), color)
    image = image_to_tensor(image, 4)
    assert image.shape == (3, 4, 4)
    assert image.dtype == torch.uint8
    expected = {"RGB": (255, 0, 0), "CMYK": (255, 0, 0), "P": (255, 0, 0), "1": (255, 255, 255)}.get(mode, (76, 76, 76))
    assert image[:, 1, 1].tolist() == list(expected)


def test_sixteen_bits_are_scaled_not_clipped():
    image = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert image_to_tensor(image, 4).unique().tolist() == [0x80]


@pytest.mark.parametrize("mode", ["RGBA", "PA", "P"])
def test_transparent_parts_become_white(mode):
    image = Image.new("RGBA", (6, 6), (200, 0, 0, 0))
    image.putpixel((3, 3), (200, 0, 0, 255))
    if mode == "P":
        image = Image.new("P", (6, 6), 7)
        image.info["transparency"] = 7
    image = image_to_tensor(image.convert("PA") if mode == "PA" else image, 6)
    assert image[:, 0, 0].tolist() == [255, 255, 255]


def test_orientation_is_applied():
    image = Image.new("RGB", (4, 4), "white")
    image.putpixel((0, 0), (0, 0, 0))
    image.getexif()[0x0112] = 6  # turn by 90 degrees clockwise: the top left corner goes to the top right
    assert image_to_tensor(image, 4)[0, 0].tolist() == [255, 255, 255, 0]


def test_the_middle_square_is_kept():
    image = Image.new("RGB", (12, 4), "black")
    image.paste((255, 255, 255), (4, 0, 8, 4))
    assert image_to_tensor(image, 4).min() == 255


def test_the_whole_image_on_demand():
    image = image_to_tensor(Image.new("RGB", (90, 60)), 40, square=False)
    assert image.shape == (3, 40, 60)


@pytest.fixture
def shard(tmp_path):
    """Write two images to a tar file and to its folder."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for place, name in enumerate(("b.png", "c.jpg")):
            Image.new("RGB", (300, 200), (200 * place, 40, 0)).save(tmp_path / name)
            tar.add(tmp_path / name, name)
    return tmp_path


def test_images_in_a_tar_equal_loose_files(shard):
    found = {}
    for source in (shard, shard / "a.tar"):
        files = Files([source])
        sources = [file for file in files.all if not file.name.endswith(".tar")]
        images = open_images(files, sources, 16, square=False)
        assert not isinstance(images, torch.Tensor)
        assert [images[index].shape for index in range(len(images))] == [(3, 16, 24)] * 2
        found[source] = torch.stack([images[index] for index in range(len(images))])
        assert torch.equal(open_images(files, sources, 16, square=True), found[source][..., 4:20])
    assert torch.equal(*found.values())


def test_a_broken_image_in_a_tar_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("b.jpg")
        member.size = 9
        tar.addfile(member, io.BytesIO(b"not a jpg"))
    files = Files([tmp_path / "a.tar"])
    for square in (True, False):
        with pytest.raises(InputError, match=r"a\.tar/b\.jpg cannot be read as an image"):
            open_images(files, files.all, 8, square)
