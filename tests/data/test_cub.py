import pytest
from layouts import CUB, pack, python2_pickle

from icsd.data import cub as module
from icsd.data.cub import read_cub
from icsd.data.files import Files
from icsd.errors import InputError


@pytest.fixture(autouse=True)
def known(published, monkeypatch):
    """Replace the counts of the real set by those of the drawn set."""
    names = published[1]["cub"]
    counts = {split: (len(names[split]), len({name.split("/")[0] for name in names[split]})) for split in names}
    monkeypatch.setattr(module, "KNOWN", counts)
    return names


def read(*paths):
    return read_cub(Files(paths))


def edit(file, change):
    file.write_text("\n".join(change(file.read_text().split("\n"))))


def names(listing, split):
    return {record.name.removesuffix(".jpg") for record in listing.records if record.split == split}


@pytest.mark.parametrize("captions", ["birds", "cvpr2016_cub"])
@pytest.mark.parametrize("suffix", ["", ".tgz", ".zip"])
def test_archives_and_folders(cub, tmp_path, known, captions, suffix):
    paths = [cub / CUB, cub / captions]
    if suffix:
        paths = [pack(path, tmp_path / f"{path.name}{suffix}") for path in paths]
    listing = read(*paths)
    assert listing.problems == listing.notes == []
    for split in ("train", "test"):
        assert names(listing, split) == set(known[split])
    for record in listing.records:
        assert len(record.captions) == 10
        assert record.class_name == record.name.split("/")[0]
        assert record.box[2:] == (48, 48)
    assert (listing.vocabulary is None) == (captions != "birds")


def test_the_folder_of_attngan(cub, known):
    (cub / CUB).rename(cub / "birds" / CUB)
    listing = read(cub / "birds")
    assert not listing.problems
    assert names(listing, "test") == set(known["test"])


def test_captions_packed_in_the_archive(cub, tmp_path, known):
    pack(cub / "birds" / "text", cub / "birds" / "text.zip")
    (cub / "birds" / "text").rename(tmp_path / "elsewhere")
    listing = read(cub / CUB, pack(cub / "birds", tmp_path / "birds.zip"))
    assert not listing.problems
    assert names(listing, "train") == set(known["train"])


def test_the_vocabulary_keeps_the_order_of_its_file(cub):
    words = read(cub / CUB, cub / "birds").vocabulary.words
    assert words == sorted(words, reverse=True), "as the drawn file has it, and unlike one built from the captions"


def test_words_that_the_vocabulary_lacks_are_noted(cub, known):
    (cub / "birds" / "text" / f"{known['test'][0]}.txt").write_text("a plaid bird\n" * 10)
    (note,) = read(cub / CUB, cub / "birds").notes
    assert "1 words of captions are not in" in note
    assert "plaid" in note


@pytest.mark.parametrize("text", ["a red bird", "a red bird\n\n  \n", "a red bird\r\n...\r\n", "\ufeffa red bird\n"])
def test_files_without_final_newline_or_with_empty_lines(cub, known, text):
    name = known["train"][0]
    (cub / "cvpr2016_cub" / "text_c10" / f"{name}.txt").write_bytes(text.encode())
    listing = read(cub / CUB, cub / "cvpr2016_cub")
    assert [record.captions for record in listing.records if record.name == f"{name}.jpg"] == [["a red bird"]]
    assert listing.notes == ["1 of 40 images have fewer than 10 captions; all are kept"]
    assert not listing.problems


@pytest.mark.parametrize(
    ("text", "caption"), [("ein süßer Vogel", "ein süßer Vogel"), (b"a red\xff\xfe bird", "a red bird")]
)
def test_captions_beyond_ascii(cub, known, text, caption):
    file = cub / "cvpr2016_cub" / "text_c10" / f"{known['train'][0]}.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    listing = read(cub / CUB, cub / "cvpr2016_cub")
    assert caption in [record.captions[0] for record in listing.records]


@pytest.mark.parametrize("text", [None, "", "\n \n", "...\n"])
def test_missing_captions_are_counted(cub, known, text):
    file = cub / "cvpr2016_cub" / "text_c10" / f"{known['train'][0]}.txt"
    file.unlink() if text is None else file.write_text(text)
    listing = read(cub / CUB, cub / "cvpr2016_cub")
    assert "1 of 40 images have no captions" in listing.problems[0]
    assert known["train"][0] in listing.problems[0]
    assert f"the train split has {len(known['train']) - 1} images" in listing.problems[1]
    assert known["train"][0] not in names(listing, "train")


def test_counts_of_the_real_set_are_checked(cub, monkeypatch):
    monkeypatch.undo()
    listing = read(cub / CUB, cub / "birds")
    assert [problem.partition(", ")[2] for problem in listing.problems] == [
        "the set is known for 8,855 of 150",
        "the set is known for 2,933 of 50",
    ]


def test_missing_images_and_boxes(cub, known):
    (cub / CUB / "images" / f"{known['test'][0]}.jpg").unlink()
    edit(cub / CUB / "bounding_boxes.txt", lambda lines: lines[1:])
    listing = read(cub / CUB, cub / "birds")
    assert len(listing.problems) == 4, "image, box, and the counts of both splits"
    assert f"{known['test'][0]}.jpg" in listing.problems[0]
    assert "bounding_boxes.txt has no box of 1 of 40 images, such as number 1" in listing.problems[1]
    assert len(listing.records) == sum(map(len, known.values())) - 2


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("images.txt", lambda lines: [*lines, lines[0]], "holds the id 1 a second time"),
        ("images.txt", lambda lines: [*lines, f"999 {lines[0].split()[1]}"], "2 times"),
        ("images.txt", lambda lines: [*lines, "999"], "must hold 2 values"),
        ("images.txt", lambda lines: [lines[0] + " more", *lines[1:]], "line 1, must hold 2 values"),
        ("bounding_boxes.txt", lambda lines: ["1 0 0 9"], "line 1, must hold 5 values"),
        ("bounding_boxes.txt", lambda lines: ["1 0 0 9 x"], "has .0 0 9 x. where image 1 needs a box"),
        ("bounding_boxes.txt", lambda lines: ["1 0 0 9 0.0"], "where image 1 needs a box"),
        ("bounding_boxes.txt", lambda lines: ["1 0 0 nan inf"], "where image 1 needs a box"),
        ("bounding_boxes.txt", lambda lines: [*lines[:-2], lines[0]], "holds the id 1 a second time"),
    ],
)
def test_contradictions_are_refused(cub, file, change, complaint):
    edit(cub / CUB / file, change)
    with pytest.raises(InputError, match=complaint) as caught:
        read(cub / CUB, cub / "birds")
    assert file in str(caught.value)


def test_paths_that_lead_out_of_the_folder_are_not_followed(cub, tmp_path):
    (tmp_path / "cub" / "secret.jpg").write_text("secret")
    edit(cub / CUB / "images.txt", lambda lines: ["1 ../../secret.jpg", *lines[1:]])
    listing = read(cub / CUB, cub / "birds")
    assert "1 of 40 images are missing" in listing.problems[0]
    assert not any("secret" in record.name for record in listing.records)


def test_empty_lines_in_tables_are_skipped(cub):
    for file in ("images.txt", "bounding_boxes.txt"):
        edit(cub / CUB / file, lambda lines: ["", *lines, "", " "])
    assert not read(cub / CUB, cub / "birds").problems


@pytest.mark.parametrize("given", [["birds"], ["cvpr2016_cub"]])
def test_missing_image_archive_is_named(cub, given):
    with pytest.raises(InputError, match=r"hold no images\.txt; give CUB_200_2011\.tgz"):
        read(*(cub / name for name in given))


def test_missing_splits_are_named(cub):
    with pytest.raises(InputError, match="do not list both train and test classes"):
        read(cub / CUB, cub / "birds" / "text")
    (cub / "cvpr2016_cub" / "testclasses.txt").write_text("\n")
    with pytest.raises(InputError, match="do not list both train and test classes"):
        read(cub / CUB, cub / "cvpr2016_cub")


def test_train_and_validation_classes_may_be_two_lists(cub, known):
    root = cub / "cvpr2016_cub"
    classes = (root / "trainvalclasses.txt").read_text().split()
    (root / "trainvalclasses.txt").unlink()
    (root / "trainclasses.txt").write_text("\r\n".join(classes[:7]))
    (root / "valclasses.txt").write_text("\n\n".join(classes[7:]))
    assert names(read(cub / CUB, root), "train") == set(known["train"])


@pytest.mark.parametrize("part", ["lists", "text_c10"])
def test_classes_are_matched_by_number(cub, known, part):
    """Reed's archive has other names for some classes: 009.Brewers_Blackbird for 009.Brewer_Blackbird."""
    root = cub / "cvpr2016_cub"
    if part == "lists":
        for file in root.glob("*classes.txt"):
            edit(file, lambda lines: [f"{line}s" for line in lines])
    else:
        for folder in (root / "text_c10").iterdir():
            folder.rename(f"{folder}s")
    listing = read(cub / CUB, root)
    assert not listing.problems
    assert names(listing, "test") == set(known["test"])
    assert {record.class_name for record in listing.records if record.split == "test"} == {
        name.split("/")[0] for name in known["test"]
    }


def test_classes_of_both_splits_are_refused(cub, known):
    common = known["test"][0].split("/")[0]
    edit(cub / "cvpr2016_cub" / "trainvalclasses.txt", lambda lines: [*lines, common])
    with pytest.raises(InputError, match=f"puts {common} into"):
        read(cub / CUB, cub / "cvpr2016_cub")
    (cub / "birds" / "train" / "filenames.pickle").write_bytes(python2_pickle(known["train"] + known["test"][:1]))
    with pytest.raises(InputError, match=f"puts {common} into"):
        read(cub / CUB, cub / "birds")


def test_classes_of_no_split_are_left_out(cub, known):
    edit(cub / "cvpr2016_cub" / "trainvalclasses.txt", lambda lines: lines[1:])
    listing = read(cub / CUB, cub / "cvpr2016_cub")
    assert "is in no split" in listing.problems[0]
    assert len(names(listing, "train")) < len(known["train"])


def test_files_given_twice_are_refused(cub, tmp_path):
    with pytest.raises(InputError, match="captions of the same image; give one of the two"):
        read(cub / CUB, cub / "birds", cub / "cvpr2016_cub")
    with pytest.raises(InputError, match="are the same kind of file"):
        read(cub / CUB, cub / "birds", pack(cub / CUB, tmp_path / "again.zip"))
