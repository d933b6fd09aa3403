"""The exported generator generates what ours does, for other numbers of images and words than it was exported with."""

import pytest
import torch

from icsd.errors import InputError
from icsd.sampling import Sampler
from icsd.sampling.export import INPUTS, example_inputs, export_generator

CASES = [["a woman"], ["a red flower", "a woman with dark skin", "a woman with a red flower"]]


@pytest.fixture
def sampler(path):
    return Sampler.load(path)


def expected(sampler, sentences):
    return sampler.generate(sentences, sampler.noise(range(len(sentences)))).images


def test_torch_export(sampler, tmp_path):
    export_generator(sampler, tmp_path / "generator.pt2")
    program = torch.export.load(tmp_path / "generator.pt2").module()
    for sentences in CASES:
        images = program(*example_inputs(sampler, sentences))
        for image, ours in zip(images, expected(sampler, sentences), strict=True):
            torch.testing.assert_close(image, ours, rtol=1e-4, atol=1e-5)


def test_onnx(sampler, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_generator(sampler, tmp_path / "generator.onnx")
    session = runtime.InferenceSession(tmp_path / "generator.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["image_8", "image_16"]
    for sentences in CASES:
        inputs = dict(zip(INPUTS, (tensor.numpy() for tensor in example_inputs(sampler, sentences)), strict=True))
        for image, ours in zip(session.run(None, inputs), expected(sampler, sentences), strict=True):
            torch.testing.assert_close(torch.from_numpy(image), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["absent/generator.pt2", "absent/generator.onnx", "folder.pt2"])
def test_a_wrong_place_is_refused(sampler, tmp_path, monkeypatch, name):
    (tmp_path / "folder.pt2").mkdir()
    monkeypatch.setattr(torch.export, "export", None)  # not reached
    with pytest.raises(InputError, match="output is"):
        export_generator(sampler, tmp_path / name)


def test_sentences_without_known_words_make_no_inputs(sampler):
    with pytest.raises(InputError, match="has no word"):
        example_inputs(sampler, ["a woman", "!!!"])


def test_other_formats_are_refused(sampler, tmp_path):
    with pytest.raises(InputError, match=r"give a \.pt2 or \.onnx file"):
        export_generator(sampler, tmp_path / "generator.pth")
