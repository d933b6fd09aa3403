import io
import os
import tarfile
import zipfile

import pytest
from layouts import pack

from icsd.data.files import Files, new_folder
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


def contents(*paths):
    files = Files(paths)
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
