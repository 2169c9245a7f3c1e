"""The cross-entropy method: search for the best point of a box by a population that gathers around its best.

Rubinstein and Kroese, 2004; as the authors of "Transformer-Squared" (arXiv 2501.06252) use it to mix experts.

Dimensions: D numbers searched, P population.
"""

import torch
from torch import Tensor, nn

from components.checks import Momentum, Number, Share, Size, checked


@checked
class CrossEntropyMethod(nn.Module):
    """Draw a population (`ask`), score it (`tell`); a module, so that a search is saved and resumed as one.

    Points are normal around `mean` with `std`, cut off at the bounds; the first of each population is the best of the
    one before. Then mean and std become those of the best share. The answer is `best`, of the last population: where
    scores are noisy, the best ever is the luckiest.

    Args:
        size: D.
        population: P.
        elite_share: the best int(share * P) points make the next mean and std.
        low, high: bounds.
        start: where mean and best begin, in each dimension.
        memory: of mean and std, 0 for none.
        fresh: draw all points but the best of the last population uniformly from the box: random shooting.
    """

    def __init__(
        self,
        size: Size,
        *,
        population: Size = 32,
        elite_share: Share = 0.2,
        low: Number = 0.0,
        high: Number = 1.0,
        start: Number,
        memory: Momentum = 0.0,
        fresh: bool = False,
    ) -> None:
        super().__init__()
        if low >= high:
            raise ValueError(f"low={low}, high={high}: expected the first to be below the second.")
        if not low <= start <= high:
            raise ValueError(f"start={start}: expected a number from {low} to {high}.")
        if int(elite_share * population) < 2:
            raise ValueError(f"elite_share={elite_share}: expected at least two of the {population} points.")
        self.low, self.high, self.memory, self.fresh = low, high, memory, fresh
        self.elites = int(elite_share * population)
        self.register_buffer("mean", torch.full((size,), start))
        self.register_buffer("std", torch.full((size,), (high - low) / 2))
        self.register_buffer("best", torch.full((size,), start))
        self.register_buffer("points", torch.zeros(population, size))

    def ask(self, generator: torch.Generator | None = None) -> Tensor:
        """Points to score, [P, D]."""
        chance = torch.rand if self.fresh else torch.randn
        drawn = chance(self.points.shape, generator=generator).to(self.points)
        if self.fresh:
            points = self.low + (self.high - self.low) * drawn
        else:
            points = (self.mean + self.std * drawn).clamp(self.low, self.high)
        self.points.copy_(points)
        self.points[0] = self.best
        return self.points.clone()

    def tell(self, scores: Tensor, tiebreak: Tensor | None = None) -> None:
        """What the points were found to be worth, [P]; among equals of the best, `tiebreak` [P] decides.

        A score that is no number is the worst.
        """
        if len(scores) != len(self.points):
            raise ValueError(f"scores: expected one for each of {len(self.points)} points, found {len(scores)}.")
        scores = scores.to(self.points).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        order = scores.argsort(descending=True, stable=True)
        elites = self.points[order[: self.elites]]
        self.best.copy_(self.points[first_of(scores, torch.zeros_like(scores) if tiebreak is None else tiebreak)])
        self.mean.lerp_(elites.mean(0), 1 - self.memory)
        self.std.lerp_(elites.std(0), 1 - self.memory)


def first_of(scores: Tensor, tiebreak: Tensor) -> Tensor:
    """Place of the highest of the scores [P], among equals of the highest tiebreak [P]; the first of all such."""
    tied = scores == scores.max()
    return torch.where(tied, tiebreak.to(scores), -torch.inf).argmax()
