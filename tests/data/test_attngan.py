import os
import pickle
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import python2_pickle

from icsd.data import Vocabulary
from icsd.data.attngan import make_pickles, read_filenames, read_pickle, read_vocabulary
from icsd.data.files import File
from icsd.data.records import Record
from icsd.errors import InputError

FILE = File("birds.zip", "birds/captions.pickle")
CONTENT = [[[1, 2]], [[2]], {0: "<end>", 1: "red", 2: "bird"}, {"<end>": 0, "red": 1, "bird": 2}]


class Runs:
    """An object that runs code when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_python_3(protocol):
    assert read_pickle(FILE, pickle.dumps(CONTENT, protocol)) == CONTENT


def test_pickles_of_python_2():
    assert read_pickle(FILE, python2_pickle(CONTENT)) == CONTENT
    assert read_pickle(FILE, python2_pickle(["Fl\u00fcgel"])) == ["Fl\u00fcgel"], "Latin-1"
    assert read_pickle(FILE, b"(lp0\nS'a'\np1\naI7\na.") == ["a", 7], "protocol 0, pickle's default in Python 2"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "harm",
    [
        lambda path: Runs(os.mkdir, path),
        lambda path: Runs(eval, f"__import__('os').mkdir({path!r})"),
        lambda path: [Runs(getattr, Runs(__import__, "os"), "mkdir")],
        lambda path: {"a": Runs(open, path, "w")},
    ],
)
def test_no_code_of_a_pickle_is_run(tmp_path, protocol, harm):
    data = pickle.dumps(harm(str(tmp_path / "harm")), protocol)
    for read in (read_pickle, read_filenames, read_vocabulary):
        with pytest.raises(InputError, match=r"birds\.zip/birds/captions\.pickle cannot be read .*it names"):
            read(FILE, data)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        pickle.dumps(CONTENT)[:-9],
        b"Pid\n.",
        b"\x80\x63.",
        b"(lR.",
        b"(lb.",
        b"\x82\x01.",
        b"cos\nsystem\n.",
    ],
)
def test_broken_pickles_are_named(data):
    with pytest.raises(InputError, match=r"captions\.pickle cannot be read"):
        read_pickle(FILE, data)


def plain(value, depth=0):
    """Return True if the value holds only plain values; damage may make a list that holds itself."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return depth > 9 or all(plain(each, depth + 1) for each in value)
    return isinstance(value, str | int | float | bytes | bytearray | type(None))


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([python2_pickle(CONTENT), *(pickle.dumps(CONTENT, protocol) for protocol in range(6))]),
    st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=3)), max_size=4),
)
def test_damaged_pickles_are_plain_values_or_an_error(data, damage):
    for place, by in damage:
        data = data[:place] + by + data[place + len(by) :]
    with suppress(InputError):
        assert plain(read_pickle(FILE, data))


@pytest.mark.parametrize("content", [[], {}, "abc", [1], [["a"]]])
def test_filenames_are_a_list_of_names(content):
    with pytest.raises(InputError, match="must hold a list of image names"):
        read_filenames(FILE, pickle.dumps(content))


def test_vocabulary_keeps_its_order():
    assert read_vocabulary(FILE, python2_pickle(CONTENT)).words == ["red", "bird"]


@pytest.mark.parametrize(
    "content",
    [
        7,
        CONTENT[:3],
        [[], [], {0: "<end>"}, {"<end>": 0}],  # what AttnGAN caches after a wrong path
        [[], [], {1: "red"}, {"red": 1}],
        [[], [], {0: "<end>", 2: "red"}, {"<end>": 0, "red": 2}],
        [[], [], {0: "<end>", 1: "red"}, {"<end>": 0, "red": 2}],
        [[], [], {0: "<end>", 1: "red", 2: "red"}, {"<end>": 0, "red": 2}],
        [[], [], {0: "red", 1: "bird"}, {"red": 0, "bird": 1}],
    ],
)
def test_vocabularies_of_another_form_are_refused(content):
    with pytest.raises(InputError, match="must hold"):
        read_vocabulary(FILE, pickle.dumps(content))


def test_written_pickles_read_back():
    def record(name, captions, split):
        return Record(name, File("a", name), captions, name.partition("/")[0], split)

    many = [f"bird red {'red ' * number}" for number in range(12)]
    records = {
        "train": [record("002.B/b_1.x.jpg", ["red red bird", "a bird"], "train"), record("001.A/a.jpg", many, "train")],
        "test": [record("003.C/c.png", ["bird"], "test")],
    }
    written = {path: pickle.loads(data) for path, data in make_pickles(records, Vocabulary(["red", "bird"])).items()}
    captions = written.pop("captions.pickle")
    assert written == {
        "train/filenames.pickle": ["002.B/b_1.x", "001.A/a"],
        "train/class_info.pickle": [2, 1],
        "test/filenames.pickle": ["003.C/c"],
        "test/class_info.pickle": [3],
    }
    assert captions[0][:10] == [[1, 1, 2], [2]] * 5, "few captions are repeated"
    assert captions[0][10:] == [[2, 1] + [1] * number for number in range(10)], "of many, ten"
    assert captions[1] == [[2]] * 10
    assert captions[2:] == CONTENT[2:]
