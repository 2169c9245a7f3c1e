"""Policy distributions over bounded actions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from components.ensemble import pessimistic_mean


def straight_through_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp whose gradient is the identity everywhere, so that a saturated action still moves the mean."""
    return x + (x.clamp(low, high) - x).detach()


class ClippedGaussianPolicy:
    """Gaussian of fixed standard deviation around a mean in [-1, 1], its samples clamped to the action range.

    The policy of TD3 and DrQ-v2 agents. `log_prob` is the density of the plain, untruncated normal.

    Args:
        mean: [..., A], already squashed to [-1, 1].
        std: standard deviation of the noise, one number for all actions.
    """

    bound = 1.0 - 1e-6

    def __init__(self, mean: Tensor, std: float) -> None:
        self.mean = mean
        self.std = std

    def sample(self, clip: float | None = None, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw [*sample_shape, ..., A]; `clip` bounds the noise itself. Gradients pass to the mean unchanged."""
        noise = self.std * torch.randn(*sample_shape, *self.mean.shape, device=self.mean.device, dtype=self.mean.dtype)
        if clip is not None:
            noise = noise.clamp(-clip, clip)
        return straight_through_clamp(self.mean + noise, -self.bound, self.bound)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of every action coordinate, [..., A]; sum or average over the last dimension as needed."""
        normaliser = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -0.5 * ((action - self.mean) / self.std).square() - normaliser


def best_of(
    policy: ClippedGaussianPolicy, critic: Callable[[Tensor], Tensor], samples: int, pessimism: float = 0.5
) -> Tensor:
    """The sampled action of highest value, [N, A]; the mean action if `samples` is 1.

    Args:
        critic: actions [S, N, A] -> values [P, S, N].
        pessimism: see `pessimistic_mean`.
    """
    if samples == 1:
        return policy.mean
    actions = policy.sample(sample_shape=(samples,))
    best = pessimistic_mean(critic(actions), pessimism).argmax(0)
    return actions[best, torch.arange(best.shape[0], device=best.device)]
