import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from icsd.data import CaptionedImages, DataConfig, open_dataset
from icsd.data.dataset import to_picture
from icsd.errors import InputError


def make(split, **options):
    pictures = torch.arange(8 * 3 * 4 * 4, dtype=torch.uint8).reshape(8, 3, 4, 4)
    captions = [[f"caption {choice} of {index}" for choice in range(5)] for index in range(8)]
    return CaptionedImages("made", split, pictures, captions, list(range(8)), **options)


def batches(dataset, workers):
    torch.manual_seed(3)
    return [
        (batch["image"], batch["caption"], batch["index"].tolist())
        for batch in DataLoader(dataset, 3, shuffle=True, num_workers=workers)
    ]


def test_items():
    dataset = make("test")
    item = dataset[2]
    assert item["image"].dtype == torch.float32
    assert item["image"].shape == (3, 4, 4)
    assert torch.equal(item["image"], dataset.pictures[2] / 127.5 - 1)
    assert (item["caption"], item["class_id"], item["index"]) == ("caption 0 of 2", 2, 2)


def test_test_split_is_fixed_and_train_split_draws():
    assert {make("test", flip=True)[0]["caption"] for _ in range(20)} == {"caption 0 of 0"}
    assert len({make("test", flip=True)[0]["image"][0, 0, 0].item() for _ in range(20)}) == 1
    assert len({make("train")[0]["caption"] for _ in range(60)}) == 5
    assert len({make("train", flip=True)[0]["image"][0, 0, 0].item() for _ in range(40)}) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_is_deterministic_under_torch_seeds(workers):
    dataset = make("train", flip=True)
    once, again = batches(dataset, workers), batches(dataset, workers)
    for (image, captions, order), (image_again, captions_again, order_again) in zip(once, again, strict=True):
        assert torch.equal(image, image_again)
        assert captions == captions_again
        assert order == order_again
    assert isinstance(once[0][1], list)
    assert sorted(index for batch in once for index in batch[2]) == list(range(8))


@pytest.mark.parametrize(
    ("mode", "colour"),
    [("RGB", (255, 0, 0)), ("L", 76), ("CMYK", (0, 255, 255, 0)), ("P", (255, 0, 0)), ("LA", (76, 255)), ("1", 1)],
)
def test_every_mode_becomes_rgb(mode, colour):
    image = Image.new("RGB", (6, 6), colour).convert("P") if mode == "P" else Image.new(mode, (6, 6), colour)
    picture = to_picture(image, 4)
    assert picture.shape == (3, 4, 4)
    assert picture.dtype == torch.uint8
    expected = {"RGB": (255, 0, 0), "CMYK": (255, 0, 0), "P": (255, 0, 0), "1": (255, 255, 255)}.get(mode, (76, 76, 76))
    assert picture[:, 1, 1].tolist() == list(expected)


def test_sixteen_bits_are_scaled_not_clipped():
    image = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert to_picture(image, 4).unique().tolist() == [0x80]


@pytest.mark.parametrize("mode", ["RGBA", "PA", "P"])
def test_transparency_lies_on_white(mode):
    image = Image.new("RGBA", (6, 6), (200, 0, 0, 0))
    image.putpixel((3, 3), (200, 0, 0, 255))
    if mode == "P":
        image = Image.new("P", (6, 6), 7)
        image.info["transparency"] = 7
    picture = to_picture(image.convert("PA") if mode == "PA" else image, 6)
    assert picture[:, 0, 0].tolist() == [255, 255, 255]


def test_orientation_is_applied():
    image = Image.new("RGB", (4, 4), "white")
    image.putpixel((0, 0), (0, 0, 0))
    image.getexif()[0x0112] = 6  # turn by 90 degrees clockwise: the top left corner goes to the top right
    assert to_picture(image, 4)[0, 0].tolist() == [255, 255, 255, 0]


def test_the_middle_square_is_kept():
    image = Image.new("RGB", (12, 4), "black")
    image.paste((255, 255, 255), (4, 0, 8, 4))
    assert to_picture(image, 4).min() == 255


@pytest.mark.parametrize("config", [DataConfig(root="somewhere"), DataConfig(name="folder")])
def test_root_goes_with_folders_only(config):
    with pytest.raises(InputError, match=r"data\.root"):
        open_dataset(config, "train", 8)
