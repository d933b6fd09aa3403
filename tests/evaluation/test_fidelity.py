"""Metrics of torch-fidelity and networks of transformers, with random weights, against independent implementations."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from icsd.errors import InputError
from icsd.evaluation import extractors
from icsd.evaluation.distances import frechet_distance, inception_score, precision_and_recall
from icsd.evaluation.encoders import clip_encoder
from icsd.evaluation.evaluate import distances

CPU = torch.device("cpu")


def features_of(count, dim, seed, shift=0.0):
    mixed = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) @ mixed + shift


def images_of(count, side, seed):
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_frechet_distance_is_the_formula(fidelity):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = features_of(50, 6, 0).double(), features_of(31, 6, 1, 0.4).double()
    a, b = (np.cov(each.numpy(), rowvar=False) for each in (x, y))
    means = (x.mean(0) - y.mean(0)).square().sum().item()
    expected = means + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(x, y).value == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_are_their_definition(fidelity):
    real, generated = features_of(40, 3, 0), features_of(25, 3, 1, 0.5)

    def inside(samples, manifold):
        radii = torch.cdist(manifold, manifold).sort(1).values[:, 3]
        return (torch.cdist(samples, manifold) <= radii).any(1).float().mean().item()

    found = precision_and_recall(real, generated)
    assert found["precision"].value == pytest.approx(inside(generated, real))
    assert found["recall"].value == pytest.approx(inside(real, generated))
    assert 0 < found["precision"].value < 1


def test_the_inception_score_is_its_definition(fidelity):
    logits = features_of(21, 7, 0)
    values = []
    shuffled = logits[np.random.RandomState(2020).permutation(21)]
    for part in shuffled.double().softmax(1).split(7):
        divergence = (part * (part.log() - part.mean(0).log())).sum(1)
        values.append(divergence.mean().exp().item())
    found = inception_score(logits, splits=3)
    assert found.value == pytest.approx(np.mean(values), rel=1e-5)
    assert found.error == pytest.approx(np.std(values, ddof=1) / 3**0.5, rel=1e-4)


@pytest.fixture(scope="module")
def weights(fidelity, tmp_path_factory):
    """A file of random weights in the layout of FID's Inception-v3."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    network = module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng([]):
        torch.manual_seed(0)
        patch.setattr(module, "load_state_dict_from_url", lambda *given, **named: {})
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        torch.save(network("inception", ["2048"]).state_dict(), path)
    return path


def test_our_metrics_are_those_that_torch_fidelity_computes_from_images(weights):
    import torch_fidelity

    extractor = extractors._inception(weights, "0" * 64, CPU)
    real, generated = images_of(10, 24, 0), images_of(10, 24, 1)
    x = extractor(real)
    y = {f"extractor/{name}": features for name, features in extractor(generated).items()}
    metrics, left_out = distances(x, y, "inception")
    expected = torch_fidelity.calculate_metrics(
        input1=_Images(generated),
        input2=_Images(real),
        feature_extractor_weights_path=str(weights),
        isc=True,
        kid=True,
        kid_subset_size=10,
        kid_subsets=1,
        isc_splits=10,
        samples_shuffle=False,
        cuda=False,
        cache=False,
        verbose=False,
    )
    assert metrics["kernel_distance"].value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert metrics["inception_score"].value == pytest.approx(expected["inception_score_mean"], rel=1e-5)
    assert "singular covariance of 2048 features" in left_out["frechet_distance"]
    assert "use the kernel distance" in left_out["frechet_distance"]


class _Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_weights_of_another_layout_are_one_line(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["fc.weight"] = state["fc.weight"][:1000]
    torch.save(state, tmp_path / "imagenet.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "code.pth")
    for name in ("imagenet.pth", "code.pth"):
        with pytest.raises(InputError, match="does not hold the weights of FID's Inception-v3") as caught:
            extractors._inception(tmp_path / name, "0" * 64, CPU)
        assert len(str(caught.value).splitlines()) == 1


@pytest.fixture(scope="module")
def clip_folder(fidelity, tmp_path_factory):
    """A folder with a tiny CLIP model of random weights and a tokenizer of single letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 20, "bos_token_id": 52, "eos_token_id": 53}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_scores_are_the_cosines_of_the_whole_model(clip_folder):
    import transformers

    captions, images = ["a bird", "red wings", "x"], images_of(3, 32, 0)
    encoder = clip_encoder(clip_folder, CPU)
    ours = F.cosine_similarity(encoder.images(images)[:, None], encoder.sentences(captions), dim=2)
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(clip_folder)(captions, padding=True, return_tensors="pt")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (extractors.CLIP_MEAN, extractors.CLIP_STD))
    with torch.no_grad():
        output = model(pixel_values=(images / 255 - mean) / std, **tokens)
    expected = output.logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert encoder.identity.startswith("CLIP ")
    assert encoder.sentences(["far too many letters for twenty positions"]).shape == (1, 12)


def test_the_features_of_clip_are_those_of_its_image_encoder(clip_folder):
    images = images_of(2, 16, 1)
    features = extractors.clip(clip_folder, CPU)(images)["features"]
    torch.testing.assert_close(features, clip_encoder(clip_folder, CPU).images(images))


TINY_DINOV2 = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def test_the_features_of_dinov2_are_its_class_token(fidelity, tmp_path):
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = transformers.Dinov2Model(transformers.Dinov2Config(**TINY_DINOV2)).eval()
    model.save_pretrained(tmp_path)
    images = images_of(2, 28, 0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (extractors.IMAGENET_MEAN, extractors.IMAGENET_STD))
    with torch.no_grad():
        expected = model(pixel_values=(images / 255 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(extractors.dinov2(tmp_path, CPU)(images)["features"], expected, rtol=1e-4, atol=1e-5)


def test_a_folder_with_another_model_is_one_line(clip_folder, tmp_path):
    with pytest.raises(InputError, match=r"holds no model.safetensors: give the folder of a model"):
        extractors.dinov2(tmp_path, CPU)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    for load in (clip_encoder, extractors.clip):
        with pytest.raises(InputError, match="holds no CLIPModel of transformers") as caught:
            load(tmp_path, CPU)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        (
            lambda name: f"visual.{name}",
            r"does not fit CLIPModel .* \d+ tensors are missing, such as .*: give the folder",
        ),
        (
            lambda name: name if name.startswith("vision_model.") else None,
            r"\d+ tensors are missing, such as (logit_scale|text_)",
        ),
        (
            lambda name: None if name == "visual_projection.weight" else name,
            "1 tensors are missing, such as visual_projection.weight",
        ),
    ],
)
def test_a_file_without_all_tensors_of_the_network_is_refused(clip_folder, tmp_path, renamed, message):
    tensors = {renamed(name): tensor for name, tensor in load_file(clip_folder / "model.safetensors").items()}
    tensors.pop(None, None)
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for load in (clip_encoder, extractors.clip):
        with pytest.raises(InputError, match=message):
            load(tmp_path, CPU)


def test_tensors_in_excess_are_refused_unless_they_have_no_influence(clip_folder, tmp_path):
    tensors = load_file(clip_folder / "model.safetensors")
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    positions = {"vision_model.embeddings.position_ids": torch.arange(17)}
    save_file(tensors | positions, tmp_path / "model.safetensors", {"format": "pt"})
    extractors.clip(tmp_path, CPU)
    save_file(tensors | {"vision_model.register_tokens": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 tensors are unknown, such as vision_model\.register_tokens"):
        extractors.clip(tmp_path, CPU)


def test_a_model_with_register_tokens_is_not_taken_for_dinov2(fidelity, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(**TINY_DINOV2)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="a model of the type dinov2_with_registers: give the folder of one of the typ"
    ):
        extractors.dinov2(tmp_path, CPU)
