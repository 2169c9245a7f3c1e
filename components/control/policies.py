"""Policy distributions over bounded actions."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss


def straight_through_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp whose gradient is the identity everywhere, so that a saturated action still moves the mean."""
    return x + (x.clamp(low, high) - x).detach()


class Policy(Protocol):
    """A distribution of actions at each of N states: what actors give, and what objectives improve.

    Attributes:
        mean: the deterministic action, [N, A].
    """

    mean: Tensor

    def sample(self, sample_shape: tuple[int, ...] = (), clip: float | None = None) -> Tensor:
        """Reparameterised actions [*sample_shape, N, A]; `clip` bounds noise that is added to the mean."""

    def sample_with_log_prob(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """The same without a bound, and their log-densities [*sample_shape, N]; zeros where entropy plays no part."""

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-densities [..., N] of actions [..., N, A]."""

    def entropy(self) -> Tensor:
        """In nats, [N], with a gradient; one sample's estimate where there is no closed form."""


class NormalPolicy:
    """A normal distribution without bounds, whose actions are clipped by the environment if at all: what on-policy
    methods learn. Densities are those of what was drawn.

    Args:
        mean: [N, A].
        std: [N, A], or one for each action [A].
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean = mean
        self.std = std

    def sample(self, sample_shape: tuple[int, ...] = (), clip: float | None = None) -> Tensor:
        mean = self.mean
        noise = self.std * torch.randn(*sample_shape, *mean.shape, device=mean.device, dtype=mean.dtype)
        return mean + (noise if clip is None else noise.clamp(-clip, clip))

    def sample_with_log_prob(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        action = self.sample(sample_shape)
        return action, self.log_prob(action)

    def log_prob(self, action: Tensor) -> Tensor:
        squares = ((action - self.mean) / self.std).square()
        return (-0.5 * (squares + math.log(2 * math.pi)) - self.std.log()).sum(-1)

    def entropy(self) -> Tensor:
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).expand_as(self.mean).sum(-1)


class ClippedGaussianPolicy:
    """Gaussian around a mean in [-1, 1] whose samples are clamped to the action range.

    The policy of TD3 and DrQ-v2 agents. `log_prob` is the density of the plain, untruncated normal, at the ends of the
    range too, and samples count as certain: the noise is there to explore and to smooth, not for its entropy.

    With a `tail` it is the density of Huber (1964), normal near the mean and exponential beyond: regression on actions
    of data then pays no more heed to a few that are far off than to many that are somewhat off.

    Args:
        mean: [..., A], already squashed to [-1, 1].
        std: standard deviation of the noise, one number (or tensor []), or one for each action [A].
        clip: bound of the noise in samples that ask for none of their own.
        bounded: clamp the noise to what is left of the range, so that samples reach its ends and have no gradient there
            (arXiv 2403.13097); otherwise gradients pass to the mean unchanged (arXiv 2107.09645).
        tail: in standard deviations, where the exponential tails of `log_prob` begin; None for none.
    """

    bound = 1.0 - 1e-6

    def __init__(
        self,
        mean: Tensor,
        std: float | Tensor,
        clip: float | None = None,
        bounded: bool = False,
        tail: float | None = None,
    ) -> None:
        self.mean = mean
        self.std = std
        self.clip = clip
        self.bounded = bounded
        self.tail = tail

    def sample(self, sample_shape: tuple[int, ...] = (), clip: float | None = None) -> Tensor:
        mean, clip = self.mean, self.clip if clip is None else clip
        noise = self.std * torch.randn(*sample_shape, *mean.shape, device=mean.device, dtype=mean.dtype)
        if clip is not None:
            noise = noise.clamp(-clip, clip)
        if self.bounded:
            return mean + noise.clamp(-1.0 - mean, 1.0 - mean)
        return straight_through_clamp(mean + noise, -self.bound, self.bound)

    def sample_with_log_prob(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        return _certain(self.sample(sample_shape))

    def log_prob(self, action: Tensor) -> Tensor:
        log_std = self.std.log() if isinstance(self.std, Tensor) else math.log(self.std)
        off = (action - self.mean) / self.std
        if self.tail is None:
            normaliser = log_std + 0.5 * math.log(2 * math.pi)
            return (-0.5 * off.square() - normaliser).sum(-1)
        core = math.sqrt(2 * math.pi) * math.erf(self.tail / math.sqrt(2))
        normaliser = log_std + math.log(core + 2 / self.tail * math.exp(-0.5 * self.tail**2))
        return (-huber_loss(off, torch.zeros_like(off), reduction="none", delta=self.tail) - normaliser).sum(-1)

    def entropy(self) -> Tensor:
        return torch.zeros_like(self.mean[..., 0])


class DeterministicPolicy:
    """One action at each state, [N, A]. `log_prob` is the negative squared distance, which cloning maximises."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def sample(self, sample_shape: tuple[int, ...] = (), clip: float | None = None) -> Tensor:
        return self.mean.expand(*sample_shape, *self.mean.shape)

    def sample_with_log_prob(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        return _certain(self.sample(sample_shape))

    def log_prob(self, action: Tensor) -> Tensor:
        return -(action - self.mean).square().sum(-1)

    def entropy(self) -> Tensor:
        return torch.zeros_like(self.mean[..., 0])


class TanhGaussianPolicy:
    """tanh(u), u ~ N(mean, std^2): the policy of soft actor-critic agents.

    Args:
        mean, std: of u, [..., A].
    """

    bound = 1.0 - 1e-6

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.pre_tanh_mean = mean
        self.std = std

    @property
    def mean(self) -> Tensor:
        """The deterministic action tanh(mean), [..., A]."""
        return self.pre_tanh_mean.tanh()

    def sample(self, sample_shape: tuple[int, ...] = (), clip: float | None = None) -> Tensor:
        if clip is not None:
            raise ValueError(f"noise_clip={clip}: expected null for a tanh-Gaussian, whose noise is its own.")
        return self.sample_with_log_prob(sample_shape)[0]

    def sample_with_log_prob(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        mean = self.pre_tanh_mean
        noise = torch.randn(*sample_shape, *mean.shape, device=mean.device, dtype=mean.dtype)
        u = mean + self.std * noise
        return u.tanh(), self._log_prob(u, noise)

    def log_prob(self, action: Tensor) -> Tensor:
        """At the ends of the range, where there is no density, that of actions just inside."""
        u = action.clamp(-self.bound, self.bound).atanh()
        return self._log_prob(u, (u - self.pre_tanh_mean) / self.std)

    def entropy(self) -> Tensor:
        return -self.sample_with_log_prob()[1]

    def _log_prob(self, u: Tensor, noise: Tensor) -> Tensor:
        normal = -0.5 * (noise.square() + math.log(2 * math.pi)) - self.std.log()
        # log(1 - tanh(u)^2), finite for any u
        correction = 2 * (math.log(2.0) - u - nn.functional.softplus(-2 * u))
        return (normal - correction).sum(-1)


def _certain(action: Tensor) -> tuple[Tensor, Tensor]:
    return action, action.new_zeros(action.shape[:-1])


def best_of(policy: Policy, value: Callable[[Tensor], Tensor], samples: int) -> Tensor:
    """The sampled action of highest value, [N, A]; the mean action if `samples` is 1 (arXiv 2403.13097).

    Args:
        value: actions [S, N, A] -> values [S, N].
    """
    if samples == 1:
        return policy.mean
    actions = policy.sample((samples,))
    best = value(actions).argmax(0)
    return actions[best, torch.arange(best.shape[0], device=best.device)]
