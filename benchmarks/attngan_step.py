"""The rival of our training step: AttnGAN's step (Xu et al. 2018) as plain PyTorch says it.

Written from the description of networks and losses: eager, float32 or autocast to bfloat16, NCHW, PyTorch's default
Adam, a pass through the discriminators for each kind of image, and nothing of this package. The sizes are those of
`configs/birds.yaml`. A test holds both steps to the same losses. DAMSM, the same work for both, is left out of both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOISE, CONDITION, TEXT, WORDS = 100, 100, 256, 18
NGF, NDF, RESIDUALS, RESOLUTIONS = 32, 64, 2, (64, 128, 256)


def glu(x: Tensor) -> Tensor:
    """Gate half of the channels by the other half."""
    value, gate = x.chunk(2, dim=1)
    return value * torch.sigmoid(gate)


class Glu(nn.Module):
    """`glu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 2C, ...)` to `(B, C, ...)`."""
        return glu(x)


def conv3x3(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, 1, 1, bias=False)


def up(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        conv3x3(channels, 2 * out_channels),
        nn.BatchNorm2d(2 * out_channels),
        Glu(),
    )


class Residual(nn.Module):
    """x + two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv3x3(channels, 2 * channels),
            nn.BatchNorm2d(2 * channels),
            Glu(),
            conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map a hidden map to one of the same shape."""
        return x + self.block(x)


class Refine(nn.Module):
    """A stage from a hidden map and words to a hidden map of twice the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Conv1d(TEXT, NGF, 1, bias=False)
        self.join = nn.Sequential(*[Residual(2 * NGF) for _ in range(RESIDUALS)])
        self.up = up(2 * NGF, NGF)

    def forward(self, hidden: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Map a hidden map `(B, C, r, r)`, words `(B, E, T)` and their mask `(B, T)` to `(B, C, 2r, 2r)`."""
        values = self.words(words)
        scores = torch.bmm(hidden.flatten(2).transpose(1, 2), values).masked_fill(mask[:, None], -float("inf"))
        context = torch.bmm(values, torch.softmax(scores, dim=2).transpose(1, 2)).view_as(hidden)
        return self.up(self.join(torch.cat((hidden, context), 1)))


class Generator(nn.Module):
    """A generator from noise, sentence and words to three images."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(TEXT, 4 * CONDITION)
        self.project = nn.Sequential(
            nn.Linear(NOISE + CONDITION, 2 * 16 * NGF * 16, bias=False), nn.BatchNorm1d(2 * 16 * NGF * 16), Glu()
        )
        self.up = nn.Sequential(*[up(16 * NGF >> i, 8 * NGF >> i) for i in range(4)])
        self.refine = nn.ModuleList(Refine() for _ in RESOLUTIONS[1:])
        self.heads = nn.ModuleList(nn.Sequential(conv3x3(NGF, 3), nn.Tanh()) for _ in RESOLUTIONS)

    def forward(self, z: Tensor, sentence: Tensor, words: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return images, and mean and logarithm of the variance of the condition."""
        mu, logvar = glu(self.condition(sentence)).chunk(2, 1)
        condition = mu + torch.randn(mu.shape) * (0.5 * logvar).exp()
        hidden = self.up(self.project(torch.cat((z, condition), 1)).view(-1, 16 * NGF, 4, 4))
        images = [self.heads[0](hidden)]
        for refine, head in zip(self.refine, self.heads[1:], strict=True):
            hidden = refine(hidden, words, mask)
            images.append(head(hidden))
        return images, mu, logvar


class Discriminator(nn.Module):
    """A discriminator from images of one resolution to 8 NDF x 4 x 4 features and two logits."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, NDF, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        channels, resolution = NDF, resolution // 2
        while resolution > 4:
            layers += [nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * channels)]
            layers += [nn.LeakyReLU(0.2)]
            channels, resolution = 2 * channels, resolution // 2
        while channels > 8 * NDF:
            layers += [conv3x3(channels, channels // 2), nn.BatchNorm2d(channels // 2), nn.LeakyReLU(0.2)]
            channels //= 2
        self.features = nn.Sequential(*layers)
        self.joint = nn.Sequential(conv3x3(8 * NDF + TEXT, 8 * NDF), nn.BatchNorm2d(8 * NDF), nn.LeakyReLU(0.2))
        self.conditional = nn.Conv2d(8 * NDF, 1, 4, 4)
        self.unconditional = nn.Conv2d(8 * NDF, 1, 4, 4)

    def logits(self, features: Tensor, sentence: Tensor | None = None) -> Tensor:
        """Return the probabilities `(B,)` that images are real, or real and of their sentences."""
        if sentence is None:
            return torch.sigmoid(self.unconditional(features).float()).view(-1)
        tiled = sentence.view(-1, TEXT, 1, 1).repeat(1, 1, 4, 4)
        return torch.sigmoid(self.conditional(self.joint(torch.cat((features, tiled), 1))).float()).view(-1)


class AttnGANStep:
    """Networks, optimizers, average and the step.

    Args:
        wrong_pass: If true, real images go through the discriminators once more for the mismatched pairs, as in
            StackGAN; AttnGAN uses the features of the one pass twice.
        bfloat16: If true, the networks run under autocast to bfloat16.
    """

    def __init__(self, wrong_pass: bool, bfloat16: bool = False) -> None:
        self.wrong_pass = wrong_pass
        self.bfloat16 = bfloat16
        self.generator = Generator()
        self.discriminators = [Discriminator(resolution) for resolution in RESOLUTIONS]
        options = {"lr": 2e-4, "betas": (0.5, 0.999)}
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), **options)
        self.discriminator_optimizers = [torch.optim.Adam(d.parameters(), **options) for d in self.discriminators]
        self.average = [weight.detach().clone() for weight in self.generator.parameters()]

    def __call__(self, images: list[Tensor], sentence: Tensor, words: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Update every discriminator and the generator once.

        Args:
            images: Real images (B, 3, r, r) in every resolution.
            sentence: Sentence features (B, E).
            words: Word features (B, E, T).
            mask: (B, T), True at padding.

        Returns:
            Losses by the names that our trainer gives them.
        """
        losses = {}
        yes, no = torch.ones(len(sentence)), torch.zeros(len(sentence))
        with self._autocast():
            fakes, mu, logvar = self.generator(torch.randn(len(sentence), NOISE), sentence, words, mask)
        stages = zip(RESOLUTIONS, self.discriminators, self.discriminator_optimizers, images, fakes, strict=True)
        for resolution, d, optimizer, real, fake in stages:
            d.zero_grad()
            with self._autocast():
                seen, generated = d.features(real), d.features(fake.detach())
                mismatched = d.features(real) if self.wrong_pass else seen
                accept = F.binary_cross_entropy(d.logits(seen), yes)
                accept = accept + F.binary_cross_entropy(d.logits(seen, sentence), yes)
                reject = F.binary_cross_entropy(d.logits(generated), no)
                reject = reject + F.binary_cross_entropy(d.logits(generated, sentence), no)
                reject = reject + F.binary_cross_entropy(d.logits(mismatched, sentence.roll(1, 0)), no)
            losses[f"discriminator/adversarial/{resolution}"] = accept / 2 + reject / 3
            losses[f"discriminator/adversarial/{resolution}"].backward()
            optimizer.step()
        self.generator.zero_grad()
        losses["generator/condition_kl"] = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).mean()
        loss = losses["generator/condition_kl"]
        for resolution, d, fake in zip(RESOLUTIONS, self.discriminators, fakes, strict=True):
            with self._autocast():
                generated = d.features(fake)
                accept = F.binary_cross_entropy(d.logits(generated), yes)
                accept = accept + F.binary_cross_entropy(d.logits(generated, sentence), yes)
            losses[f"generator/adversarial/{resolution}"] = accept
            loss = loss + accept
        loss.backward()
        self.generator_optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(self.average, self.generator.parameters(), strict=True):
                mean.mul_(0.999).add_(weight, alpha=0.001)
        return losses

    def _autocast(self) -> torch.autocast:
        """Return a context for some passes between two updates: it keeps the weights that it has converted."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16)
