import io
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from icsd.cli.main import main
from icsd.training import checkpoint

SENTENCE = "this flower has blue petals"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained run folder, not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        (folder / "tiny.yaml").write_text(TINY)
        assert main(["train", "--config", "tiny.yaml", "--steps", "1"]) == 0
    finally:
        os.chdir(before)
    return folder / "runs" / "procedural-flowers"


TINY = """
data: {name: procedural-flowers, size: 24}
text: {dim: 8, embedding_dim: 8}
generator: {resolutions: [8, 16], width: 4, noise_dim: 4, condition_dim: 4}
discriminator: {width: 4}
batch_size: 4
threads: 1
evaluate: false
"""


@pytest.fixture
def run(trained, workplace):
    """A copy of the trained run folder below runs/ of the current folder."""
    return Path(shutil.copytree(trained, "runs/procedural-flowers"))


def test_the_same_seed_writes_the_same_image(icsd, run):
    assert icsd("sample", SENTENCE) == (0, "sample.png\n", "")
    for name, seed in (("a.png", "3"), ("b.png", "3"), ("c.png", "4")):
        assert icsd("sample", SENTENCE, "--seed", seed, "--output", name, "--checkpoint", str(run))[0] == 0
    a, b, c = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


def test_several_sentences_seeds_and_stages_share_one_image(icsd, run):
    icsd("sample", SENTENCE)
    with Image.open("sample.png") as image:
        one = image.size
    path = str(checkpoint.latest(run))
    icsd("sample", SENTENCE, "a red flower", "--per-sentence", "3", "--stages", "--checkpoint", path)
    with Image.open("sample.png") as image:
        assert image.width > 4 * one[0]
        assert image.height > one[1]


def test_unknown_words_are_named_and_the_rest_is_generated(icsd, run):
    code, _, err = icsd("sample", "this flower has zebra petals and a moustache")
    assert code == 0
    assert err == "icsd: no words that this model knows, left out: zebra, moustache\n"
    assert Path("sample.png").exists()


@pytest.mark.parametrize("last", ["blue", "petals"])
def test_words_beyond_the_longest_sentence_are_named(icsd, run, last):
    code, _, err = icsd("sample", "this flower has " * 6 + last)
    assert (code, err) == (0, f"icsd: this model reads 18 words of a sentence and leaves out: {last}\n")


@pytest.mark.parametrize("sentence", ["\N{DOG}", "!!!", "zebra", "\u200b", "12\N{ROMAN NUMERAL ONE}"])
def test_a_sentence_without_a_known_word_is_refused(fails, run, sentence):
    assert "has no word that this model knows" in fails("sample", SENTENCE, sentence)
    assert not Path("sample.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no sentence to generate"),
        (["  "], "no sentence to generate"),
        ([SENTENCE, "--count", "0"], "--count is 0"),
        ([SENTENCE, "--per-sentence", "-1"], "--per-sentence is -1"),
        ([SENTENCE, "--count", "2000"], "2000 images do not fit on a page"),
        ([SENTENCE, "--seed", "-1"], "seed is -1"),
        ([SENTENCE, "--seed", str(10**30)], f"seed is {10**30}"),
        ([SENTENCE, "--seed", "x"], '"seed"'),
        ([SENTENCE, "--truncation", "1e-30"], "truncation is 1e-30"),
        ([SENTENCE, "--device", "meta"], "device is 'meta'"),
        ([SENTENCE, "--output", "image.doc"], "output is image.doc"),
        ([SENTENCE, "--checkpoint", "absent"], "no checkpoint at absent"),
        ([SENTENCE, "--checkpoint", "tiny.yaml"], "checkpoint tiny.yaml is truncated or not a .safetensors file"),
        ([SENTENCE, "--checkpoint", "foreign.safetensors"], "not a checkpoint of icsd"),
        ([SENTENCE, "--checkpoint", "runs"], "give one of them, procedural-flowers"),
    ],
)
def test_errors_are_one_line_and_write_nothing(fails, run, arguments, message):
    save_file({}, "foreign.safetensors")
    told = fails("sample", *arguments)
    assert message in told
    assert "\n" not in told
    assert not list(Path().glob("*.png"))


def test_without_a_run_it_says_how_to_train(fails, workplace):
    assert "icsd train" in fails("sample", SENTENCE)


@pytest.mark.parametrize("command", [["sample", SENTENCE], ["export", "generator.pt2"]])
def test_newer_checkpoints_that_cannot_generate_are_passed_over(icsd, run, command):
    checkpoint.save(checkpoint.step_path("runs/damsm-procedural-flowers", 9), {"config": {}, "damsm": {}})
    torn = checkpoint.step_path("runs/torn", 9)
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    code, _, err = icsd(*command)
    assert code == 0
    assert err.startswith("icsd: skipped: checkpoint runs/torn/")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", [["sample", SENTENCE], ["export", "generator.pt2"]])
def test_encoders_are_named_where_no_model_is_found(fails, workplace, command):
    checkpoint.save(checkpoint.step_path("runs/damsm", 9), {"config": {}, "damsm": {}})
    assert "runs/damsm holds DAMSM encoders" in fails(*command)
    assert "holds DAMSM encoders, written by `icsd pretrain`" in fails(*command, "--checkpoint", "runs/damsm")


@pytest.mark.parametrize(("command", "name"), [("train", "damsm"), ("pretrain", "procedural-flowers")])
def test_a_run_of_another_kind_is_not_resumed(fails, run, command, name):
    checkpoint.save(checkpoint.step_path("runs/damsm", 9), {"config": {}, "damsm": {}})
    message = fails(command, "--resume", f"runs/{name}")
    assert f"written by `icsd {'pretrain' if command == 'train' else 'train'}`, not" in message


@pytest.mark.parametrize(
    "options",
    [
        ["--interpolate", "noise", "--frames", "3"],
        ["this flower has petals", "--interpolate", "sentences", "--stages"],
        ["--show", "attention"],
        ["this flower has petals", "--show", "attention"],
        ["--show", "similarity", "--per-sentence", "4"],
        ["this flower has petals", "--show", "similarity"],
        ["--truncation", "0.7"],
    ],
    ids=lambda options: " ".join(options),
)
def test_other_views(icsd, run, options):
    assert icsd("sample", SENTENCE, *options) == (0, "sample.png\n", "")
    with Image.open("sample.png") as image:
        assert len(image.getcolors(1 << 20)) > 8


def test_attention_is_drawn_for_every_image(icsd, run):
    heights = []
    for options in ([SENTENCE], [SENTENCE, "a red flower"], [SENTENCE, "a red flower", "--per-sentence", "2"]):
        assert icsd("sample", *options, "--show", "attention")[0] == 0
        with Image.open("sample.png") as image:
            heights.append(image.height)
    assert heights[1] >= 2 * heights[0]
    assert heights[2] == 2 * heights[1]


@pytest.mark.parametrize(("name", "frames"), [("walk.gif", 5), ("WALK.GIF", 2)])
def test_an_interpolation_becomes_an_animation(icsd, run, name, frames):
    options = ["--interpolate", "noise", "--frames", str(frames), "--fps", "20", "--output", name]
    assert icsd("sample", SENTENCE, *options) == (0, f"{name}\n", "")
    with Image.open(name) as image:
        assert image.n_frames == frames
        assert image.info["duration"] == 50
        assert image.info["loop"] == 0


def test_an_interpolation_becomes_a_video(icsd, run):
    av = pytest.importorskip("av")
    assert icsd("sample", SENTENCE, "--interpolate", "noise", "--frames", "5", "--output", "walk.mp4")[0] == 0
    with av.open("walk.mp4") as container:
        assert len(list(container.decode(video=0))) == 5


def test_a_video_without_its_package_names_the_extra(fails, run, monkeypatch):
    monkeypatch.setattr("icsd.visualization.find_spec", lambda name: None)
    assert 'pip install -e ".[video]"' in fails("sample", SENTENCE, "--interpolate", "noise", "--output", "walk.mp4")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--interpolate", "noise", "--show", "attention"], "--interpolate and --show attention"),
        (["--output", "many", "--stages"], "--stages and a folder"),
        (["--output", "many", "--interpolate", "noise"], "--interpolate and a folder"),
        (["--output", "many", "--show", "similarity", "--frames", "3"], "--show and --frames and a folder"),
        (["--show", "attention", "--stages"], "--stages and --show attention"),
        (["--show", "similarity", "--fps", "3"], "--fps and --show similarity"),
        (["--interpolate", "noise", "--count", "2"], "--count and --interpolate"),
        (["--interpolate", "noise", "--fps", "2"], "--fps and --interpolate"),
        (["--output", "a.gif", "--interpolate", "noise", "--batch-size", "2"], "--batch-size and an animation"),
        (["--frames", "3"], "--frames and a page of images"),
        (["--batch-size", "3"], "--batch-size and a page of images"),
        (["--count", "2", "--per-sentence", "2"], "--count and --per-sentence"),
        (["--output", "a.gif"], "give --interpolate as well"),
        (["--output", "a.mp4", "--show", "attention"], "give --interpolate as well"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_without_effect_are_refused(fails, run, options, named):
    assert named in fails("sample", SENTENCE, *options)
    assert not Path("many").exists()


@pytest.mark.parametrize(("kind", "sentences"), [("sentences", 1), ("sentences", 3), ("noise", 2)])
def test_interpolation_needs_its_sentences(fails, run, kind, sentences):
    message = fails("sample", *[SENTENCE] * sentences, "--interpolate", kind)
    assert f"sentence(s), got {sentences}" in message


def test_sentences_of_a_file_fill_a_folder(icsd, run):
    Path("captions.txt").write_text("this flower has blue petals\n\nthis flower has red petals\n")
    for _ in range(2):
        code, out, _ = icsd("sample", "--file", "captions.txt", "--output", "generated", "--count", "5")
        assert (code, out) == (0, "generated\n")
    assert len(list(Path("generated").glob("*.png"))) == 5


def test_count_goes_round_the_sentences_and_per_sentence_shares_seeds(icsd, run):
    icsd("sample", "a red flower", SENTENCE, "--output", "all", "--count", "3", "--seed", "5")
    icsd("sample", "a red flower", SENTENCE, "--output", "each", "--per-sentence", "2", "--seed", "5")
    told = {
        name: [json.loads(line) for line in Path(name, "captions.jsonl").read_text().splitlines()]
        for name in ("all", "each")
    }
    red = "a red flower"
    assert [(line["caption"], line["seed"]) for line in told["all"]] == [(red, 5), (SENTENCE, 6), (red, 7)]
    assert [(line["caption"], line["seed"]) for line in told["each"]] == [
        (red, 5),
        (red, 6),
        (SENTENCE, 5),
        (SENTENCE, 6),
    ]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("from_stdin", [False, True])
def test_a_byte_order_mark_is_no_part_of_a_sentence(icsd, run, monkeypatch, ending, from_stdin):
    data = ending.join(["\ufeffa red flower", "a blue flower\u2028with petals", ""]).encode()
    Path("lines.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
    code, _, _ = icsd("sample", "--file", "-" if from_stdin else "lines.txt", "--output", "made")
    assert code == 0
    lines = Path("made/captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["caption"] for line in lines] == ["a red flower", "a blue flower\u2028with petals"]


@pytest.mark.parametrize("data", ["pétale".encode("latin1"), "a red flower".encode("utf-16"), b"\xff\xfe"])
def test_a_file_that_is_not_utf8_is_refused(fails, run, data):
    Path("lines.txt").write_bytes(data)
    assert "lines.txt, which is not UTF-8" in fails("sample", "--file", "lines.txt")


def test_a_file_without_end_is_refused(fails, run, monkeypatch):
    monkeypatch.setattr("icsd.cli.sample.LARGEST_FILE", 1 << 20)
    assert "larger than 1 MiB" in fails("sample", "--file", "/dev/zero")
    assert "missing.txt" in fails("sample", "--file", "missing.txt")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent/x{}", "there is no folder absent"),
        ("tiny.yaml/x{}", "tiny.yaml is not a folder"),
        ("there{}", "which is a folder"),
        ("locked/x{}", "cannot be written to"),
    ],
)
@pytest.mark.parametrize("command", [["sample", SENTENCE, "--output", ".png"], ["export", ".pt2"]], ids=str)
def test_a_wrong_place_is_refused_before_the_work(fails, run, monkeypatch, path, message, command):
    *arguments, suffix = command
    Path(f"there{suffix}").mkdir()
    Path("locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).stat().st_mode & stat.S_IWUSR)  # also for root
    monkeypatch.setattr("icsd.sampling.Sampler.load", None)
    assert message in fails(*arguments, path.format(suffix))


@pytest.mark.parametrize("command", [["sample", SENTENCE, "--output", "x.png"], ["export", "x.pt2"]], ids=str)
def test_a_full_disk_is_one_line_and_leaves_the_old_file(fails, run, monkeypatch, command):
    Path(command[-1]).write_text("old")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert fails(*command) == f"{command[-1]}: No space left on device"
    assert Path(command[-1]).read_text() == "old"
    assert not list(Path().glob(".x*"))


def test_the_generator_is_exported(icsd, fails, run):
    assert icsd("export", "generator.pt2") == (0, "generator.pt2\n", "")
    assert Path("generator.pt2").stat().st_size > 1000
    assert "give a .pt2 or .onnx file" in fails("export", "generator.bin")
