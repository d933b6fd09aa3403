import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import tracemalloc
import zipfile
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from
from layouts import pack

from icsd.data.files import Files, new_folder
from icsd.data.limits import Limits
from icsd.errors import InputError

TREE = {"a.txt": b"one", "deep/b.txt": b"two", "deep/er/c.bin": bytes(range(256)) * 40}


@pytest.fixture
def folder(tmp_path):
    for name, data in TREE.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    for name in (".hidden", "._a.txt", ".git/config", "__MACOSX/a.txt"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"no")
    return tmp_path / "set"


def tar(path, *members, mode="w"):
    with tarfile.open(path, mode) as out:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return path


def contents(*paths, limits=None):
    files = Files(paths, limits)
    assert files.all == sorted(files.all)
    return {str(file): data for file, data in files.read(files.all)}


def test_folders_and_archives_have_equal_contents(folder, tmp_path):
    sources = [folder, *(pack(folder, tmp_path / f"set{suffix}", base="") for suffix in (".zip", ".tar", ".tgz"))]
    for source in sources:
        assert contents(source) == {f"{source}/{name}": data for name, data in TREE.items()}
    assert len(contents(*sources)) == 4 * len(TREE)


def test_files_are_read_in_stored_order(folder, tmp_path):
    for archive in (pack(folder, tmp_path / "set.tgz"), pack(folder, tmp_path / "set.zip")):
        files = Files([archive])
        wanted = [file for file in files.all if file.name != "b.txt"]
        assert [file for file, _ in files.read(wanted[::-1])] == wanted
        assert [file.folder for file in wanted] == ["set", "er"]


def test_archives_in_archives(folder, tmp_path):
    inner = pack(folder / "deep", tmp_path / "deep.zip")
    outer = tar(tmp_path / "outer.tgz", ("birds/deep.zip", inner.read_bytes()), ("birds/d.txt", b"four"), mode="w:gz")
    assert contents(outer) == {
        f"{outer}/birds/d.txt": b"four",
        f"{outer}/birds/deep.zip/deep/b.txt": TREE["deep/b.txt"],
        f"{outer}/birds/deep.zip/deep/er/c.bin": TREE["deep/er/c.bin"],
    }


def test_byte_ranges(folder, tmp_path):
    for source in (folder, pack(folder, tmp_path / "set.tar", base="")):
        files = Files([source])
        for file in files.all:
            with files.byte_range(file).open() as opened:
                assert opened.read() == TREE[file.path]
    for source in (pack(folder, tmp_path / "set.tgz"), pack(folder, tmp_path / "set.zip")):
        files = Files([source])
        with pytest.raises(InputError, match="in random order; unpack it"):
            files.byte_range(files.all[0])


def test_archives_are_not_kept_open(folder, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    sources = [pack(folder, tmp_path / f"{place}{suffix}") for suffix in (".zip", ".tar", ".tgz") for place in range(4)]
    files = Files(sources)
    assert len(list(files.read(files.all))) == 12 * len(TREE)
    assert len(os.listdir("/proc/self/fd")) == before, "a set may have more shards than a process may open files"


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tgz"])
def test_a_truncated_archive_is_named_wherever_it_ends(folder, tmp_path, suffix):
    whole = pack(folder, tmp_path / f"whole{suffix}").read_bytes()
    end = {".zip": len(whole), ".tgz": len(whole), ".tar": len(whole.rstrip(b"\0")) // 512 * 512 + 512}[suffix]
    for cut in range(0, end, max(end // 60, 1)):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=f"broken{suffix} is truncated or broken") as caught:
            Files([broken])
        assert "\n" not in str(caught.value)


def test_a_damaged_zip_is_found_when_it_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr("a.txt", "hello")
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes().replace(b"hello", b"jello"))
    with pytest.raises(InputError, match=r"a\.zip is truncated or broken"):
        contents(tmp_path / "a.zip")


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/etc/evil.txt", "a\\..\\evil.txt"])
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_paths_that_lead_out_are_refused(tmp_path, name, suffix):
    if suffix == ".zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
            out.writestr(name, "evil")
    else:
        tar(tmp_path / "a.tar", (name, b"evil"))
    with pytest.raises(InputError, match="unsafe path"):
        Files([tmp_path / f"a{suffix}"])


def test_links_in_archives_are_skipped(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"link{kind.decode()}")
            member.type, member.linkname = kind, "/etc/passwd"
            out.addfile(member)
    assert contents(tmp_path / "a.tar") == {}


def test_missing_broken_and_repeated_paths(folder, tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        Files([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"a\.txt is truncated or broken"):
        Files([folder / "a.txt"])
    with pytest.raises(InputError, match="given twice"):
        Files([folder, folder])
    with pytest.raises(InputError, match=r"holds a\.txt 2 times"):
        Files([tar(tmp_path / "a.tar", ("a.txt", b"one"), ("./a.txt", b"two"))])


def test_a_new_folder_is_complete_or_missing(tmp_path):
    out = tmp_path / "new" / "set"

    def interrupted():
        with new_folder(out) as folder:
            (folder / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(out.parent) == []
    out.mkdir()
    with new_folder(out) as folder:
        (folder / "a").write_text("whole")
        assert os.listdir(out) == []
    assert (out / "a").read_text() == "whole"
    assert os.listdir(out.parent) == ["set"]
    with pytest.raises(InputError, match="not an empty folder"), new_folder(out):
        pass


def test_the_partial_folder_of_a_killed_process_is_kept(tmp_path):
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "a").write_text("half")
    with pytest.raises(InputError, match=r"set\.partial was left by an interrupted run"), new_folder(tmp_path / "set"):
        pass
    assert (tmp_path / "set.partial" / "a").read_text() == "half"


def tar_header(name, size, kind=b"0"):
    """Write a header whose size may be anything: in base 256, as tar files do above 8 GB, or negative."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    if 0 <= size < 8**11:
        header[124:136] = b"%011o\0" % size
    else:
        header[124:136] = (size % 2**96 | 1 << 95).to_bytes(12, "big")
    header[156:157] = kind
    header[257:265] = b"ustar\00000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@contextmanager
def peak_memory(most):
    """Check that no more than ``most`` MiB are allocated at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [2**70, 2**63, 2**40, 2**62 - 1, -512, -(2**60), -1])
@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"g", b"S"])
def test_tar_headers_of_impossible_sizes(tmp_path, size, kind):
    path = tmp_path / "size.tar"
    path.write_bytes(tar_header(b"a.png", size, kind) + bytes(4096))
    if kind == b"S" and size < 0:  # the size of a sparse file stands elsewhere, and is 0 here
        with suppress(InputError):
            assert list(contents(path).values()) == [b""]
        return
    with pytest.raises(InputError, match=r"size\.tar"):
        contents(path)


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
@pytest.mark.parametrize("where", ["member", "after the end", "pax header", "long name"])
def test_sizes_in_compressed_tars_are_bounded(tmp_path, opener, where):
    """A few kilobytes become 32 MiB, where 1 MiB is allowed (lzma itself takes 8 MiB)."""
    zeros = bytes(32 * 2**20)
    kind = {"pax header": b"x", "long name": b"L"}.get(where, b"0")
    first = tar_header(b"a.txt", 3) + b"one".ljust(512, b"\0")
    rest = (
        bytes(1024) + zeros
        if where == "after the end"
        else tar_header(b"b.txt", len(zeros), kind) + zeros + bytes(1024)
    )
    path = tmp_path / "bomb.tar"
    with opener(path, "wb") as out:
        out.write(first + rest)
    with peak_memory(14), pytest.raises(InputError, match=r"bomb\.tar"):
        Files([path], Limits(max_file_mb=1))
    if where == "member":
        assert len(Files([path], Limits(max_file_mb=32)).all) == 2, "a larger limit takes it"


@pytest.mark.parametrize("nested", [False, True])
def test_sizes_in_zips_are_bounded(tmp_path, nested):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a.txt", "one")
        out.writestr("b.zip" if nested else "b.txt", bytes(8 * 2**20))
    message = r"bomb\.zip/b\.\w+ has 8,388,608 bytes, more than max_file_mb=1 allows; raise"
    with peak_memory(4), pytest.raises(InputError, match=message):
        contents(tmp_path / "bomb.zip", limits=Limits(max_file_mb=1))


def test_the_size_in_a_zip_is_not_believed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a.txt", bytes(8 * 2**20))
    data = (tmp_path / "a.zip").read_bytes().replace(struct.pack("<I", 8 * 2**20), struct.pack("<I", 9))
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.zip is truncated or broken"):
        contents(tmp_path / "a.zip")


def test_large_files_are_named_with_the_option(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(2**20 + 1))
    files = Files([tmp_path], Limits(max_file_mb=1))
    with pytest.raises(
        InputError, match=r"a\.txt has 1,048,577 bytes, more than max_file_mb=1 allows; raise max_file_mb"
    ):
        list(files.read(files.all))
    assert [type(data) for _, data in files.try_read(files.all)] == [InputError]


@pytest.mark.parametrize("field", ["max_file_mb", "max_pixels"])
def test_limits_are_positive(field):
    with pytest.raises(InputError, match=f"{field} is 0"):
        Limits(**{field: 0})


def test_archives_in_archives_have_a_limited_depth(folder, tmp_path):
    path = pack(folder, tmp_path / "0.zip")
    for depth in range(1, 5):
        with zipfile.ZipFile(tmp_path / f"{depth}.zip", "w") as out:
            out.write(path, f"{depth - 1}.zip")
        path = tmp_path / f"{depth}.zip"
        if depth < 4:
            assert len(contents(path)) == len(TREE)
    with pytest.raises(InputError, match="is an archive in 3 other archives; unpack the outer ones"):
        Files([path])


def test_links_in_a_tar_are_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        member = tarfile.TarInfo("link.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(member)
    assert "a.tar/link.png is a link or a device and is not read" in Files([tmp_path / "a.tar"]).problems[0]


@given(where=integers(0, 10_000), change=integers(1, 255), kind=sampled_from([".zip", ".tar", ".tgz"]))
@settings(max_examples=60, deadline=None)
def test_damaged_archives_are_read_or_named(tmp_path_factory, where, change, kind):
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "set").mkdir()
    (folder / "set" / "a.txt").write_bytes(b"hello" * 30)
    data = bytearray(pack(folder / "set", folder / f"a{kind}").read_bytes())
    data[where % len(data)] ^= change
    (folder / f"a{kind}").write_bytes(data)
    with suppress(InputError):
        contents(folder / f"a{kind}")
