"""Attacks on the readers of data: hostile and damaged files, each read, refused in one line, or left out.

Run with ``make attack``. Every test prints its counts.
"""

import io
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter

import pytest
from attempts import attempt
from layouts import pack, python2_pickle
from PIL import Image

from icsd.data.attngan import read_filenames, read_pickle, read_vocabulary
from icsd.data.captions import tokenize
from icsd.data.files import File, Files
from icsd.data.folder import read_folder
from icsd.data.images import open_image, readable_formats, to_rgb, unreadable
from icsd.data.limits import Limits
from icsd.data.lists import read_list
from icsd.data.sources import list_set

pytestmark = [pytest.mark.attack, pytest.mark.timeout(1200)]


def damaged(data, draw):
    """Change, remove, insert or repeat bytes."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(data) or 1)
        kind = draw.randrange(5)
        if kind == 0 and data:
            data[place % len(data)] = draw.randrange(256)
        elif kind == 1:
            data = data[:place]
        elif kind == 2:
            data[place:place] = draw.choice((b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", draw.randbytes(8)))
        elif kind == 3:
            del data[place : place + draw.randrange(1, 64)]
        else:
            data += data[place : place + 512]
    return bytes(data)


def photos(root, count=4):
    root.mkdir()
    for number in range(count):
        Image.effect_noise((24, 20), 60).convert("RGB").save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"bird {number}")
    return root


def read_all(paths):
    files = Files(paths, Limits(max_file_mb=8))
    list(files.read(files.all))


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tgz"])
def test_damaged_archives(tmp_path, suffix):
    whole = pack(photos(tmp_path / "photos"), tmp_path / f"a{suffix}").read_bytes()
    counts = Counter()
    for seed in range(400):
        (tmp_path / f"a{suffix}").write_bytes(damaged(whole, random.Random(seed)))
        counts[attempt(read_all, [tmp_path / f"a{suffix}"])] += 1
    print(f"damaged archives, {suffix}: {dict(counts)}")
    assert sum(counts.values()) == 400


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "ICO", "TGA", "PPM", "AVIF"])
def test_damaged_images(form):
    encoded = io.BytesIO()
    Image.effect_noise((40, 30), 90).convert("RGB").save(encoded, form)
    counts = Counter()

    def decode(data):
        try:
            with open_image(io.BytesIO(data), Limits(max_pixels=10**6)) as image:
                to_rgb(image)
        except Exception as error:
            raise unreadable("x", error) from error

    for seed in range(300):
        counts[attempt(decode, damaged(encoded.getvalue(), random.Random(seed)))] += 1
    print(f"damaged images, {form}: {dict(counts)}")
    assert form in readable_formats()


def test_pickles(tmp_path):
    class Harm:
        def __init__(self, function, *arguments):
            self.call = function, arguments

        def __reduce__(self):
            return self.call

    counts = Counter()
    ran = []
    harmed = tmp_path / "harmed"
    hostile = [Harm(os.system, f"touch {harmed}"), Harm(eval, "1"), Harm(exec, ""), Harm(ran.append, 1)]
    hostile += [
        Harm(print, "ran"),
        Harm(open, str(harmed), "w"),
        Harm(__import__, "os"),
        Harm(getattr, 1, "real"),
    ]
    content = [[[1, 2]], [[1]], {0: "<end>", 1: "a", 2: "b"}, {"<end>": 0, "a": 1, "b": 2}]
    plain = [pickle.dumps(content, protocol) for protocol in range(6)] + [python2_pickle(content)]
    # A memo index of 2**31, sizes that are not there, and lists that hold themselves.
    crafted = [b"\x80\x02]r\xff\xff\xff\x7f.", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fab.", b"\x80\x02]q\0h\0a."]
    inputs = [
        pickle.dumps(value, protocol) for value in hostile[:3] + hostile[4:] for protocol in range(2, 6)
    ] + crafted
    for seed in range(1500):
        inputs.append(damaged(plain[seed % len(plain)], random.Random(seed)))
    for data in inputs:
        for function in (read_pickle, read_filenames, read_vocabulary):
            counts[attempt(function, File("x", "captions.pickle"), data)] += 1
    print(f"pickles: {dict(counts)}; code was run {len(ran)} times")
    assert not ran
    assert not harmed.exists()


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_damaged_lists(name):
    rows = [("a.png", 'a "small" bird, red'), ("b.png", "ein Vogel, süß"), ("c.png", "一只狗")]
    if name.endswith("csv"):
        text = "file,caption,class\n" + "".join('{},"{}",1\n'.format(n, c.replace('"', '""')) for n, c in rows)
    else:
        text = "".join(json.dumps({"file": n, "caption": c, "class": 1}) + "\n" for n, c in rows)
    counts = Counter()
    for seed in range(1500):
        data = damaged(text.encode(), random.Random(seed)).decode("utf-8", "replace")
        counts[attempt(lambda data=data: list(read_list(File("x", name), data, {"a.png", "b.png", "c.png"})))] += 1
    print(f"damaged lists, {name}: {dict(counts)}")


def test_archives_that_lead_out(tmp_path):
    names = [
        "../x.txt",
        "a/../../x.txt",
        "/etc/x.txt",
        "..\\x.txt",
        "a\\..\\..\\x.txt",
        "C:\\x.txt",
        "x\0.txt",
        "./../x.txt",
    ]
    counts = Counter()
    for name in names:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
            out.writestr(zipfile.ZipInfo(name), "x")
        with tarfile.open(tmp_path / "a.tar", "w") as out:
            member = tarfile.TarInfo(name)
            member.size = 1
            out.addfile(member, io.BytesIO(b"x"))
        for archive in ("a.zip", "a.tar"):
            counts[attempt(read_all, [tmp_path / archive])] += 1
    print(f"archives that lead out: {dict(counts)}")
    assert counts["refused"] >= 2 * len(names) - 2, "only a name cut at its NUL is harmless"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.zip"]


def test_a_zip_that_holds_itself(tmp_path):
    """Many levels of archives in archives, as in a file that contains itself."""
    data = b""
    for depth in range(60):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
            out.writestr("a.zip" if depth else "a.txt", data)
        data = file.getvalue()
    (tmp_path / "a.zip").write_bytes(data)
    assert attempt(read_all, [tmp_path / "a.zip"]) == "refused"


BOMBS = {
    "zip": lambda root: _zip_bomb(root / "bomb.zip"),
    "tgz": lambda root: _tgz_bomb(root / "bomb.tgz"),
    "json": lambda root: (root / "captions.jsonl").write_text("[" * 1_000_000 + "\n"),
    "csv": lambda root: (root / "captions.csv").write_text("file,caption\n" + '"' * 1_000_001),
    "png": lambda root: (root / "0.png").write_bytes(_png_header(100_000, 100_000)),
    "parquet": lambda root: _parquet_bomb(root),
    "fifo": lambda root: os.mkfifo(root / "p.png"),
    "device": lambda root: os.symlink("/dev/zero", root / "z.txt"),
    "loop": lambda root: os.symlink(root, root / "loop"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_take_little_memory(tmp_path, kind):
    """In a process with 2.5 GB of memory, of which the imports take most."""
    root = photos(tmp_path / "photos")
    BOMBS[kind](root)
    sources = [root / name for name in ("bomb.zip", "bomb.tgz") if (root / name).exists()] or [root]
    script = f"""
import sys
from icsd.cli.main import main
sys.exit(main(["data", "prepare", "folder", {str(sources[0])!r}, {str(tmp_path / "out")!r}, "--workers", "0"]))
"""

    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, (5 * 2**29, 5 * 2**29))

    since = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", script], preexec_fn=limit, capture_output=True, text=True, check=False, env=environment
    )
    print(f"{kind}: exit code {ended.returncode} in {time.monotonic() - since:.1f} s; {ended.stderr.strip()[-150:]}")
    assert ended.returncode == (0 if kind == "loop" else 2), ended.stderr
    assert "Traceback" not in ended.stderr


def _zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a.png", b"x")
        with out.open("a.txt", "w", force_zip64=True) as file:
            for _ in range(1024):
                file.write(bytes(2**20))


def _parquet_bomb(root):
    """Write, in the place of the photos, one image of 40 MB that 100 rows repeat."""
    for path in root.iterdir():
        path.unlink()
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = arrow.DictionaryArray.from_arrays(arrow.array([0] * 100, arrow.int32()), arrow.array([bytes(40 * 2**20)]))
    table = arrow.table({"image": image, "text": ["a bird"] * 100})
    parquet.write_table(table, root / "bomb.parquet", compression="zstd")
    assert (root / "bomb.parquet").stat().st_size < 2**20


def _tgz_bomb(path):
    with tarfile.open(path, "w:gz", compresslevel=1) as out:
        member = tarfile.TarInfo("a.txt")
        member.size = 2**30
        out.addfile(member, _Zeros(2**30))


class _Zeros:
    def __init__(self, size):
        self.size = size

    def read(self, count):
        count = min(count, self.size)
        self.size -= count
        return bytes(count)


def _png_header(width, height):
    encoded = io.BytesIO()
    Image.new("L", (1, 1)).save(encoded, "PNG")
    data = bytearray(encoded.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = __import__("zlib").crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_names_and_captions_of_every_kind_of_character(tmp_path):
    draw = random.Random(0)
    counts = Counter()
    for seed in range(200):
        characters = [draw.choice((draw.randrange(1, 0x250), draw.randrange(0x250, 0x11000), draw.randrange(0x110000)))]
        characters += [draw.randrange(1, 0x3000) for _ in range(draw.randrange(12))]
        text = "".join(map(chr, characters))
        assert all(word == word.lower() or tokenize(word) for word in tokenize(text))
        name = text.replace("/", "_").lstrip(".").encode("utf-8", "surrogatepass")[:80].decode("utf-8", "ignore")
        root = photos(tmp_path / str(seed), 2)
        try:
            (root / f"{name}.png").write_bytes((root / "0.png").read_bytes())
            (root / f"{name}.txt").write_text(text, encoding="utf-8", errors="replace")
        except (OSError, ValueError):
            continue
        counts[attempt(lambda root=root: read_folder(Files([root])))] += 1
    print(f"names and captions: {dict(counts)}")


def test_damaged_sets(tmp_path):
    """Damage to files of a whole set, read to its records."""
    counts = Counter()
    for seed in range(60):
        draw = random.Random(seed)
        root = photos(tmp_path / str(seed))
        (root / "captions.jsonl").write_text(
            "".join(json.dumps({"file": f"{number}.png", "caption": f"bird {number}"}) + "\n" for number in range(4))
        )
        victim = draw.choice(sorted(root.iterdir()))
        victim.write_bytes(damaged(victim.read_bytes(), draw))
        counts[attempt(list_set, "folder", [root])] += 1
    print(f"damaged sets: {dict(counts)}")
