import pytest
import torch
from torch.utils.data import DataLoader

from icsd.data import CaptionedImages, DataConfig, open_dataset
from icsd.errors import InputError


def make(split, **options):
    images = torch.arange(8 * 3 * 4 * 4, dtype=torch.uint8).reshape(8, 3, 4, 4)
    captions = [[f"caption {choice} of {index}" for choice in range(5)] for index in range(8)]
    return CaptionedImages("made", split, images, captions, list(range(8)), **options)


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
    assert torch.equal(item["image"], dataset.images[2] / 127.5 - 1)
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
    "config",
    [DataConfig(root="somewhere"), *(DataConfig(name=name) for name in ("folder", "webdataset", "cub", "oxford"))],
)
def test_root_is_required_for_stored_sets_only(config):
    with pytest.raises(InputError, match=r"data\.root"):
        open_dataset(config, "train", 8)


def coordinates(height, width):
    """Make an image whose first two channels are each pixel's row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, columns]).byte()


def test_training_images_are_cut_at_random_and_others_in_the_middle():
    images = [coordinates(8, 12)] * 8
    corners = {}
    for split in ("train", "test"):
        dataset = CaptionedImages("made", split, images, [["a"]] * 8, [0] * 8, resolution=5)
        crops = [dataset[0]["image"] for _ in range(400)]
        assert {image.shape for image in crops} == {(3, 5, 5)}
        corners[split] = {tuple(image.add(1).mul(127.5).round()[:2, 0, 0].int().tolist()) for image in crops}
    assert corners["test"] == {(1, 3)}
    assert corners["train"] == {(top, left) for top in range(4) for left in range(8)}


@pytest.mark.parametrize("margin", [0.0, 0.1875])
def test_margin(margin):
    config = DataConfig(name="procedural-flowers", size=24, margin=margin)
    dataset = open_dataset(config, "train", 64)
    assert dataset.images.shape[-1] == {0.0: 64, 0.1875: 76}[margin]
    assert dataset[0]["image"].shape == (3, 64, 64)


@pytest.mark.parametrize("margin", [-0.1, 1.5, float("nan")])
def test_margin_is_checked(margin):
    with pytest.raises(InputError, match=r"data\.margin"):
        DataConfig(margin=margin)
