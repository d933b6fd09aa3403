"""Early warnings: signs that a GAN collapses, long before its losses are not finite."""

from collections.abc import Mapping, Sequence

from torch import Tensor

NO_CONTEST = 0.02
"""Loss of a discriminator that has won: the generator learns little from it."""

NO_CONTEST_LINES = 10
"""Consecutive log lines with such a loss before the warning."""

ALIKE = 0.1
"""Diversity of generated images, as a share of the real ones', below which they count as one image."""


def diversity(images: Tensor) -> float:
    """How much images differ from each other: the standard deviation over them, averaged over pixels.

    Args:
        images: `(B, 3, r, r)`.

    Returns:
        0 where all are the same.
    """
    return images.float().std(dim=0, correction=0).mean().item()


class TrainingMonitor:
    """Looks at losses and images, and says once what is wrong, until it is right again.

    Args:
        resolutions: Sides of the stages.
    """

    def __init__(self, resolutions: Sequence[int]) -> None:
        self._won = dict.fromkeys(resolutions, 0)
        self._alike = False

    def losses(self, losses: Mapping[str, float]) -> list[str]:
        """Warnings after another line of losses, which are named as `Trainer.step` names them."""
        warnings = []
        for side in self._won:
            won = losses.get(f"discriminator/adversarial/{side}", NO_CONTEST) < NO_CONTEST
            self._won[side] = self._won[side] + 1 if won else 0
            if self._won[side] == NO_CONTEST_LINES:
                warnings.append(
                    f"the discriminator of {side} pixels has had a loss below {NO_CONTEST} for {NO_CONTEST_LINES} log "
                    "lines, and the generator learns little from it: lower optimizer.discriminator_lr, set "
                    "adversarial.augment, or use losses.discriminator.r1"
                )
        return warnings

    def diversity(self, share: float) -> list[str]:
        """Warnings after images whose diversity is this share of the real ones'."""
        before, self._alike = self._alike, share < ALIKE
        if self._alike and not before:
            return [
                f"the generated images look alike (their diversity is {share:.0%} of the real ones'): if it stays so, "
                "go back to an earlier checkpoint and lower optimizer.generator_lr"
            ]
        return []
