import types

import pytest
import torch
from safetensors import SafetensorError

from icsd.data import CaptionedImages
from icsd.errors import InputError
from icsd.evaluation import cache as cache_module
from icsd.evaluation import extractors, real, report
from icsd.evaluation.attributes import AttributeClassifier
from icsd.evaluation.encoders import Encoder
from icsd.evaluation.evaluate import Classifier, Evaluation
from icsd.evaluation.extractors import Extractor, inception
from icsd.evaluation.features import Plan
from icsd.evaluation.protocol import VERSION
from icsd.evaluation.real import real_images

RESOLUTIONS = [8, 16]
NOTE = "cannot be written to or is full: a later run makes again what it does not keep"


def colors(images):
    """Return the mean color of every quarter of the images."""
    return {"features": torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)}


EXTRACTOR = Extractor("colors", "e" * 64, "none", colors)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ICSD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def test_set():
    images = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bright = torch.arange(30) % 2
    images = (images // 2 + 127 * bright.view(-1, 1, 1, 1)).to(torch.uint8)
    captions = [[f"image {k}"] for k in range(30)]
    names = {"light": ["dark", "bright"]}
    return CaptionedImages("made", "test", images, captions, [0] * 30, {"light": bright}, names)


class Generator:
    """Returns the real image that a caption names, with noise, and counts its calls."""

    def __init__(self, test_set, noise=0.0):
        self.images, self.noise, self.calls = test_set.images / 127.5 - 1, noise, 0

    def __call__(self, captions, seeds):
        self.calls += 1
        chosen = self.images[[int(caption.split()[1]) for caption in captions]]
        noise = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        images = (chosen + self.noise * noise).clamp(-1, 1)
        return [torch.nn.functional.adaptive_avg_pool2d(images, resolution) for resolution in RESOLUTIONS]


def evaluate(generate, plan, test_set, resolutions, extractor, folder, **networks):
    return Evaluation(plan, test_set, resolutions, extractor, **networks).measure(generate, folder)


def plan_of(test_set, count=90):
    return Plan([captions[0] for captions in test_set.captions], count, 0)


def test_perfect_images_have_no_distance_and_are_consistent(test_set, tmp_path):
    results = evaluate(Generator(test_set), plan_of(test_set), test_set, RESOLUTIONS, EXTRACTOR, tmp_path)
    for resolution, result in results.items():
        assert result.protocol.resolution == resolution
        assert result.protocol.generated_images == 90
        assert abs(result.metrics["kernel_distance"].value) < 0.02
        assert result.metrics["diversity_within_caption"].value == 0
        assert result.metrics["diversity_between_captions"].value > 0.1
    assert results[8].metrics["inconsistency"].value < 1e-6
    assert "inconsistency" not in results[16].metrics


def test_real_images_show_how_inconsistent_perfect_stages_are(test_set, tmp_path):
    corner = Extractor("corner", "c" * 64, "none", lambda images: {"features": images[..., :2, :2].float().flatten(1)})
    results = evaluate(Generator(test_set), plan_of(test_set, 30), test_set, RESOLUTIONS, corner, tmp_path)
    metrics = results[8].metrics
    assert metrics["inconsistency_real"].value > 1e-4
    assert metrics["inconsistency_real"].value == pytest.approx(metrics["inconsistency"].value, rel=1e-3)
    assert "inconsistency_real" not in results[16].metrics


def test_noise_is_seen_in_distance_and_diversity(test_set, tmp_path):
    clean, noisy = (
        evaluate(Generator(test_set, noise), plan_of(test_set), test_set, RESOLUTIONS, EXTRACTOR, tmp_path / str(noise))
        for noise in (0.0, 2.0)
    )
    for name in ("kernel_distance", "diversity_within_caption"):
        assert noisy[16].metrics[name].value > clean[16].metrics[name].value + 0.01


def test_an_interrupted_evaluation_goes_on_where_it_was(test_set, tmp_path):
    generator = Generator(test_set, 0.5)
    arguments = (plan_of(test_set, 200), test_set, RESOLUTIONS, EXTRACTOR)
    whole = evaluate(generator, *arguments, tmp_path / "whole")

    def interrupted(captions, seeds):
        if seeds[0] >= 128:
            raise KeyboardInterrupt
        return generator(captions, seeds)

    with pytest.raises(KeyboardInterrupt):
        evaluate(interrupted, *arguments, tmp_path / "part")
    generator.calls = 0
    resumed = evaluate(generator, *arguments, tmp_path / "part")
    assert generator.calls == 2
    assert resumed == whole


def test_a_torn_file_of_features_is_made_again(test_set, tmp_path):
    arguments = (Generator(test_set), plan_of(test_set), test_set, RESOLUTIONS, EXTRACTOR, tmp_path)
    whole = evaluate(*arguments)
    file = next(tmp_path.glob("images-*"))
    file.write_bytes(file.read_bytes()[:-100])
    assert evaluate(*arguments) == whole


def test_a_folder_that_cannot_be_written_costs_no_result(test_set, tmp_path, monkeypatch, capsys):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    arguments = (Generator(test_set), plan_of(test_set), test_set, RESOLUTIONS, EXTRACTOR)
    expected = evaluate(*arguments, None)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "save_file", full)
        assert evaluate(*arguments, tmp_path / "full") == expected
    assert list((tmp_path / "full").iterdir()) == []
    (tmp_path / "file").write_text("this is no folder")
    assert evaluate(*arguments, tmp_path / "file") == expected
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note ")]
    assert notes == [f"note         {tmp_path / name} {NOTE}" for name in ("full", "file")]


def test_real_features_are_kept_by_content(test_set, tmp_path):
    calls = []
    extractor = Extractor("colors", "e" * 64, "none", lambda images: calls.append(len(images)) or colors(images))
    arguments = (Generator(test_set), plan_of(test_set, 64), test_set, RESOLUTIONS, extractor)
    evaluate(*arguments, tmp_path / "a")
    before = len(calls)
    evaluate(*arguments, tmp_path / "b")
    assert len(calls) - before == len(RESOLUTIONS)  # the generated images alone
    test_set.images = 255 - test_set.images
    evaluate(*arguments, tmp_path / "c")
    assert len(calls) - before == 4 * len(RESOLUTIONS) - len(RESOLUTIONS)


def test_real_features_are_not_taken_from_an_extractor_that_resizes_in_another_way(test_set):
    def means(images):
        return {"features": images.float().mean((2, 3))}

    first, other = Extractor("means", "e" * 64, "none", means), Extractor("means", "e" * 64, "to 8", colors)
    real.RealImages.of(test_set, 16, first, None)
    assert real.RealImages.of(test_set, 16, other, None).features["features"].shape == (30, 12)


def test_r_precision_of_an_encoder_that_knows_and_of_one_that_does_not(test_set, tmp_path):
    target = torch.eye(30)
    positions = {caption: k for k, caption in enumerate(plan_of(test_set).captions)}
    exact = real_images(test_set, 16).flatten(1).float()

    def knowing(images):
        return (
            target[torch.cdist(images.flatten(1).float(), exact).argmin(1)]
            if images.shape[-1] == 16
            else target[:1].expand(len(images), -1)
        )

    encoders = [
        Encoder("knowing", "knowing 0", knowing, lambda captions: target[[positions[caption] for caption in captions]]),
        Encoder(
            "blind",
            "blind 0",
            lambda images: torch.ones(len(images), 30),
            lambda captions: target[[positions[c] for c in captions]],
        ),
    ]
    results = evaluate(
        Generator(test_set), plan_of(test_set), test_set, RESOLUTIONS, EXTRACTOR, tmp_path, encoders=encoders
    )
    assert results[16].metrics["r_precision_knowing"].value == 1
    assert results[16].metrics["r_precision_blind"].value == 0


def test_every_caption_is_a_candidate_however_few_images_there_are(test_set):
    def tempted(images):
        return torch.eye(30)[0].add(2 * torch.eye(30)[20]).expand(len(images), 30)

    encoder = Encoder("tempted", "tempted 0", tempted, lambda captions: torch.eye(30)[[int(c[6:]) for c in captions]])
    evaluation = Evaluation(plan_of(test_set, 2), test_set, [16], EXTRACTOR, encoders=[encoder])
    results = evaluation.measure(lambda *given: Generator(test_set)(*given)[1:])
    assert results[16].metrics["r_precision_tempted"].value == 0


def test_no_more_captions_are_encoded_than_images_have(test_set, monkeypatch):
    monkeypatch.setattr("icsd.evaluation.evaluate.CANDIDATES", 5)
    seen = []

    def sentences(captions):
        seen.extend(captions)
        return torch.eye(30)[[int(c[6:]) for c in captions]]

    encoder = Encoder("knowing", "knowing 0", lambda images: torch.eye(30)[: len(images)], sentences)
    evaluation = Evaluation(plan_of(test_set, 8), test_set, [16], EXTRACTOR, encoders=[encoder])
    results = evaluation.measure(lambda *given: Generator(test_set)(*given)[1:])
    assert len(seen) == 8
    assert results[16].metrics["r_precision_knowing"].value == 1


def test_real_images_are_measured_in_batches(test_set, monkeypatch):
    class Brightness(AttributeClassifier):
        def read(self, images, batch_size=64):
            sizes.append(len(images))
            return {"light": (images.mean((1, 2, 3)) > 0).long()}

    sizes, thumbnails_of = [], real.thumbnails_of
    monkeypatch.setattr(real, "thumbnails_of", lambda images: sizes.append(len(images)) or thumbnails_of(images))
    test_set.images = torch.cat([test_set.images] * 3)
    test_set.images[70, :, 3, 5] = 9
    test_set.images[:, :, 2, 2] = 7
    test_set.captions, test_set.class_ids = [[f"image {k}"] for k in range(90)], [0] * 90
    found = real.RealImages.of(test_set, 16, EXTRACTOR, Brightness({"light": 2}))
    assert sizes == [64, 26, 64, 26]
    assert len(found.attributes["light"]) == 90
    assert found.constant[:, 2, 2].all()
    assert found.constant.sum() == 3
    assert found.diversity["diversity_between_captions_real"].value > 0.1


def test_attributes_are_read_at_the_resolution_of_the_classifier(test_set, tmp_path):
    class Brightness(AttributeClassifier):
        def read(self, images, batch_size=64):
            return {"light": (images.mean((1, 2, 3)) > 0).long()}

    classifiers = {16: Classifier(Brightness({"light": 2}), "recipe")}
    results = evaluate(
        Generator(test_set), plan_of(test_set), test_set, RESOLUTIONS, EXTRACTOR, tmp_path, classifiers=classifiers
    )
    assert results[16].metrics["light_accuracy"].value == 1
    assert results[16].metrics["light_accuracy_real"].value == 1
    assert results[16].metrics["light_accuracy_shuffled"].value == pytest.approx(0.5)
    assert "light_accuracy" not in results[8].metrics


def test_images_that_are_not_finite_are_refused(test_set, tmp_path):
    def broken(captions, seeds):
        return [torch.full((len(seeds), 3, resolution, resolution), torch.nan) for resolution in RESOLUTIONS]

    with pytest.raises(InputError, match="images that are not finite at 8 px: use an earlier checkpoint"):
        evaluate(broken, plan_of(test_set), test_set, RESOLUTIONS, EXTRACTOR, tmp_path)


def test_stages_of_other_resolutions_are_refused(test_set, tmp_path):
    generator = Generator(test_set)
    with pytest.raises(InputError, match=r"images of shape \(3, 16, 16\) at the stage of 8 px"):
        evaluate(lambda *given: generator(*given)[::-1], plan_of(test_set), test_set, RESOLUTIONS, EXTRACTOR, None)


def test_features_that_are_not_finite_are_refused(test_set):
    broken = Extractor("broken", "b" * 64, "none", lambda images: {"features": torch.full((len(images), 2), torch.inf)})
    with pytest.raises(InputError, match="the extractor broken gives features that are not finite"):
        evaluate(Generator(test_set), plan_of(test_set), test_set, RESOLUTIONS, broken, None)


def test_an_empty_and_a_tiny_real_set_are_refused(test_set):
    with pytest.raises(InputError, match="the test split is empty"):
        Plan([], 10, 0)
    test_set.images, test_set.captions = test_set.images[:1], test_set.captions[:1]
    with pytest.raises(InputError, match="the test split of made has 1 image, and an evaluation needs at least 2"):
        Evaluation(plan_of(test_set, 5), test_set, RESOLUTIONS, EXTRACTOR)


def test_a_metric_that_cannot_be_measured_is_left_out_with_its_reason(test_set):
    wide = Extractor("wide", "w" * 64, "none", lambda images: {"features": images.float().flatten(1)[:, :64] / 255})
    results = evaluate(Generator(test_set), plan_of(test_set), test_set, [8, 16], wide, None)
    reason = results[16].left_out["frechet_distance"]
    assert "30 real images have a singular covariance of 64 features" in reason
    assert "use the kernel distance" in reason
    assert results[16].metrics["kernel_distance"].value < 0.1
    few = Evaluation(plan_of(test_set, 30), test_set, [8], wide).measure(lambda *given: Generator(test_set)(*given)[:1])
    reason = few[8].left_out["diversity_within_caption"]
    assert reason == "no caption has two images: give a --count of more than 30, the number of captions"
    assert results[16].left_out["diversity_within_caption_real"] == "no two real images share a caption"
    table = report.table(results)
    assert table.count("left out: frechet_distance (8 px, 16 px): 30 real images") == 1


def test_pixels_that_are_the_same_in_all_real_images_have_an_error(test_set):
    test_set.images[:, :, :2, 4:8] = torch.tensor([255, 0, 102], dtype=torch.uint8).view(3, 1, 1)
    clean, noisy = (
        evaluate(Generator(test_set, noise), plan_of(test_set), test_set, RESOLUTIONS, EXTRACTOR, None)[16].metrics
        for noise in (0.0, 0.5)
    )
    assert clean["constant_pixel_error"].value == 0
    # Values at the end of the range can only err to one side, those in between to both.
    half = 0.5 * (2 / torch.pi) ** 0.5
    assert noisy["constant_pixel_error"].value == pytest.approx(half * (0.5 + 0.5 + 1) / 3, rel=0.1)
    test_set.images[0, :, 0, 4] = 7
    test_set.images[0, :, :2, 4:8] += 1
    results = evaluate(Generator(test_set), plan_of(test_set), test_set, RESOLUTIONS, EXTRACTOR, None)
    assert results[16].left_out["constant_pixel_error"] == "no pixel is the same in all real images"


def test_the_diversity_of_real_images_of_one_caption_stands_beside_that_of_seeds(test_set):
    test_set.images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).mul(5).expand(30, 3, 16, 16).contiguous()
    test_set.captions[4].append("a common caption")
    test_set.captions[7].append("a common caption")
    metrics = evaluate(Generator(test_set), plan_of(test_set), test_set, [8, 16], EXTRACTOR, None)[16].metrics
    assert metrics["diversity_within_caption_real"].value == pytest.approx(3 * 5 / 127.5, abs=1e-3)
    assert metrics["diversity_between_captions_real"].value == pytest.approx(5 / 127.5, abs=1e-3)


def test_metrics_of_different_networks_are_not_compared(test_set):
    class Brightness(AttributeClassifier):
        def read(self, images, batch_size=64):
            return {"light": (images.mean((1, 2, 3)) > 0).long()}

    one, other = (
        evaluate(
            Generator(test_set),
            plan_of(test_set),
            test_set,
            RESOLUTIONS,
            EXTRACTOR,
            None,
            classifiers={16: Classifier(Brightness({"light": 2}), recipe)},
        )
        for recipe in ("0123", "4567")
    )
    text = report.comparison(one, other)
    assert "kernel_distance" in text
    assert "left out: light_accuracy (16 px): measured by attribute classifier 0123 and by" in text
    assert "light_accuracy " not in report.comparison(one, one).split("left out")[1:]
    assert "light_accuracy " in report.comparison(one, one)


def test_a_metric_that_one_of_two_evaluations_lacks_is_left_out_of_their_comparison(test_set):
    encoder = Encoder("made", "made 0", lambda images: torch.ones(len(images), 3), lambda captions: torch.rand(30, 3))
    one, other = (
        evaluate(
            Generator(test_set), plan_of(test_set), test_set, RESOLUTIONS, EXTRACTOR, None, encoders=[encoder][:count]
        )
        for count in (1, 0)
    )
    reason = "left out: r_precision_made (8 px, 16 px): one of the evaluations did not measure it"
    for text in (report.comparison(one, other), report.comparison(other, one)):
        assert reason in text.splitlines()
        assert "kernel_distance" in text


def test_weights_of_another_layout_are_refused_in_one_line(tmp_path, monkeypatch):
    def network(*given):
        raise RuntimeError("Error(s) in loading state_dict:\n  size mismatch for fc.weight")

    fidelity = types.SimpleNamespace(FeatureExtractorInceptionV3=network)
    monkeypatch.setattr(extractors, "import_extra", lambda name: fidelity)
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.ones(2)}, path)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors.sha256_of(path)[:8])
    with pytest.raises(InputError, match="does not hold the weights of FID's Inception-v3") as caught:
        inception(path, torch.device("cpu"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(test_set, count):
    with pytest.raises(InputError, match=f"--count is {count}: give at least 2"):
        plan_of(test_set, count)


def test_weights_of_another_hash_are_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    with pytest.raises(InputError, match=r"has the SHA-256 .*, not 6726825d"):
        inception(tmp_path / "weights.pth", torch.device("cpu"))
    with pytest.raises(InputError, match="cannot be read"):
        inception(tmp_path / "missing.pth", torch.device("cpu"))


def test_results_are_read_back_and_compared_under_one_protocol_only(test_set, tmp_path):
    clean, noisy, fewer = (
        evaluate(
            Generator(test_set, noise), plan_of(test_set, count), test_set, RESOLUTIONS, EXTRACTOR, tmp_path / name
        )
        for name, noise, count in (("clean", 0.0, 90), ("noisy", 2.0, 90), ("fewer", 0.0, 60))
    )
    path = tmp_path / "results.json"
    path.write_text(report.to_json("checkpoint", 7, clean, "key"))
    assert report.read(path) == clean
    assert report.key_of(path) == "key"
    assert report.key_of(tmp_path / "missing.json") is None
    assert "protocol" in report.table(clean)
    assert "kernel_distance" in report.comparison(noisy, report.read(path))
    with pytest.raises(InputError, match="cannot be compared: generated_images is 60 and 90"):
        report.comparison(fewer, report.read(path))
    path.write_text(path.read_text().replace('"version": ', '"version": 1'))
    with pytest.raises(InputError, match=r"^[^ ]* holds metrics of another version of icsd: evaluate the run again$"):
        report.read(path)
    path.write_text(f'{{"version": {VERSION}, "stages": {{"8": {{}}}}}}')
    with pytest.raises(InputError, match="holds no results of `icsd evaluate`"):
        report.read(path)
