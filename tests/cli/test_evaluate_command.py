import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from icsd.evaluation import attributes, distances, evaluate, extractors, report
from icsd.evaluation.extractors import sha256_of
from icsd.sampling import Sampler
from icsd.training import checkpoint


@pytest.fixture
def quick(monkeypatch, workplace, icsd):
    """A trained run, with stubs for the network and the steps that take long."""

    def colors(images):
        return {"features": torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)}

    monkeypatch.setenv("ICSD_CACHE", str(workplace / "cache"))
    monkeypatch.setattr(extractors, "lite0", lambda device: extractors.Extractor("lite0", "a" * 64, "none", colors))
    monkeypatch.setattr("icsd.training.evaluation.lite0", lambda device: extractors.lite0(device))
    monkeypatch.setattr("icsd.training.evaluation.IMAGES", 10)
    monkeypatch.setattr(attributes, "STEPS", 1)
    code, _, err = icsd("train", "--config", "tiny.yaml", "--steps", "1")
    assert code == 0, err
    return workplace


RUN = "runs/procedural-flowers"


def test_a_run_is_evaluated_stage_by_stage_and_compared(icsd, fails, quick):
    code, out, err = icsd("evaluate", RUN, "--count", "10", "--device", "cpu", "--output", "first.json")
    assert code == 0, err
    for metric in ("kernel_distance", "inconsistency", "_accuracy", "diversity_between_captions"):
        assert metric in out
    stages = json.loads((quick / "first.json").read_text())["stages"]
    assert list(stages) == ["8", "16"]
    assert stages["8"]["protocol"]["generated_images"] == 10

    code, out, _ = icsd("evaluate", RUN, "--count", "10", "--device", "cpu", "--compare", "first.json")
    assert code == 0
    assert "differences: this evaluation minus first.json" in out
    code, _, err = icsd("evaluate", RUN, "--count", "12", "--device", "cpu", "--compare", "first.json")
    assert code == 2
    assert "cannot be compared: generated_images is 12 and 10" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "1"], "--count is 1: give at least 2 images to evaluate"),
        (["--stages", "[8,32]"], "--stages holds 32, which is no stage of this run: give some of 8, 16"),
        (["--compare", "missing.json"], "missing.json cannot be read"),
        (["--output", "missing/results.json"], "there is no folder missing"),
        (["--extractor", "inception"], "--extractor inception needs --weights"),
        (["--weights", "tiny.yaml"], "--weights is tiny.yaml, but --extractor lite0 takes none: name another"),
        (["--extractor", "dinov2", "--weights", "missing"], "missing holds no model.safetensors"),
        (["--encoder", RUN], "give a checkpoint or a run folder of `icsd pretrain`"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(icsd, quick, monkeypatch, arguments, message):
    monkeypatch.setattr(extractors, "import_extra", lambda name: pytest.fail(f"{name} is not needed"))
    if "dinov2" in arguments:
        monkeypatch.setattr(extractors, "import_extra", lambda name: None)
    code, _, err = icsd("evaluate", RUN, "--device", "cpu", *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_results_that_are_there_are_shown_again_and_only_for_the_same_question(icsd, quick, monkeypatch):
    options = ["evaluate", RUN, "--count", "70", "--device", "cpu"]
    whole = icsd(*options, "--output", "whole.json")[1]
    generate, calls = Sampler.generate, []

    def interrupted(sampler, sentences, noise):
        calls.append(len(sentences))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(sampler, sentences, noise)

    monkeypatch.setattr(Sampler, "generate", interrupted)
    code, _, err = icsd(*options)
    assert code == 130
    assert "the same command goes on after the last complete batch" in err
    code, out, _ = icsd(*options)
    assert code == 0
    assert calls == [64, 6, 6]
    assert out.split("\nresults")[0] == whole.split("\nresults")[0]
    assert [path.suffix for path in (quick / RUN / "evaluation").iterdir()] == [".json"]
    assert icsd(*options)[1] == out
    assert calls == [64, 6, 6]
    icsd(*options, "--seed", "1")
    assert calls == [64, 6, 6, 64, 6]


def test_a_folder_that_cannot_be_made_is_named_before_images_are_generated(icsd, quick, monkeypatch):
    (quick / RUN / "evaluation").write_text("this is no folder")
    options = ["evaluate", RUN, "--count", "10", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "generate", lambda *given: pytest.fail("an image is generated"))
        code, _, err = icsd(*options)
    assert code == 2
    assert "evaluation cannot be made (File exists): give --output FILE in another folder" in err
    kept = []
    generated_features = evaluate.generated_features
    monkeypatch.setattr(
        evaluate, "generated_features", lambda *given: kept.append(given[4].parent) or generated_features(*given)
    )
    (quick / "results").mkdir()
    assert icsd(*options, "--output", "results/10.json")[0] == 0
    assert kept == [Path("results")]
    assert [path.name for path in (quick / "results").iterdir()] == ["10.json"]


def test_the_table_is_printed_before_the_results_are_written(icsd, quick, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "to_json", full)
    code, out, err = icsd("evaluate", RUN, "--count", "10", "--device", "cpu")
    assert code == 2
    assert "kernel_distance" in out
    assert "No space left on device" in err


def test_a_checkpoint_that_is_replaced_meanwhile_is_refused(icsd, quick, monkeypatch):
    (path,) = (quick / RUN / "checkpoints").iterdir()
    load = Sampler.load

    def replaced(*given):
        sampler = load(*given)
        state = checkpoint.load(path)
        checkpoint.save(path, state | {"step": 2})
        return sampler

    monkeypatch.setattr(Sampler, "load", replaced)
    code, _, err = icsd("evaluate", str(path), "--count", "10", "--device", "cpu")
    assert code == 2
    assert "step-00000001.safetensors was replaced while it was read, as training does: evaluate a copy of it" in err


def test_results_without_torch_fidelity_are_not_shown_again_with_it(icsd, quick, monkeypatch):
    network = extractors.lite0("cpu")
    clip = extractors.Extractor("clip", network.sha256, network.resize, network.function)
    monkeypatch.setitem(extractors.EXTRACTORS, "clip", lambda folder, device: clip)
    options = ["evaluate", RUN, "--count", "10", "--device", "cpu", "--extractor", "clip", "--weights", "clip"]
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "left out: precision and recall (8 px, 16 px): torch-fidelity cannot be imported" in icsd(*options)[1]
    values = {"precision": 0.25, "recall": 0.5}
    metric = SimpleNamespace(
        KEY_METRIC_PRECISION="precision", KEY_METRIC_RECALL="recall", prc_features_to_metric=lambda *_, **__: values
    )
    monkeypatch.setattr(distances, "_torch_fidelity", lambda module: metric)
    assert "\nprecision " in icsd(*options)[1]


def test_one_stage_can_be_measured_alone(icsd, quick):
    code, _, err = icsd("evaluate", RUN, "--count", "10", "--device", "cpu", "--stages", "[8]", "--output", "8.json")
    assert code == 0, err
    (stage,) = json.loads((quick / "8.json").read_text())["stages"].values()
    assert "inconsistency" not in stage["metrics"]
    assert stage["left_out"]["inconsistency"] == "the refined stage of 16 px is not among the stages"
    assert "r_precision_training_encoder" in stage["metrics"]
    assert stage["measured_by"]["r_precision_training_encoder"].startswith("matching heads of the checkpoint ")


@pytest.fixture
def guided(icsd, quick):
    """Two pretraining runs, and a run that the first one guided."""
    options = ["--data.name", "procedural-flowers", "--data.size", "24", "--image.encoder", "cnn", "--image.width", "4"]
    options += [
        "--text.dim",
        "8",
        "--text.embedding-dim",
        "8",
        "--resolution",
        "16",
        "--steps",
        "2",
        "--batch-size",
        "4",
    ]
    for seed in ("0", "1"):
        code, _, err = icsd("pretrain", *options, "--seed", seed, "--name", f"damsm-{seed}", "--threads", "1")
        assert code == 0, err
    options = ["--damsm.checkpoint", "runs/damsm-0", "--steps", "2", "--evaluate-every", "1", "--name", "guided"]
    code, _, err = icsd("train", "--config", "tiny.yaml", *options)
    assert code == 0, err
    return quick


def test_r_precision_says_which_encoder_trained_the_model(icsd, guided):
    options = ["--count", "10", "--device", "cpu", "--encoder", "runs/damsm-1", "--output", "results.json"]
    code, _, err = icsd("evaluate", "runs/guided", *options)
    assert code == 0, err
    stage = json.loads((guided / "results.json").read_text())["stages"]["16"]
    networks = {name: stage["measured_by"][f"r_precision_{name}_encoder"] for name in ("training", "independent")}
    digests = [sha256_of(guided / f"runs/damsm-{seed}/checkpoints/step-00000002.safetensors") for seed in (0, 1)]
    assert networks == {"training": f"DAMSM {digests[0][:12]}", "independent": f"DAMSM {digests[1][:12]}"}
    lines = [json.loads(line) for line in (guided / "runs/guided/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "evaluation/16/r_precision_training_encoder" in line]
    assert [line["step"] for line in logged] == [1, 2]
    assert 0 <= stage["metrics"]["r_precision_independent_encoder"]["value"] <= 1

    code, _, err = icsd("evaluate", "runs/guided", "--device", "cpu", "--encoder", "runs/damsm-0")
    assert code == 2
    assert "--encoder runs/damsm-0 guided this model in training: give an independent one" in err
    shutil.rmtree(guided / "runs/damsm-0")
    code, out, err = icsd("evaluate", "runs/guided", "--count", "10", "--device", "cpu")
    assert code == 0, err
    assert "R-precision by the training encoder is left out" in out


def test_a_run_that_is_not_there_is_one_line(fails, workplace):
    assert "nowhere" in fails("evaluate", "nowhere")


def test_a_run_on_a_folder_of_images_is_evaluated(icsd, quick):
    assert icsd("data", "export", "images", "--data.name", "procedural-flowers", "--data.size", "24")[0] == 0
    options = ["--data.name", "folder", "--data.root", "images", "--data.test-fraction", "0.25", "--name", "own"]
    code, _, err = icsd("train", "--config", "tiny.yaml", "--steps", "1", *options)
    assert code == 0, err
    code, out, err = icsd("evaluate", "runs/own", "--count", "10", "--device", "cpu")
    assert code == 0, err
    assert "kernel_distance" in out
