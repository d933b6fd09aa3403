import io
import struct
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import icsd.data.images
from icsd.data import DataConfig, open_dataset
from icsd.data.files import Files
from icsd.data.images import image_to_tensor, limit_aspect, open_image, open_images
from icsd.data.limits import Limits
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


def open_gray(kind, value):
    """Open a 4 x 4 gray image of one value, in a file of its kind: a PGM or a TIFF that Pillow has a mode for."""
    pixels = np.full((4, 4), value, kind)
    if kind == ">u2":
        return open_image(io.BytesIO(b"P5 4 4 65535\n" + pixels.tobytes()), Limits())
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF")
    return open_image(file, Limits())


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [(">u2", 0x8000, 0x80), (">u2", 200, 0), ("i4", 0x8000, 0x80), ("i4", 0xFFFF, 0xFF), ("i4", 200, 200)],
)
def test_integers_are_scaled_not_clipped(kind, value, expected):
    assert image_to_tensor(open_gray(kind, value), 4).unique().tolist() == [expected]


def test_sixteen_bits_of_one_transparent_value():
    pixels = np.array([[0, 0xFFFF], [0x8000, 0x8001]], np.uint16).repeat(2, 0).repeat(2, 1)
    image = Image.fromarray(pixels)
    image.info["transparency"] = 0x8000
    assert image_to_tensor(image, 4)[0, ::2, ::2].tolist() == [[0, 255], [255, 0x80]]


def test_the_order_of_bytes_does_not_matter():
    image = Image.frombytes("I;16B", (4, 4), b"\x80\x01" * 16)
    assert image_to_tensor(image, 4).unique().tolist() == [0x80]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("i4", 70000, "has pixels from 70000 to 70000"),
        ("i4", -1, "from -1 to -1"),
        ("f4", 0.5, "floating-point pixels"),
    ],
)
def test_pixels_of_an_unknown_scale_are_refused(kind, value, message):
    with pytest.raises(InputError, match=f"{message}, whose scale is not known; convert it to 8 or 16 bits"):
        image_to_tensor(open_gray(kind, value), 4)


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


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_broken_exif_data_are_ignored(kind):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, kind, exif=b"Exif\0\0broken data", lossless=True)
    assert image_to_tensor(Image.open(file), 4)[:, 0, 0].tolist() == [255, 0, 0]


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


def icc_profile(kind, matrix, gamma):
    """Write a color profile: primaries (columns of a matrix to XYZ), a gamma, and what the format asks for."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    xyz = [b"XYZ " + bytes(4) + fixed(*column) for column in np.asarray(matrix).T]
    name = b"made for a test\0"
    text = b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78)
    white = b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)
    tags = {b"desc": text + bytes(-len(text) % 4), b"wtpt": white, b"cprt": b"text" + bytes(4) + b"none\0\0\0\0"}
    if kind == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), xyz, strict=True)) | dict.fromkeys(
            (b"rTRC", b"gTRC", b"bTRC"), curve
        )
    offset, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", offset + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s12x4s", offset + len(data), b"test", 0x02400000, b"mntr", kind, b"XYZ ", b"acsp")
    head += bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return head + bytes(128 - len(head)) + table + data


# These matrices lead to XYZ under D50, from the primaries of Display P3 and of sRGB.
P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def to_srgb(color, matrix, gamma):
    """Convert a color of a profile to sRGB by the formula."""
    linear = np.linalg.solve(SRGB, np.asarray(matrix) @ (np.asarray(color) / 255) ** gamma).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("color", [(200, 100, 50), (60, 180, 90), (128, 128, 128), (30, 40, 200)])
@pytest.mark.parametrize(("matrix", "gamma"), [(P3, 2.2), (SRGB, 1.0), (P3[:, ::-1], 1.8)])
def test_color_profiles_are_converted_to_srgb(color, matrix, gamma):
    profile = icc_profile(b"RGB ", matrix, gamma)
    for form in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        image = image_to_tensor(saved(Image.new("RGB", (6, 6), color), form, icc_profile=profile, **options), 4)
        assert np.abs(image[:, 1, 1].numpy() - to_srgb(color, matrix, gamma)).max() < 2.5


def test_color_profiles_of_gray_and_transparent_images():
    gray = icc_profile(b"GRAY", P3, 1.0)
    rgb = icc_profile(b"RGB ", P3, 1.0)
    expected = to_srgb((100, 100, 100), SRGB, 1.0)[0]
    for mode, color, profile in (("L", 100, gray), ("LA", (100, 255), gray), ("RGBA", (100, 100, 100, 255), rgb)):
        image = image_to_tensor(saved(Image.new(mode, (6, 6), color), "PNG", icc_profile=profile), 4)
        assert abs(float(image[0, 1, 1]) - expected) < 2.5, mode
    palette = saved(Image.new("RGB", (6, 6), (100, 100, 100)).convert("P"), "PNG", icc_profile=rgb)
    assert abs(float(image_to_tensor(palette, 4)[0, 1, 1]) - to_srgb((102, 102, 102), SRGB, 1.0)[0]) < 2.5


@pytest.mark.parametrize("profile", [b"", b"broken", bytes(200), icc_profile(b"GRAY", P3, 1.0), "sRGB"])
def test_profiles_that_change_nothing(profile):
    """Those of sRGB, broken ones, and those of another mode."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() if profile == "sRGB" else profile
    image = saved(Image.new("RGB", (6, 6), (200, 100, 50)), "PNG", icc_profile=data)
    assert image_to_tensor(image, 4)[:, 1, 1].tolist() == [200, 100, 50]


@pytest.mark.parametrize("size", [(12, 4), (4, 12), (3000, 1), (1, 500), (7, 7)])
def test_padding_shows_the_whole_image_on_white(size):
    image = image_to_tensor(Image.new("RGB", size, (10, 20, 30)), 24, fit="pad")
    assert image.shape == (3, 24, 24)
    shown = (image == torch.tensor([10, 20, 30]).view(3, 1, 1)).all(0)
    width, height = size
    long = max(min(width, 16 * height), min(height, 16 * width))
    expected = [max(round(24 * min(side, 16 * min(size)) / long), 1) for side in (width, height)]
    assert [int(shown.any(0).sum()), int(shown.any(1).sum())] == expected
    assert (image[:, ~shown] == 255).all()


@pytest.mark.parametrize(
    ("size", "expected"), [((6000, 1), (16, 1)), ((1, 900), (1, 16)), ((320, 20), (320, 20)), ((65, 4), (64, 4))]
)
def test_only_the_middle_of_thin_images_is_used(size, expected):
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), ((size[0] - expected[0]) // 2, (size[1] - expected[1]) // 2, *(10**6,) * 2))
    middle = limit_aspect(image)
    assert middle.size == expected
    assert middle.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(6000, 1), (1, 6000), (3000, 2), (100_000, 3)])
def test_thin_images_take_little_time_and_memory(tmp_path, size):
    for name in ("a", "b"):
        Image.new("RGB", size, (9, 8, 7)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a line")
    since = time.process_time()
    dataset = open_dataset(DataConfig(name="folder", root=tmp_path, margin=0.1875), "train", 256)
    assert max(dataset.images[0].shape) <= 16 * 304
    assert dataset[0]["image"].shape == (3, 256, 256)
    assert time.process_time() - since < 2


@pytest.mark.parametrize("memory", [0, 2**30])
def test_images_with_too_many_pixels_name_the_option(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(icsd.data.images, "_MEMORY", memory)
    for name in ("a", "b"):
        Image.new("RGB", (100, 90)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a line")
    config = DataConfig(name="folder", root=tmp_path, limits=Limits(max_pixels=8999))
    with pytest.raises(InputError, match=r"[ab]\.png has 100 x 90 pixels, more than max_pixels=8999 allows; raise"):
        open_dataset(config, "train", 8)
    config.limits = Limits(max_pixels=9000)
    open_dataset(config, "train", 8)
    assert Image.MAX_IMAGE_PIXELS, "Pillow's own limit is as before"
