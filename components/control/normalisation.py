"""Running statistics by which observations and rewards are scaled.

Dimensions: N rows, O observation, T steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.checks import Count, Positive, Share, checked
from components.distributed import sum_
from components.networks.equivariant import Reflection


class RunningMoments(nn.Module):
    """Mean and variance [*shape] of all rows seen by all processes, merged batch by batch (Chan et al., 1979).

    Float64, so that a long run's late batches still count. Before the first, mean 0 and variance 1.
    """

    def __init__(self, shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(tuple(shape), dtype=torch.float64))
        self.register_buffer("variance", torch.ones(tuple(shape), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def merge(self, rows: Tensor) -> None:
        """Take in rows [N, *shape] of this process."""
        rows = rows.double()
        # About the mean so far, which is near: so that squares of large means do not swallow small variances.
        rows = rows - self.mean
        count = rows.new_tensor(float(len(rows)))
        total, squares = rows.sum(0), rows.square().sum(0)
        sum_([count, total, squares])
        self.variance.mul_(self.count).add_(squares)
        self.count.add_(count)
        shift = total / self.count
        self.variance.div_(self.count).sub_(shift.square())
        self.mean.add_(shift)


@checked
class ObservationNormaliser(nn.Module):
    """Vectors less their running mean, over their running standard deviation: [..., O] -> [..., O].

    Args:
        observation_shape: [O].
        bound: what normalised numbers are clipped to.
        eps: added to the variance.
        reflection: that networks behind it commute with: every observation counts as its reflection does, or what is
            normalised would not commute with it.
    """

    def __init__(
        self,
        observation_shape: Sequence[Count],
        bound: Positive = 10.0,
        eps: Positive = 1e-8,
        reflection: Reflection | None = None,
    ) -> None:
        super().__init__()
        self.moments = RunningMoments(observation_shape)
        self.bound, self.eps, self.reflection = bound, eps, reflection

    def merge(self, observation: Tensor) -> None:
        """Take in observations [N, O]."""
        if self.reflection is not None:
            observation = torch.cat([observation, self.reflection(observation)])
        self.moments.merge(observation)

    def forward(self, observation: Tensor) -> Tensor:
        scale = (self.moments.variance + self.eps).rsqrt()
        normalised = (observation - self.moments.mean.to(observation.dtype)) * scale.to(observation.dtype)
        return normalised.clamp(-self.bound, self.bound)


@checked
class RewardNormaliser(nn.Module):
    """Rewards over the running standard deviation of the discounted sum of rewards so far (Cobbe et al., 1912.01588).

    The sums go on from one rollout to the next, and begin anew after the end of an episode. All of a rollout is scaled
    by the statistics that it is part of; the mean stays.

    Args:
        discount: of the sum.
        bound: what scaled rewards are clipped to.
        eps: added to the variance.
    """

    def __init__(self, discount: Share = 0.99, bound: Positive = 10.0, eps: Positive = 1e-7) -> None:
        super().__init__()
        self.moments = RunningMoments()
        self.discount, self.bound, self.eps = discount, bound, eps

    @torch.no_grad()
    def forward(self, reward: Tensor, done: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scaled rewards [N, T], and the sums [N] that go on.

        Args:
            reward, done: [N, T].
            carried: the sums before, [N]; None for the first rollout.
        """
        total = torch.zeros_like(reward[:, 0]) if carried is None else carried.to(reward)
        sums = []
        for each, ends in zip(reward.unbind(1), done.unbind(1)):
            total = self.discount * total + each
            sums.append(total)
            total = total.masked_fill(ends, 0)
        self.moments.merge(torch.stack(sums).flatten())
        scale = (self.moments.variance + self.eps).rsqrt().to(reward.dtype)
        return (reward * scale).clamp(-self.bound, self.bound), total
