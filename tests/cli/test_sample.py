from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from icsd.training import checkpoint

SENTENCE = "this flower has blue petals"


@pytest.fixture
def run(icsd, workplace):
    """A trained run below runs/."""
    assert icsd("train", "--config", "tiny.yaml", "--steps", "1")[0] == 0
    return Path("runs/procedural-flowers")


def test_the_same_seed_writes_the_same_image(icsd, run):
    assert icsd("sample", SENTENCE) == (0, "sample.png\n", "")
    for name, seed in (("a.png", "3"), ("b.png", "3"), ("c.png", "4")):
        assert icsd("sample", SENTENCE, "--seed", seed, "--out", name, "--checkpoint", str(run))[0] == 0
    a, b, c = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


def test_several_sentences_seeds_and_stages_share_one_image(icsd, run):
    icsd("sample", SENTENCE)
    with Image.open("sample.png") as image:
        one = image.size
    path = str(checkpoint.latest(run))
    icsd("sample", SENTENCE, "a red flower", "--count", "3", "--stages", "--checkpoint", path)
    with Image.open("sample.png") as image:
        assert image.width > 4 * one[0]
        assert image.height > one[1]


def test_unknown_words_are_named_and_the_rest_is_generated(icsd, run):
    code, _, err = icsd("sample", "this flower has zebra petals and a moustache")
    assert code == 0
    assert err == "icsd: this model does not know and skips: zebra, moustache\n"
    assert Path("sample.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no sentence to generate"),
        (["  "], "no sentence to generate"),
        ([SENTENCE, "--count", "0"], "count is 0"),
        ([SENTENCE, "--seed", "-1"], "seed is -1"),
        ([SENTENCE, "--seed", "x"], '"seed"'),
        ([SENTENCE, "--out", "image.doc"], "output is image.doc"),
        ([SENTENCE, "--checkpoint", "absent"], "no checkpoint at absent"),
        ([SENTENCE, "--checkpoint", "tiny.yaml"], "checkpoint tiny.yaml is truncated or not a .safetensors file"),
        ([SENTENCE, "--checkpoint", "foreign.safetensors"], "not a checkpoint of icsd"),
    ],
)
def test_errors_are_one_line_and_write_nothing(fails, run, arguments, message):
    save_file({}, "foreign.safetensors")
    assert message in fails("sample", *arguments)
    assert not list(Path().glob("*.png"))


def test_without_a_run_it_says_how_to_train(fails, workplace):
    assert "icsd train" in fails("sample", SENTENCE)


@pytest.mark.parametrize(
    "options",
    [
        ["--interpolate", "noise", "--frames", "3"],
        ["this flower has petals", "--interpolate", "sentences", "--stages"],
        ["--show", "attention"],
        ["--show", "similarity", "--count", "4"],
        ["--truncation", "0.7"],
    ],
    ids=lambda options: " ".join(options),
)
def test_other_views(icsd, run, options):
    assert icsd("sample", SENTENCE, *options) == (0, "sample.png\n", "")
    with Image.open("sample.png") as image:
        assert len(image.getcolors(1 << 20)) > 8


def test_options_that_contradict_each_other_are_refused(icsd, run):
    code, _, err = icsd("sample", SENTENCE, "--interpolate", "noise", "--show", "attention")
    assert code == 2
    assert "do not go together" in err


def test_interpolation_needs_its_sentences(icsd, run):
    code, _, err = icsd("sample", SENTENCE, "--interpolate", "sentences")
    assert code == 2
    assert "give 2 sentence(s), got 1" in err


def test_sentences_of_a_file_fill_a_folder(icsd, run):
    Path("captions.txt").write_text("this flower has blue petals\n\nthis flower has red petals\n")
    for _ in range(2):
        code, out, _ = icsd("sample", "--file", "captions.txt", "--folder", "generated", "--count", "5")
        assert (code, out) == (0, "generated\n")
    assert len(list(Path("generated").glob("*.png"))) == 5
    code, _, err = icsd("sample", "--file", "missing.txt")
    assert code == 2
    assert "missing.txt" in err
    Path("latin.txt").write_bytes("pétale".encode("latin1"))
    code, _, err = icsd("sample", "--file", "latin.txt")
    assert code == 2
    assert "latin.txt, which is not UTF-8" in err


def test_the_generator_is_exported(icsd, run):
    assert icsd("export", "generator.pt2") == (0, "generator.pt2\n", "")
    assert Path("generator.pt2").stat().st_size > 1000
    code, _, err = icsd("export", "generator.bin")
    assert code == 2
    assert "give a .pt2 or .onnx file" in err
