import os
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
from layouts import pack
from PIL import Image

from icsd.data import DataConfig, open_dataset
from icsd.data.files import Files
from icsd.data.folder import read_folder
from icsd.data.images import open_images
from icsd.errors import InputError


def photo(path, caption="a bird", form="PNG", mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 20)).save(path, form)
    if caption:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def root(tmp_path):
    """A folder with two captioned images."""
    for name in ("a.png", "b.png"):
        photo(tmp_path / "photos" / name)
    return tmp_path / "photos"


def names(root):
    return [record.name for record in read_folder(Files([root])).records]


@pytest.mark.parametrize(
    ("name", "form", "mode"),
    [
        ("x.jfif", "JPEG", "RGB"),
        ("x.jpe", "JPEG", "RGB"),
        ("x.tif", "TIFF", "RGB"),
        ("x.TIFF", "TIFF", "CMYK"),
        ("x.apng", "PNG", "RGBA"),
        ("x.avif", "AVIF", "RGB"),
        ("x.jp2", "JPEG2000", "RGB"),
        ("x.ppm", "PPM", "RGB"),
        ("x.tga", "TGA", "RGB"),
        ("x.ico", "ICO", "RGB"),
        ("x.qoi", "QOI", "RGB"),
        ("x.dds", "DDS", "RGB"),
    ],
)
def test_every_suffix_that_pillow_reads(root, name, form, mode):
    photo(root / name, form=form, mode=mode)
    assert names(root) == ["a.png", "b.png", name]
    for split in ("train", "test"):
        open_dataset(DataConfig(name="folder", root=root), split, 8)


def test_a_suffix_does_not_choose_a_decoder_that_starts_programs(root):
    """Pillow would hand PostScript to Ghostscript, whatever the file is called."""
    (root / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    (root / "x.txt").write_text("a page")
    with pytest.raises(InputError, match=r"x\.png cannot be read as an image"):
        open_dataset(DataConfig(name="folder", root=root, test_fraction=0.01), "train", 8)


@pytest.mark.parametrize("name", ["g.heic", "g.svg", "g.CR2", "g.eps", "g.jxl"])
def test_images_of_other_formats_are_named(root, name):
    (root / name).write_bytes(b"something")
    (root / "g.txt").write_text("a bird")
    listing = read_folder(Files([root]))
    assert len(listing.records) == 2
    assert name in " ".join(listing.notes)
    assert "convert it to JPEG or PNG" in " ".join(listing.notes)


def test_texts_without_an_image_are_named(root):
    for name in ("h", "i", "j", "k"):
        (root / f"{name}.txt").write_text("the image was not copied")
    (root / "README.txt").write_text("my photos")
    (note, *others) = read_folder(Files([root])).notes
    assert "h.txt" in note
    assert "and 1 more text files" in note
    assert others == ["files that are neither images nor captions were not read: 1 .txt"]


@pytest.mark.parametrize("name", ["old.zip", "old.tar.gz", "old.7z", "captions.json", "metadata.xlsx"])
def test_archives_and_other_lists_are_named(root, name):
    (root / name).write_bytes(b"something")
    assert name in " ".join(read_folder(Files([root])).notes)


def test_other_files_are_counted(root):
    for name in ("a.xmp", "b.xmp", "Makefile"):
        (root / name).write_bytes(b"something")
    assert "2 .xmp, 1 Makefile" in read_folder(Files([root])).notes[0]


@pytest.mark.parametrize("name", ["labels.csv", "prompts.jsonl", "annotations.json", "captions.json", "data.tsv"])
def test_a_list_of_another_name_is_named_if_captions_are_missing(tmp_path, name):
    for image in ("a.png", "b.png"):
        photo(tmp_path / image, caption=None)
    (tmp_path / name).write_text("image,caption\na.png,x\n")
    (problem,) = read_folder(Files([tmp_path])).problems
    assert f"{name} is not read: a list must be named captions" in problem


@pytest.mark.parametrize("target", ["elsewhere", "photos/deep"])
def test_linked_folders_are_read_once(root, target):
    for name in ("x.png", "y.png"):
        photo(root.parent / target / name)
    os.symlink(root.parent / target, root / "a-link")
    os.symlink(root, root / "loop")
    below = "a-link" if target == "elsewhere" else "deep"
    assert names(root) == ["a.png", "b.png", *sorted([f"{below}/x.png", f"{below}/y.png"])] or names(root) == [
        f"{below}/x.png",
        f"{below}/y.png",
        "a.png",
        "b.png",
    ]


def test_links_to_files_are_read_and_those_that_lead_nowhere_are_named(root):
    photo(root.parent / "c.png")
    os.symlink(root.parent / "c.png", root / "c.png")
    os.symlink(root.parent / "c.txt", root / "c.txt")
    os.symlink("/nowhere/gone.jpg", root / "z.jpg")
    os.symlink("self.png", root / "self.png")
    listing = read_folder(Files([root]))
    assert len(listing.records) == 3
    assert sorted(problem.split(" is ")[0] for problem in listing.problems) == [
        str(root / "self.png"),
        str(root / "z.jpg"),
    ]


def test_pipes_and_devices_are_named_and_not_opened(root):
    os.mkfifo(root / "p.png")
    os.symlink("/dev/zero", root / "q.txt")
    problems = read_folder(Files([root])).problems
    assert len(problems) == 2
    assert all("is a pipe, a socket or a device" in problem for problem in problems)
    for path in (root / "p.png", "/dev/zero"):
        with pytest.raises(InputError, match="is a pipe, a socket or a device"):
            Files([path])


@pytest.mark.parametrize("kind", ["folder", "file", "root"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_may_not_be_read_is_called_that(kind):
    """In a process of another user, since root may read everything."""
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)
        root = Path(temporary) / "photos"
        for name in ("a.png", "b.png", "deep/c.png"):
            photo(root / name)
        path = {"folder": root / "deep", "file": root / "a.png", "root": root}[kind]
        script = f"""
import os
from icsd.data import DataConfig, open_dataset
def read():
    for split in ("train", "test"):
        open_dataset(DataConfig(name="folder", root={str(root)!r}, test_fraction=.01), split, 8)
read()  # imports what the other user may not read
os.chmod({str(path)!r}, 0)
os.setuid(65534)
try:
    read()
except Exception as error:
    print(type(error).__name__, error)
"""
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        path.chmod(0o755)
    expected = f"InputError {path} cannot be read (Permission denied)"
    assert ended.stdout.startswith(expected), ended.stdout + ended.stderr


@pytest.mark.parametrize("form", ["folder", ".tar", ".tgz"])
def test_names_that_are_not_utf_8_are_left_out_and_escaped(root, form):
    name = os.fsdecode(b"caf\xe9")
    photo(root / f"{name}.png")
    source = root if form == "folder" else pack(root, root.parent / f"photos{form}")
    listing = read_folder(Files([source]))
    assert len(listing.records) == 2
    assert len(listing.problems) == 2
    assert all(r"caf\udce9" in problem and problem.isprintable() for problem in listing.problems)


@pytest.mark.parametrize("name", ["two\nlines", "tab\there", "\x1b[31mred", "a\u202eb"])
def test_errors_about_strange_names_are_one_line(root, name):
    (root / f"{name}.png").write_bytes(b"not an image")
    (root / f"{name}.txt").write_text("x")
    files = Files([root])
    with pytest.raises(InputError, match="cannot be read as an image") as caught:
        open_images(files, [record.image for record in read_folder(files).records], 8, True)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("how", ["list", "text", "list of the other form"])
def test_names_of_one_look_are_the_same_name(root, how):
    decomposed, composed = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    image, text = (composed, decomposed) if how == "list of the other form" else (decomposed, composed)
    photo(root / f"{image}.png", caption=None)
    if how == "text":
        (root / f"{text}.txt").write_text("a cup")
    else:
        (root / "captions.csv").write_text(f"file,caption\n{text}.png,a cup\na.png,a\nb.png,b\n")
    assert names(root) == ["a.png", "b.png", f"{composed}.png"]


def test_two_names_of_one_look_are_refused(root):
    for form in ("NFD", "NFC"):
        photo(root / (unicodedata.normalize(form, "café") + ".png"))
    with pytest.raises(InputError, match="look the same"):
        read_folder(Files([root]))


def test_captions_may_also_have_the_full_name_of_the_image(root):
    photo(root / "c.png", caption=None)
    (root / "c.png.txt").write_text("a cup")
    assert names(root) == ["a.png", "b.png", "c.png"]


def test_names_below_the_root_do_not_depend_on_other_files(tmp_path):
    for name in ("a.png", "b.png"):
        photo(tmp_path / "deep" / name)
    before = names(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    assert names(tmp_path) == before == ["deep/a.png", "deep/b.png"]


def test_several_folders_are_refused(root, tmp_path):
    with pytest.raises(InputError, match="give one folder or archive, not several"):
        read_folder(Files([root, pack(root, tmp_path / "b.zip")]))


def test_an_archive_in_an_archive_is_part_of_it(root, tmp_path):
    pack(root, root / "inner.zip")
    for name in ("a.png", "a.txt", "b.png", "b.txt"):
        (root / name).unlink()
    photo(root / "c.png")
    outer = pack(root, tmp_path / "outer.zip")
    assert names(outer) == ["c.png", "inner.zip/photos/a.png", "inner.zip/photos/b.png"]
