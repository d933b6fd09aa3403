"""Sentences to images: the part of the model that is averaged, saved and sampled from."""

import torch
from torch import Tensor, nn

from icsd.models.generator import Generator, GeneratorConfig, GeneratorOutput
from icsd.models.text import TextEncoder


class TextToImage(nn.Module):
    """A text encoder and the generator it feeds.

    Args:
        text_encoder: Reads the captions.
        config: The generator's stages and widths.
    """

    def __init__(self, text_encoder: TextEncoder, config: GeneratorConfig) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.generator = Generator(config, text_encoder.dim)

    def forward(self, ids: Tensor, lengths: Tensor, z: Tensor) -> GeneratorOutput:
        """Return what the generator makes of B captions, as token ids, and noise `(B, noise_dim)`."""
        return self.generator(z, self.text_encoder(ids, lengths))

    @torch.no_grad()
    def generate(self, captions: list[str], seed: int = 0, batch_size: int = 64) -> list[Tensor]:
        """Generate images of captions, with running statistics and without touching the global random state.

        Args:
            captions: B sentences.
            seed: Seed of noise and conditions; the same seed and captions give the same images.
            batch_size: Captions generated at once.

        Returns:
            One `(B, 3, r, r)` in [-1, 1] per stage, coarse to fine, on the CPU.
        """
        device = next(self.generator.parameters()).device
        was_training = self.training
        self.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            batches = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
            generated = []
            for batch in batches:
                noise = torch.randn(len(batch), self.generator.noise_dim).to(device)
                generated.append(self(*self.text_encoder.tokenizer(batch), noise).images)
        self.train(was_training)
        return [torch.cat([image.cpu() for image in stage]) for stage in zip(*generated, strict=True)]
