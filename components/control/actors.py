"""Actors: networks from observations to policies, and how these explore, bootstrap and are improved.

Dimensions: N batch, O observation, A action.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor, nn

from components.checks import Count, NonNegative, Number, Positive, Range, Size, checked
from components.control.policies import (
    ClippedGaussianPolicy,
    DeterministicPolicy,
    NormalPolicy,
    Policy,
    TanhGaussianPolicy,
)
from components.networks.encoders import Encoder, evaluating
from components.networks.ensemble import EnsembleMLP

Network = Callable[..., nn.Module]
"""Called with in_features, out_features; maps [N, in] to [1, N, out]."""

Trunk = Callable[[int], nn.Module]
"""Called with in_features; maps [N, in] to [N, its `out_features`]."""

LogStd = Annotated[float, Range(-80, 80)]
"""Logarithm of a standard deviation that float32 holds, as well as its inverse."""


class Actor(nn.Module, ABC):
    """What an actor-critic agent needs of its actor. Log-densities [N] are zero where entropy plays no part.

    Where observations are encoded, `observation` is the features.
    """

    def at(self, env_steps: int) -> None:
        """So many environment steps have been taken: for actors whose exploration follows a schedule."""

    @abstractmethod
    def forward(self, observation: Tensor) -> Policy:
        """The policy that an objective improves, see `components.control.actor_objectives`."""

    def act(self, observation: Tensor) -> Tensor:
        """The deterministic action, [N, A]."""
        return self(observation).mean

    def explore(self, observation: Tensor) -> Tensor:
        """An action to collect experience with, [N, A]."""
        return self(observation).sample()

    def bootstrap(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [N, A] that targets are computed with, and their log-densities [N]."""
        return self(observation).sample_with_log_prob()


@checked
class GaussianActor(Actor):
    """The tanh-Gaussian actor of soft actor-critic: it explores, bootstraps and improves with the same noise.

    The log standard deviation is low + (high - low) (tanh(x) + 1) / 2 of the network's second output x; at x = 0 it
    lies half-way, by default at -4.

    Args:
        network: makes the network, [N, O] -> [1, N, 2 A].
        trunk: makes what comes before the network, if anything.
        log_std_range: low and high.
    """

    def __init__(
        self,
        observation_dim: Count,
        action_dim: Size,
        network: Network = EnsembleMLP,
        trunk: Trunk | None = None,
        log_std_range: tuple[LogStd, LogStd] = (-10.0, 2.0),
    ) -> None:
        super().__init__()
        if log_std_range[0] > log_std_range[1]:
            raise ValueError(f"log_std_range={list(log_std_range)}: expected the lower end first.")
        self.network = _behind(trunk, network, observation_dim, 2 * action_dim)
        self.log_std_range = tuple(log_std_range)

    def forward(self, observation: Tensor) -> TanhGaussianPolicy:
        mean, x = self.network(observation).squeeze(0).chunk(2, -1)
        low, high = self.log_std_range
        return TanhGaussianPolicy(mean, (low + 0.5 * (high - low) * (x.tanh() + 1)).exp())


@checked
class NormalActor(Actor):
    """A normal distribution around the network's output, with one learned standard deviation for each action whatever
    the observation (Schulman et al., arXiv 1707.06347): environments clip what they are given.

    Args:
        network: makes the network, [N, O] -> [1, N, A].
        std: at the start.
        squash: the mean is tanh of the network's output, and so never so far out of the range that no noise matters.
    """

    def __init__(
        self,
        observation_dim: Count,
        action_dim: Size,
        network: Network = EnsembleMLP,
        std: Positive = 0.5,
        squash: bool = False,
    ) -> None:
        super().__init__()
        self.network = network(observation_dim, action_dim)
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(std)))
        self.squash = squash

    def forward(self, observation: Tensor) -> NormalPolicy:
        mean = self.network(observation).squeeze(0)
        return NormalPolicy(mean.tanh() if self.squash else mean, self.log_std.exp())


@checked
class DeterministicActor(Actor):
    """The deterministic actor of TD3: Gaussian noise in exploration, clipped noise in targets, none in its own loss.

    Args:
        network: makes the network, [N, O] -> [1, N, A].
        trunk: makes what comes before the network, if anything.
        exploration_std: noise of exploration.
        target_std, target_clip: noise of target actions, and its bound, if any.
    """

    def __init__(
        self,
        observation_dim: Count,
        action_dim: Size,
        network: Network = EnsembleMLP,
        trunk: Trunk | None = None,
        exploration_std: NonNegative = 0.1,
        target_std: NonNegative = 0.2,
        target_clip: NonNegative | None = 0.5,
    ) -> None:
        super().__init__()
        self.network = _behind(trunk, network, observation_dim, action_dim)
        self.exploration_std = exploration_std
        self.target_std = target_std
        self.target_clip = target_clip

    def forward(self, observation: Tensor) -> DeterministicPolicy:
        return DeterministicPolicy(self.network(observation).squeeze(0).tanh())

    def explore(self, observation: Tensor) -> Tensor:
        return ClippedGaussianPolicy(self.act(observation), self.exploration_std).sample()

    def bootstrap(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return ClippedGaussianPolicy(self.act(observation), self.target_std, self.target_clip).sample_with_log_prob()


@checked
class ScheduledNoiseActor(Actor):
    """The actor of DrQ-v2: Gaussian noise around tanh of the network, in all it does, that falls over the run.

    Its standard deviation falls linearly with the environment steps. The noise that targets are computed with, and that
    the actor is improved with, is clipped; that of exploration is not.

    Args:
        network: makes the network, [N, O] -> [1, N, A].
        trunk: makes what comes before the network, if anything.
        initial_std, final_std: the noise at first and at last.
        anneal_steps: environment steps in which it falls from one to the other.
        clip: bound of the noise in targets and improvement, if any.
    """

    def __init__(
        self,
        observation_dim: Count,
        action_dim: Size,
        network: Network = EnsembleMLP,
        trunk: Trunk | None = None,
        initial_std: NonNegative = 1.0,
        final_std: NonNegative = 0.1,
        anneal_steps: Count = 500_000,
        clip: NonNegative | None = 0.3,
    ) -> None:
        super().__init__()
        self.network = _behind(trunk, network, observation_dim, action_dim)
        self.initial_std, self.final_std, self.anneal_steps = initial_std, final_std, anneal_steps
        self.clip = clip
        self.register_buffer("std", torch.tensor(float(initial_std)))  # compiled updates read it where it lies

    def at(self, env_steps: int) -> None:
        done = min(1.0, env_steps / self.anneal_steps)
        self.std.fill_((1 - done) * self.initial_std + done * self.final_std)

    def forward(self, observation: Tensor) -> ClippedGaussianPolicy:
        return ClippedGaussianPolicy(self.network(observation).squeeze(0).tanh(), self.std, self.clip)

    def explore(self, observation: Tensor) -> Tensor:
        return ClippedGaussianPolicy(self.act(observation), self.std).sample()


@checked
class ClippedGaussianActor(Actor):
    """The Gaussian actor of offline methods that clone actions with weights: its noise is fixed, or learned as one
    standard deviation for each action whatever the observation (AWAC, arXiv 2006.09359; IQL, arXiv 2110.06169).

    Args:
        network: makes the network, [N, O] -> [1, N, A].
        trunk: makes what comes before the network, if anything.
        std: the noise, at the start where it is learned.
        learned: learn it; its logarithm is kept from -20 to 2.
        squash: the mean is tanh of the network, or the network's output as it is, clamped where it acts.
        target_clip: bound of the noise in targets, if any.
        bounded: see `ClippedGaussianPolicy`.
    """

    def __init__(
        self,
        observation_dim: Count,
        action_dim: Size,
        network: Network = EnsembleMLP,
        trunk: Trunk | None = None,
        std: Positive = 0.2,
        learned: bool = False,
        squash: bool = True,
        target_clip: NonNegative | None = 0.3,
        bounded: bool = True,
    ) -> None:
        super().__init__()
        self.network = _behind(trunk, network, observation_dim, action_dim)
        self.std = std
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(std))) if learned else None
        self.squash = squash
        self.target_clip = target_clip
        self.bounded = bounded

    def forward(self, observation: Tensor) -> ClippedGaussianPolicy:
        mean = self.network(observation).squeeze(0)
        std = self.std if self.log_std is None else self.log_std.clamp(-20.0, 2.0).exp()
        return ClippedGaussianPolicy(mean.tanh() if self.squash else mean, std, bounded=self.bounded)

    def act(self, observation: Tensor) -> Tensor:
        return self(observation).mean.clamp(-1.0, 1.0)

    def bootstrap(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        policy = self(observation)
        policy.clip = self.target_clip
        return policy.sample_with_log_prob()


def _behind(trunk: Trunk | None, network: Network, in_features: int, out_features: int) -> nn.Module:
    if trunk is None:
        return network(in_features, out_features)
    first = trunk(in_features)
    return nn.Sequential(first, network(first.out_features, out_features))


class ActorPolicy(nn.Module):
    """One way of using an actor, as a module that collectors can copy and send to other processes.

    Networks act in evaluation mode, whatever mode they are in otherwise.

    Args:
        encoder, actor: shared, not copied.
        use: ``act``, ``explore`` or ``bootstrap``.
    """

    def __init__(self, encoder: Encoder, actor: Actor, use: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.actor = actor
        self.use = use

    @torch.no_grad()
    def forward(self, observation: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        with evaluating(self):
            return getattr(self.actor, self.use)(self.encoder(observation))


@checked
class EntropyTemperature(nn.Module):
    """The temperature alpha of maximum-entropy agents, learned so that the policy keeps a target entropy.

    Haarnoja et al., arXiv 1812.05905, section 5, with the gradient by log alpha.

    Args:
        action_dim: A.
        initial: alpha at the start; for none, agents take no temperature.
        target_entropy: in nats; -A if None.
    """

    def __init__(self, action_dim: Size, initial: Positive = 1.0, target_entropy: Number | None = None) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(float(initial)).log())
        self.target_entropy = float(-action_dim if target_entropy is None else target_entropy)

    def forward(self) -> Tensor:
        """alpha, without gradient."""
        return self.log_alpha.detach().exp()

    def loss(self, log_prob: Tensor) -> Tensor:
        """-log alpha (log pi + target entropy), averaged; log-densities of any shape."""
        return -(self.log_alpha * (log_prob.detach() + self.target_entropy)).mean()
