import pytest
from layouts import pack

from icsd.data import oxford as module
from icsd.data.files import Files
from icsd.data.oxford import read_oxford
from icsd.errors import InputError


@pytest.fixture(autouse=True)
def known(published, monkeypatch):
    """Replace the counts of the real set by those of the drawn set."""
    names = published[1]["oxford"]
    counts = {split: (len(names[split]), len({name.split("/")[0] for name in names[split]})) for split in names}
    monkeypatch.setattr(module, "KNOWN", counts)
    return names


def read(*paths):
    return read_oxford(Files(paths))


@pytest.mark.parametrize("packed", [False, True])
def test_archives_and_folders(oxford, tmp_path, known, packed):
    paths = [oxford]
    if packed:
        paths = [
            pack(oxford / "jpg", tmp_path / "102flowers.tgz"),
            pack(oxford / "cvpr2016_flowers", tmp_path / "cvpr2016_flowers.tar"),
        ]
    listing = read(*paths)
    assert listing.problems == listing.notes == []
    for split in ("train", "test"):
        found = {record.name.removesuffix(".jpg") for record in listing.records if record.split == split}
        assert found == set(known[split])
    for record in listing.records:
        assert len(record.captions) == 10
        assert record.box is None
        assert record.class_name == record.name.split("/")[0]


def test_the_counts_of_the_real_set(oxford, monkeypatch):
    monkeypatch.undo()
    assert sum(images for images, _ in module.KNOWN.values()) == 8189
    assert [classes for _, classes in module.KNOWN.values()] == [82, 20]
    assert len(read(oxford).problems) == 2


def test_missing_images_and_captions(oxford, known):
    first, second = known["train"][:2]
    (oxford / "jpg" / f"{first.split('/')[1]}.jpg").unlink()
    (oxford / "cvpr2016_flowers" / "text_c10" / f"{second}.txt").unlink()
    problems = read(oxford).problems
    assert f"1 of 39 images have no captions, such as {second.split('/')[1]}" in problems
    assert f"1 of 39 images have no image, such as {first.split('/')[1]}" in problems


def test_an_image_in_two_classes_is_refused(oxford, known):
    name = known["train"][0].split("/")[1]
    other = oxford / "cvpr2016_flowers" / "text_c10" / "class_00001" / f"{name}.txt"
    if known["train"][0].startswith("class_00001"):
        other = other.parent.with_name("class_00002") / other.name
    other.parent.mkdir(exist_ok=True)
    other.write_text("a flower\n")
    with pytest.raises(InputError, match=f"{name} is in class_0000"):
        read(oxford)


def test_files_given_twice_are_refused(oxford, tmp_path):
    with pytest.raises(InputError, match="are the same image; give one of the two"):
        read(oxford, pack(oxford / "jpg", tmp_path / "102flowers.tgz"))


def test_missing_image_archive_is_named(oxford):
    with pytest.raises(InputError, match=r"hold no image_00001\.jpg; give 102flowers\.tgz"):
        read(oxford / "cvpr2016_flowers")
