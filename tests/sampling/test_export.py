"""The exported generator paints what ours does, for other numbers of pictures and words than it was exported with."""

import pytest
import torch

from icsd.errors import InputError
from icsd.sampling import Painter
from icsd.sampling.export import INPUTS, example_inputs, export_generator

CASES = [["a woman"], ["a red flower", "a woman with dark skin", "a woman with a red flower"]]


@pytest.fixture
def painter(path):
    return Painter.load(path)


def expected(painter, sentences):
    return painter.paint(sentences, painter.noise(range(len(sentences)))).images


def test_torch_export(painter, tmp_path):
    export_generator(painter, tmp_path / "generator.pt2")
    program = torch.export.load(tmp_path / "generator.pt2").module()
    for sentences in CASES:
        images = program(*example_inputs(painter, sentences))
        for image, ours in zip(images, expected(painter, sentences), strict=True):
            torch.testing.assert_close(image, ours, rtol=1e-4, atol=1e-5)


def test_onnx(painter, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_generator(painter, tmp_path / "generator.onnx")
    session = runtime.InferenceSession(tmp_path / "generator.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["image_8", "image_16"]
    for sentences in CASES:
        inputs = dict(zip(INPUTS, (tensor.numpy() for tensor in example_inputs(painter, sentences)), strict=True))
        for image, ours in zip(session.run(None, inputs), expected(painter, sentences), strict=True):
            torch.testing.assert_close(torch.from_numpy(image), ours, rtol=1e-4, atol=1e-4)


def test_other_formats_are_refused(painter, tmp_path):
    with pytest.raises(InputError, match=r"give a \.pt2 or \.onnx file"):
        export_generator(painter, tmp_path / "generator.pth")
