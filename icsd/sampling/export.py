"""Export of the generator for other runtimes: `torch.export` (.pt2) or ONNX (.onnx)."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from icsd.errors import InputError
from icsd.models import TextFeatures
from icsd.outputs import check_output, replacing
from icsd.sampling.sampler import Sampler

INPUTS = ("z", "condition_noise", "words", "sentence", "mask")
FORMATS = (".pt2", ".onnx")


class PortableGenerator(nn.Module):
    """The generator as a function of plain tensors.

    Args:
        sampler: The model.
    """

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        self.generator = sampler.model.generator

    def forward(
        self, z: Tensor, condition_noise: Tensor, words: Tensor, sentence: Tensor, mask: Tensor
    ) -> list[Tensor]:
        """Generate the images of every stage from noise `(B, noise_dim)`, `(B, condition_dim)` and text features."""
        return self.generator(z, TextFeatures(words, sentence, mask), condition_noise).images


def example_inputs(sampler: Sampler, sentences: list[str], seed: int = 0) -> tuple[Tensor, ...]:
    """Return the inputs of the exported program for some sentences, in the order of `INPUTS`.

    The text encoder is not exported, because it reads strings.

    Args:
        sampler: The model.
        sentences: B sentences.
        seed: Seed of the first image; the next ones count up.

    Raises:
        InputError: A sentence cannot be read, or the seed is out of range.
    """
    noise = sampler.noise(range(seed, seed + len(sentences)))
    text = sampler.encode(sentences)
    return (noise.z, noise.condition, text.words.contiguous(), text.sentence, text.mask)


def check_export(path: Path) -> None:
    """Check that the generator can be exported to a path.

    Args:
        path: `.pt2` for `torch.export.load`, `.onnx` for ONNX runtimes.

    Raises:
        InputError: The path has another suffix or cannot be written, or the packages that ONNX needs are missing.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"output is {path}: give a .pt2 or .onnx file")
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if path.suffix == ".onnx" and missing:
        raise InputError(f'{missing[0]} is not installed; for ONNX: pip install -e ".[onnx]" in the checkout')
    check_output(path)


def export_generator(sampler: Sampler, path: Path) -> None:
    """Export the generator for any number of images and words.

    Args:
        sampler: The model, on the CPU.
        path: `.pt2` for `torch.export.load`, `.onnx` for ONNX runtimes.

    Raises:
        InputError: See `check_export`.
        OSError: The file cannot be written; what was at ``path`` before is unchanged.
    """
    check_export(path)
    generator, dim = sampler.model.generator, sampler.model.text_encoder.dim
    noise = (torch.randn(2, generator.noise_dim), torch.randn(2, generator.condition_dim))
    inputs = (*noise, torch.randn(2, dim, 5), torch.randn(2, dim), torch.ones(2, 5, dtype=torch.bool))
    batch, words = torch.export.Dim("batch"), torch.export.Dim("words")
    shapes = ({0: batch}, {0: batch}, {0: batch, 2: words}, {0: batch}, {0: batch, 1: words})
    program = PortableGenerator(sampler).eval()
    with replacing(path) as temporary, torch.no_grad():
        if path.suffix == ".pt2":
            buffer = io.BytesIO()  # torch reports a full disk as a RuntimeError, Python as an OSError
            torch.export.save(torch.export.export(program, inputs, dynamic_shapes=shapes), buffer)
            temporary.write_bytes(buffer.getbuffer())
        else:
            torch.onnx.export(
                program,
                inputs,
                temporary,
                input_names=list(INPUTS),
                output_names=[f"image_{resolution}" for resolution in generator.resolutions],
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
