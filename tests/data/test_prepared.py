import io
import json
import pickle
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from layouts import CUB, pack
from PIL import Image

from icsd.data import DataConfig, open_dataset
from icsd.data.files import Files
from icsd.data.prepared import crop_to_box, write_prepared
from icsd.data.sources import list_set
from icsd.data.splits import with_splits
from icsd.errors import InputError
from icsd.models import DiscriminatorConfig, GeneratorConfig, TextConfig
from icsd.sampling import Sampler
from icsd.training.config import TrainConfig
from icsd.training.train import train


def prepare(name, paths, out, **options):
    files, listing = list_set(name, paths)
    listing.records = with_splits(listing.records, 0.1, 0)
    write_prepared(name, listing, files, out, **options)
    return listing


def written(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.fixture
def birds(cub, tmp_path):
    """A prepared set, and its listing."""
    return tmp_path / "birds", prepare("cub", [cub / CUB, cub / "birds"], tmp_path / "birds", workers=2)


def test_nothing_is_lost(birds, published):
    root, listing = birds
    names = published[1]["cub"]
    for split in ("train", "test"):
        dataset = open_dataset(DataConfig(name="cub", root=root), split, 16)
        assert dataset.name == "cub"
        records = [record for record in listing.records if record.split == split]
        assert {tuple(captions) for captions in dataset.captions} == {tuple(record.captions) for record in records}
        assert dataset.vocabulary.words == listing.vocabulary.words
        assert len(set(dataset.class_ids)) == len({name.split("/")[0] for name in names[split]})
        assert pickle.loads((root / split / "filenames.pickle").read_bytes()) == [r.name[:-4] for r in records]
    other = open_dataset(DataConfig(name="cub", root=root), "train", 16)
    assert not set(dataset.class_ids) & set(other.class_ids), "classes are counted over both splits"
    about = json.loads((root / "set.json").read_text())
    assert {split: about["splits"][split]["images"] for split in names} == {k: len(v) for k, v in names.items()}
    assert len(written(root)) == sum(map(len, names.values())) + 7


def test_pickles_equal_those_of_attngan(birds, cub):
    root, _ = birds
    theirs, ours = (pickle.loads((path / "captions.pickle").read_bytes()) for path in (cub / "birds", root))
    assert ours[2:] == theirs[2:]
    for split, captions, expected in zip(("train", "test"), ours, theirs, strict=False):
        order = pickle.loads((cub / "birds" / split / "filenames.pickle").read_bytes())
        for place, name in enumerate(pickle.loads((root / split / "filenames.pickle").read_bytes())):
            there = order.index(name)
            assert captions[10 * place : 10 * place + 10] == expected[10 * there : 10 * there + 10]


def test_images_are_cropped_to_their_boxes(birds, cub):
    root, listing = birds
    assert len({record.box[0] for record in listing.records}) > 5
    for record in listing.records:
        left, top, *_ = record.box
        with Image.open(cub / CUB / "images" / record.name) as image:
            window = (max(0, left - 12), max(0, top - 12), min(image.width, left + 60), min(image.height, top + 60))
            expected = np.asarray(image.convert("RGB").crop(window)).astype(int)
        with Image.open(root / "images" / record.name) as image:
            assert np.abs(np.asarray(image).astype(int) - expected).mean() < 4, "but for a second JPEG"


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((20, 20, 40, 20), (60, 60)),
        ((0, 0, 40, 40), (50, 50)),
        ((80, 30, 20, 10), (25, 30)),
        ((0, 0, 100, 80), (100, 80)),
    ],
)
def test_boxes_at_the_border_are_cut_there(box, size):
    assert crop_to_box(Image.new("RGB", (100, 80)), box).size == size


@pytest.mark.parametrize("box", [(300, 10, 20, 20), (10, -90, 20, 20), (10, 10, 0.4, 0.4)])
def test_boxes_outside_are_refused(box):
    with pytest.raises(ValueError, match="lies outside"):
        crop_to_box(Image.new("RGB", (100, 80)), box)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_every_kind_of_jpeg_becomes_rgb(cub, tmp_path, published, mode):
    name = published[1]["cub"]["train"][0]
    Image.new("RGB", (90, 80), (180, 180, 180)).convert(mode).save(cub / CUB / "images" / f"{name}.jpg")
    prepare("cub", [cub / CUB, cub / "birds"], tmp_path / "out")
    with Image.open(tmp_path / "out" / "images" / f"{name}.jpg") as image:
        assert image.mode == "RGB"
        assert all(abs(value - 180) < 4 for value in image.getpixel((5, 5)))


def test_large_images_are_reduced_and_small_ones_kept(oxford, tmp_path, published):
    first, second = published[1]["oxford"]["train"][:2]
    Image.new("RGB", (900, 1200), (90, 30, 200)).save(oxford / "jpg" / f"{first.split('/')[1]}.jpg")
    prepare("oxford", [oxford], tmp_path / "out", size=100)
    sizes = []
    for name in (first, second):
        with Image.open(tmp_path / "out" / "images" / f"{name}.jpg") as image:
            sizes.append(image.size)
    assert sizes == [(100, 133), (72, 56)]


@pytest.mark.parametrize("partial", [False, True])
def test_unreadable_images(cub, tmp_path, published, partial):
    name = published[1]["cub"]["train"][3]
    file = cub / CUB / "images" / f"{name}.jpg"
    file.write_bytes(file.read_bytes()[:400])
    before = sorted(tmp_path.iterdir())
    if not partial:
        with pytest.raises(InputError, match=f"{name}.jpg cannot be read as an image"):
            prepare("cub", [cub / CUB, cub / "birds"], tmp_path / "out", workers=2)
        assert sorted(tmp_path.iterdir()) == before
        return
    files, listing = list_set("cub", [cub / CUB, cub / "birds"])
    prepared = write_prepared("cub", listing, files, tmp_path / "out", partial=True, workers=2)
    about = json.loads((tmp_path / "out" / "set.json").read_text())
    (line,) = prepared.left_out
    assert name in line
    assert about["problems"][-1] == line
    assert name not in pickle.loads((tmp_path / "out" / "train" / "filenames.pickle").read_bytes())
    assert (
        len(open_dataset(DataConfig(name="cub", root=tmp_path / "out"), "train", 8))
        == about["splits"]["train"]["images"]
    )


def test_the_number_of_workers_changes_nothing(cub, tmp_path):
    for workers in (1, 4):
        prepare("cub", [cub / CUB, cub / "birds"], tmp_path / f"out{workers}", workers=workers)
    one, four = (
        {name: (tmp_path / folder / name).read_bytes() for name in written(tmp_path / folder)}
        for folder in ("out1", "out4")
    )
    assert one == four


def test_a_full_disk_leaves_nothing(cub, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    script = f"""
import signal
from icsd.data.sources import list_set
from icsd.data.splits import with_splits
from icsd.data.prepared import write_prepared
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
files, listing = list_set("cub", [{str(cub / CUB)!r}, {str(cub / "birds")!r}])
write_prepared("cub", listing, files, {str(tmp_path / "out")!r})
"""
    before = sorted(tmp_path.iterdir())
    ended = subprocess.run(
        [sys.executable, "-c", script], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert "OSError: [Errno 27] File too large" in ended.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_overwritten(birds):
    root, listing = birds
    before = written(root)
    with pytest.raises(InputError, match="not an empty folder"):
        write_prepared("cub", listing, Files([]), root)
    assert written(root) == before


def test_two_images_with_the_same_name(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.txt").write_text("b\n")
    with pytest.raises(InputError, match=r"a\.png would become one file"):
        prepare("folder", [tmp_path], tmp_path / "out")


@pytest.mark.parametrize("packed", [False, True])
def test_a_prepared_folder_of_own_images(tmp_path, packed):
    photos = tmp_path / "photos"
    photos.mkdir()
    for place in range(4):
        Image.new("RGB", (30, 20), (60 * place, 0, 0)).save(photos / f"{place}.png")
    rows = [
        {"file": f"{place}.png", "caption": f"number {place}", "split": "train" if place else "test"}
        for place in range(4)
    ]
    (photos / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prepare("folder", [pack(photos, tmp_path / "photos.zip") if packed else photos], tmp_path / "out")
    for source in (photos, tmp_path / "out"):
        dataset = open_dataset(DataConfig(name="folder", root=source), "test", 8)
        assert dataset.captions == [["number 0"]]
        assert dataset.vocabulary is None


@pytest.mark.parametrize("content", [None, "{}", "[]", "{", '{"set": "oxford", "format": 1, "vocabulary": null}'])
def test_other_folders_are_refused(birds, content):
    root, _ = birds
    (root / "set.json").unlink()
    if content is not None:
        (root / "set.json").write_text(content)
    with pytest.raises(InputError, match="make one with `icsd data prepare cub"):
        open_dataset(DataConfig(name="cub", root=root), "train", 8)


@pytest.mark.parametrize("name", ["cub", "oxford"])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_prepared_set(published, tmp_path, name, workers):
    download = {"cub": [CUB, "birds"], "oxford": ["jpg", "cvpr2016_flowers"]}[name]
    listing = prepare(name, [published[0] / name / part for part in download], tmp_path / "set")
    config = TrainConfig(
        data=DataConfig(name=name, root=tmp_path / "set", margin=0.1875, flip=True),
        text=TextConfig(dim=8, embedding_dim=8),
        generator=GeneratorConfig(resolutions=[8, 16], width=4, noise_dim=4, condition_dim=4),
        discriminator=DiscriminatorConfig(width=4),
        output=tmp_path / "runs",
        steps=2,
        batch_size=4,
        workers=workers,
        evaluate=False,
    )
    folder = train(config)
    assert folder == tmp_path / "runs" / name
    vocabulary = Sampler.load(folder).model.text_encoder.tokenizer.vocabulary
    if name == "cub":
        assert vocabulary.words == listing.vocabulary.words, "that of captions.pickle travels with the checkpoint"


def _png():
    encoded = io.BytesIO()
    Image.effect_noise((40, 30), 90).save(encoded, "PNG")
    return encoded.getvalue()


def photos(root, names):
    root.mkdir()
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (9, 9, 9)).save(path, "PNG")
        path.with_suffix(".txt").write_text("a bird")
    return root


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["a.png", "a.jpg", "b.png"], "would become one file"),
        (["deep/a.png", "deep/a.b.png", "deep/a.bmp"], "would become one file"),
        (["x.jpg/b.png", "x.png", "c.png"], "would become a file, and a folder"),
        (["e" * 251 + ".png", "b.png"], None),
        ([], "has a name of more than 255 bytes"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_dry_run_refuses_names_as_the_real_run_does(tmp_path, names, complaint, dry_run):
    if names:
        source = photos(tmp_path / "photos", names)
    else:  # an archive may hold names that no folder can
        source = tmp_path / "photos.zip"
        with zipfile.ZipFile(source, "w") as out:
            for name in ("é" * 130, "b"):
                out.writestr(f"{name}.png", _png())
                out.writestr(f"{name}.txt", "a bird")
    files, listing = list_set("folder", [source])
    listing.records = with_splits(listing.records, 0.1, 0)
    if complaint is None:
        write_prepared("folder", listing, files, tmp_path / "out", dry_run=dry_run)
    else:
        with pytest.raises(InputError, match=complaint):
            write_prepared("folder", listing, files, tmp_path / "out", dry_run=dry_run)
    assert (tmp_path / "out").exists() == (complaint is None and not dry_run)


@pytest.mark.parametrize("broken", [b"", b"not an image", _png()[:300], _png()[:-200], b"%!PS-Adobe"], ids=range(5))
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_dry_run_decodes_every_image(tmp_path, broken, partial, workers):
    source = photos(tmp_path / "photos", ["a.png", "b.png", "c.png", "test/d.png"])
    (source / "c.png").write_bytes(broken)
    results = []
    for dry_run in (True, False):
        files, listing = list_set("folder", [source])
        listing.records = with_splits(listing.records, 0.1, 0)
        options = {"partial": partial, "workers": workers, "dry_run": dry_run}
        if partial:
            results.append(write_prepared("folder", listing, files, tmp_path / "out", **options))
        else:
            with pytest.raises(InputError, match=r"c\.png cannot be read as an image"):
                write_prepared("folder", listing, files, tmp_path / "out", **options)
    if partial:
        assert results[0] == results[1]
        assert results[0].size == sum(path.stat().st_size for path in (tmp_path / "out" / "images").rglob("*.jpg"))
        assert len(results[0].left_out) == 1


def test_nothing_is_written_if_partial_leaves_a_split_empty(tmp_path):
    source = photos(tmp_path / "photos", ["train/a.png", "test/b.png"])
    (source / "test" / "b.png").write_bytes(b"")
    files, listing = list_set("folder", [source])
    with pytest.raises(InputError, match=r"nothing is left of the test split.*b\.png"):
        write_prepared("folder", listing, files, tmp_path / "out", partial=True)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("size", [(6000, 1), (1, 100_000), (70_000, 70)])
def test_thin_images_are_cut_to_their_middle(tmp_path, size):
    source = photos(tmp_path / "photos", ["a.png", "b.png"])
    Image.new("RGB", size).save(source / "a.png")
    prepare("folder", [source], tmp_path / "out", size=64)
    with Image.open(tmp_path / "out" / "images" / "a.jpg") as image:
        assert max(image.size) <= 16 * min(image.size)


def test_an_unreadable_file_in_a_zip_is_left_out_alone(tmp_path):
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for name in "abc":
            out.writestr(f"{name}.txt", "a bird")
            out.writestr(f"{name}.png", _png() + name.encode() * 40)
    archive.write_bytes(archive.read_bytes().replace(b"b" * 40, b"x" * 40))
    files, listing = list_set("folder", [archive])
    listing.records = with_splits(listing.records, 0.1, 0)
    (line,) = write_prepared("folder", listing, files, tmp_path / "out", partial=True).left_out
    assert "Bad CRC-32 for file 'b.png'" in line
