"""The generator as a file for other runtimes: `torch.export` (.pt2) or ONNX (.onnx)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from icsd.errors import InputError
from icsd.models import TextFeatures
from icsd.sampling.sampler import Sampler

INPUTS = ("z", "condition_noise", "words", "sentence", "mask")


class PortableGenerator(nn.Module):
    """The generator on plain tensors.

    Args:
        sampler: The model.
    """

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        self.generator = sampler.model.generator

    def forward(
        self, z: Tensor, condition_noise: Tensor, words: Tensor, sentence: Tensor, mask: Tensor
    ) -> list[Tensor]:
        """Noise `(B, noise_dim)` and `(B, condition_dim)`, text features -> the images of every stage."""
        return self.generator(z, TextFeatures(words, sentence, mask), condition_noise).images


def example_inputs(sampler: Sampler, sentences: list[str], seed: int = 0) -> tuple[Tensor, ...]:
    """What the exported program takes for these sentences, in the order of `INPUTS`.

    The text encoder stays with icsd: it reads strings.
    """
    noise = sampler.noise(range(seed, seed + len(sentences)))
    with torch.no_grad():
        text = sampler.model.text_encoder(sentences)
    return (noise.z, noise.condition, text.words.contiguous(), text.sentence, text.mask)


def export_generator(sampler: Sampler, path: Path) -> None:
    """Write the generator, for any number of images and words.

    Args:
        sampler: The model, on the CPU.
        path: `.pt2` for `torch.export.load`, `.onnx` for ONNX runtimes.

    Raises:
        InputError: Another suffix, or the packages that ONNX takes are missing.
    """
    generator, dim = sampler.model.generator, sampler.model.text_encoder.dim
    noise = (torch.randn(2, generator.noise_dim), torch.randn(2, generator.condition_dim))
    inputs = (*noise, torch.randn(2, dim, 5), torch.randn(2, dim), torch.ones(2, 5, dtype=torch.bool))
    batch, words = torch.export.Dim("batch"), torch.export.Dim("words")
    shapes = ({0: batch}, {0: batch}, {0: batch, 2: words}, {0: batch}, {0: batch, 1: words})
    program = PortableGenerator(sampler).eval()
    if path.suffix == ".pt2":
        with torch.no_grad():
            torch.export.save(torch.export.export(program, inputs, dynamic_shapes=shapes), path)
    elif path.suffix == ".onnx":
        missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
        if missing:
            raise InputError(f'{missing[0]} is not installed; for ONNX: pip install "icsd[onnx]"')
        outputs = [f"image_{side}" for side in sampler.model.generator.resolutions]
        torch.onnx.export(
            program,
            inputs,
            path,
            input_names=list(INPUTS),
            output_names=outputs,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
    else:
        raise InputError(f"out is {path}: give a .pt2 or .onnx file")
