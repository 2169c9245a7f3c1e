"""Policy distributions over bounded actions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from components.control.pessimism import pessimistic_mean


def straight_through_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp whose gradient is the identity everywhere, so that a saturated action still moves the mean."""
    return x + (x.clamp(low, high) - x).detach()


class ClippedGaussianPolicy:
    """Gaussian of fixed standard deviation around a mean in [-1, 1], its samples clamped to the action range.

    The policy of TD3 and DrQ-v2 agents. `log_prob` is the density of the plain, untruncated normal.

    Args:
        mean: [..., A], already squashed to [-1, 1].
        std: standard deviation of the noise, one number (or tensor []) for all actions.
    """

    bound = 1.0 - 1e-6

    def __init__(self, mean: Tensor, std: float | Tensor) -> None:
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


class TanhGaussianPolicy:
    """tanh(u), u ~ N(mean, std^2): the policy of soft actor-critic agents.

    Args:
        mean, std: of u, [..., A].
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.pre_tanh_mean = mean
        self.std = std

    @property
    def mean(self) -> Tensor:
        """The deterministic action tanh(mean), [..., A]."""
        return self.pre_tanh_mean.tanh()

    def sample(self) -> Tensor:
        """Reparameterised actions [..., A]."""
        return self.sample_with_log_prob()[0]

    def sample_with_log_prob(self) -> tuple[Tensor, Tensor]:
        """Reparameterised actions [..., A] and their log-densities [...]."""
        noise = torch.randn_like(self.pre_tanh_mean)
        u = self.pre_tanh_mean + self.std * noise
        return u.tanh(), self._log_prob(u, noise)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-densities [...] of actions [..., A] inside of (-1, 1)."""
        u = action.atanh()
        return self._log_prob(u, (u - self.pre_tanh_mean) / self.std)

    def _log_prob(self, u: Tensor, noise: Tensor) -> Tensor:
        normal = -0.5 * (noise.square() + math.log(2 * math.pi)) - self.std.log()
        # log(1 - tanh(u)^2), finite for any u
        correction = 2 * (math.log(2.0) - u - nn.functional.softplus(-2 * u))
        return (normal - correction).sum(-1)


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
