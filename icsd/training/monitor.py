"""Early warnings: signs that a GAN collapses, long before its losses are not finite."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

NO_CONTEST = 0.02
"""Loss of a discriminator below which the generator learns little from it."""

NO_CONTEST_LINES = 10
"""Consecutive log lines with such a loss before the warning."""

SMALL_SHARE = 0.01
"""Share of a loss in the gradient of a network below which it hardly matters."""

SMALL_SHARE_LINES = 25
"""Consecutive lines of metrics with such a share before the warning."""

ALIKE = 0.1
"""Diversity of generated images, as a share of that of real images, below which they look alike."""

FIRST_STEPS_SHARE = 0.1
"""Share of the weights of the first step in the moving average above which it does not count."""

_SHARE = re.compile(r"share/(generator|discriminator/\d+)/(.+)")


def diversity(images: Tensor) -> float:
    """Return how much images differ from each other: the standard deviation over them, averaged over pixels.

    Args:
        images: `(B, 3, r, r)`.

    Returns:
        0 where all are the same.
    """
    return images.float().std(dim=0, correction=0).mean().item()


class TrainingMonitor:
    """A watch on losses and images that gives each warning once, until what it warns of is over.

    Args:
        resolutions: Resolutions of the stages.
        ema_decay: Decay rate of the moving average that generates the images.
    """

    def __init__(self, resolutions: Sequence[int], ema_decay: float) -> None:
        self._won = dict.fromkeys(resolutions, 0)
        self._small: Counter[str] = Counter()
        self._alike = False
        self._ema_decay = ema_decay

    def line(self, line: Mapping[str, float]) -> list[str]:
        """Return warnings after another line of metrics; names are those of `Trainer.step` and `measurements`."""
        return self._no_contests(line) + self._small_shares(line)

    def _small_shares(self, line: Mapping[str, float]) -> list[str]:
        """Return warnings of losses whose gradient stays small beside that of the others, one a loss and network."""
        warnings = []
        for name, share in line.items():
            parts = _SHARE.fullmatch(name)
            if parts is None:
                continue
            self._small[name] = self._small[name] + 1 if share < SMALL_SHARE else 0
            if self._small[name] == SMALL_SHARE_LINES:
                network, loss = parts.groups()
                warnings.append(
                    f"{loss} has had less than {SMALL_SHARE:.0%} of the gradient of the other losses of {network} for "
                    f"{SMALL_SHARE_LINES} log lines, and hardly matters: raise its weight in losses, or set it to 0"
                )
        return warnings

    def _no_contests(self, losses: Mapping[str, float]) -> list[str]:
        """Return warnings of discriminators whose loss stays near 0."""
        warnings = []
        for resolution in self._won:
            won = losses.get(f"discriminator/adversarial/{resolution}", NO_CONTEST) < NO_CONTEST
            self._won[resolution] = self._won[resolution] + 1 if won else 0
            if self._won[resolution] == NO_CONTEST_LINES:
                warnings.append(
                    f"the discriminator of {resolution} pixels has had a loss below {NO_CONTEST} for "
                    f"{NO_CONTEST_LINES} log lines, and the generator learns little from it: lower "
                    "optimizer.discriminator_lr, set adversarial.augment, or use losses.discriminator.r1"
                )
        return warnings

    def diversity(self, step: int, share: float) -> list[str]:
        """Return warnings after images whose diversity is this share of that of the real images.

        There are none as long as the moving average has not left the weights of the first steps behind: its images are
        alike at first.
        """
        if self._ema_decay**step > FIRST_STEPS_SHARE:
            return []
        before, self._alike = self._alike, share < ALIKE
        if self._alike and not before:
            return [
                f"the generated images look alike (their diversity is {share:.0%} of that of real images): if it stays "
                "so, go back to an earlier checkpoint and lower optimizer.generator_lr"
            ]
        return []
