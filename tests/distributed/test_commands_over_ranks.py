"""Evaluation, folders of images and ablations on several ranks, against one process."""

import contextlib
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from icsd.cli import ablate
from icsd.cli.main import main
from icsd.data import CaptionedImages
from icsd.errors import InputError
from icsd.evaluation import report
from icsd.evaluation.distances import Estimate
from icsd.evaluation.evaluate import Evaluation, StageResult
from icsd.evaluation.extractors import Extractor
from icsd.evaluation.features import Plan
from icsd.evaluation.protocol import Protocol
from icsd.sampling import Plan as SamplingPlan
from icsd.sampling.folder import generate_folder
from icsd.team import Team

COUNT = 200  # three batches of 64 images and a smaller one


class Generator:
    """Returns noise of the seeds, in two stages, and counts its calls; one seed may give no finite image."""

    def __init__(self, bad_seed=None):
        self.bad_seed, self.calls = bad_seed, 0

    def __call__(self, captions, seeds):
        self.calls += 1
        images = torch.stack([torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        if self.bad_seed in seeds:
            images[0] = torch.nan
        return [F.adaptive_avg_pool2d(images, 8), images]


def colors(images):
    return {"features": F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)}


def evaluated(group, generator, cache, folder):
    """Return the metrics of every stage, and how often this rank generated."""
    images = torch.randint(0, 256, (70, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    test_set = CaptionedImages("made", "test", images, [[f"image {k}"] for k in range(70)], [0] * 70)
    plan = Plan([captions[0] for captions in test_set.captions], COUNT, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICSD_CACHE", str(cache))
        extractor, team = Extractor("colors", "e" * 64, "none", colors), Team(group)
        evaluation = team.led(lambda: Evaluation(plan, test_set, [8, 16], extractor, team=team))
        return evaluation.measure(generator, folder), generator.calls


def test_an_evaluation_is_that_of_one_process_and_goes_on_with_any_number_of_ranks(ranks, tmp_path):
    truth, calls = evaluated(None, Generator(), tmp_path / "cache", None)
    assert calls == 4
    results = ranks.run(3, evaluated, Generator(), tmp_path / "other-cache", tmp_path / "features")
    assert results == [(truth, 2), (truth, 1), (truth, 1)]
    (tmp_path / "features" / "images-00000064.safetensors").unlink()
    again = ranks.run(2, evaluated, Generator(), tmp_path / "cache", tmp_path / "features")
    assert again == [(truth, 0), (truth, 1)]


def test_images_that_are_not_finite_end_the_evaluation_on_every_rank(ranks, tmp_path):
    for outcome in ranks.outcomes(2, evaluated, Generator(bad_seed=70), tmp_path, None):
        assert outcome.kind is InputError
        assert "images that are not finite at 8 px" in str(outcome)


def sampled(group, path, folder):
    """Generate 11 images in batches of 2; return the number of images that this rank generated."""

    def generate(sentences, noise):
        return SimpleNamespace(images=[torch.stack([torch.full((3, 8, 8), seed / 11) for seed in noise])])

    sampler = SimpleNamespace(
        path=path,
        device=torch.device("cpu"),
        attribution="by someone",
        check=lambda sentences: None,
        noise=lambda seeds, truncation: seeds,
        generate=generate,
    )
    return generate_folder(sampler, SamplingPlan(("a", "b"), count=11), folder, batch_size=2, team=Team(group))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_of_images_has_the_bytes_of_one_process(ranks, tmp_path):
    (tmp_path / "model").write_bytes(b"weights")
    assert sampled(None, tmp_path / "model", tmp_path / "alone") == 11
    assert ranks.run(4, sampled, tmp_path / "model", tmp_path / "together") == [4, 3, 2, 2]
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    for file in ("03.png", "04.png", "captions.jsonl"):
        (tmp_path / "together" / file).unlink()
    assert ranks.run(2, sampled, tmp_path / "model", tmp_path / "together") == [1, 1]
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for outcome in ranks.outcomes(3, sampled, tmp_path / "model", tmp_path / "used"):
        assert "is not empty and was not begun by this command" in str(outcome)


# Stands for the program: training leaves a checkpoint, evaluation leaves results, and each call leaves a line.
STUB = """
import json, os, pathlib, sys
kind, arguments = sys.argv[1], sys.argv[1:]
launch = sorted(set(os.environ) & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_MAX_RESTARTS"})
with open("calls.txt", "a") as file:
    file.write(json.dumps([kind, launch]) + "\\n")
if kind == "train":
    folder = pathlib.Path(arguments[arguments.index("--output") + 1]) / arguments[arguments.index("--name") + 1]
    folder.joinpath("checkpoints").mkdir(parents=True)
    folder.joinpath("config.yaml").write_text("steps: 2")
    folder.joinpath("metrics.jsonl").write_text('{"step": 2, "seconds": 2, "cpu_seconds": 2}\\n')
else:
    folder = pathlib.Path(arguments[1])
    if folder == pathlib.Path("runs/b/seed-2"):
        sys.exit(3)
    folder.joinpath("results.json").write_text(pathlib.Path("results.json").read_text())
"""


def ablated(group, workplace):
    """Run the sweep as a rank of torchrun would; return the exit code and what it printed."""
    rank = {"RANK": dist.get_rank(), "WORLD_SIZE": 4, "LOCAL_RANK": 0, "TORCHELASTIC_MAX_RESTARTS": 3}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(workplace)
        patch.setattr(ablate, "PROGRAM", [sys.executable, "-S", "stub.py"])
        for name, value in rank.items():
            patch.setenv(name, str(value))
        return main(["ablate", "sweep.yaml", "--output", "runs", "--jobs", "2"]), out.getvalue()


def test_ranks_share_the_runs_of_an_ablation(ranks, tmp_path):
    pytest.importorskip("scipy")
    protocol = Protocol("lite0", "a" * 64, "bilinear", 16, "made, test split", "b" * 64, 9, 20, "c" * 64, 0)
    results = {16: StageResult(protocol, {"kernel_distance": Estimate(1.0, 0.1)})}
    (tmp_path / "results.json").write_text(report.to_json("made", 2, results, "key"))
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "sweep.yaml").write_text("base: []\narms: {a: [], b: []}\nreference: a\nseeds: [1, 2]\ncount: 20\n")
    (code, out), *others = ranks.run(4, ablated, tmp_path)
    assert code == 2  # one run failed, on some rank
    assert others == [(2, "")] * 3
    assert "runs         3 of 4 finished" in out
    calls = [json.loads(line) for line in (tmp_path / "calls.txt").read_text().splitlines()]
    assert sorted(kind for kind, _ in calls) == ["evaluate"] * 4 + ["train"] * 4
    assert all(launch == [] for _, launch in calls)
