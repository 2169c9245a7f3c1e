"""Actors: networks from observations to policies, and how these explore, bootstrap and are improved.

Dimensions: N batch, O observation, A action.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from components.ensemble import EnsembleMLP
from components.policies import ClippedGaussianPolicy, TanhGaussianPolicy

Network = Callable[..., nn.Module]
"""Called with in_features, out_features; maps [N, in] to [1, N, out]."""


class Actor(nn.Module, ABC):
    """What an actor-critic agent needs of its actor. Log-densities [N] are zero where entropy plays no part."""

    @abstractmethod
    def act(self, observation: Tensor) -> Tensor:
        """The deterministic action, [N, A]."""

    @abstractmethod
    def explore(self, observation: Tensor) -> Tensor:
        """An action to collect experience with, [N, A]."""

    @abstractmethod
    def bootstrap(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [N, A] that targets are computed with, and their log-densities [N]."""

    @abstractmethod
    def improve(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised actions [N, A] that the actor's loss is computed with, and their log-densities [N]."""


class GaussianActor(Actor):
    """The tanh-Gaussian actor of soft actor-critic: it explores, bootstraps and improves with the same noise.

    The log standard deviation is low + (high - low) (tanh(x) + 1) / 2 of the network's second output x; at x = 0 it
    lies half-way, by default at -4.

    Args:
        network: makes the network, [N, O] -> [1, N, 2 A].
        log_std_range: low and high.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        network: Network = EnsembleMLP,
        log_std_range: tuple[float, float] = (-10.0, 2.0),
    ) -> None:
        super().__init__()
        self.network = network(observation_dim, 2 * action_dim)
        self.log_std_range = tuple(log_std_range)

    def forward(self, observation: Tensor) -> TanhGaussianPolicy:
        mean, x = self.network(observation).squeeze(0).chunk(2, -1)
        low, high = self.log_std_range
        return TanhGaussianPolicy(mean, (low + 0.5 * (high - low) * (x.tanh() + 1)).exp())

    def act(self, observation: Tensor) -> Tensor:
        return self(observation).mean

    def explore(self, observation: Tensor) -> Tensor:
        return self(observation).sample()

    def bootstrap(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return self(observation).sample_with_log_prob()

    def improve(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return self(observation).sample_with_log_prob()


class DeterministicActor(Actor):
    """The deterministic actor of TD3: Gaussian noise in exploration, clipped noise in targets, none in its own loss.

    Args:
        network: makes the network, [N, O] -> [1, N, A].
        exploration_std: noise of exploration.
        target_std, target_clip: noise of target actions, and its bound, if any.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        network: Network = EnsembleMLP,
        exploration_std: float = 0.1,
        target_std: float = 0.2,
        target_clip: float | None = 0.5,
    ) -> None:
        super().__init__()
        self.network = network(observation_dim, action_dim)
        self.exploration_std = exploration_std
        self.target_std = target_std
        self.target_clip = target_clip

    def act(self, observation: Tensor) -> Tensor:
        return self.network(observation).squeeze(0).tanh()

    def explore(self, observation: Tensor) -> Tensor:
        return ClippedGaussianPolicy(self.act(observation), self.exploration_std).sample()

    def bootstrap(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        policy = ClippedGaussianPolicy(self.act(observation), self.target_std)
        return _certain(policy.sample(clip=self.target_clip))

    def improve(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return _certain(self.act(observation))


def _certain(action: Tensor) -> tuple[Tensor, Tensor]:
    return action, action.new_zeros(action.shape[:-1])


class ActorPolicy(nn.Module):
    """One way of using an actor, as a module that collectors can copy and send to other processes.

    Args:
        actor: the actor, shared, not copied.
        use: ``act``, ``explore`` or ``bootstrap``.
    """

    def __init__(self, actor: Actor, use: str) -> None:
        super().__init__()
        self.actor = actor
        self.use = use

    @torch.no_grad()
    def forward(self, observation: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return getattr(self.actor, self.use)(observation)


class EntropyTemperature(nn.Module):
    """The temperature alpha of maximum-entropy agents, learned so that the policy keeps a target entropy.

    Haarnoja et al., arXiv 1812.05905, section 5, with the gradient by log alpha.

    Args:
        action_dim: A.
        initial: alpha at the start.
        target_entropy: in nats; -A if None.
    """

    def __init__(self, action_dim: int, initial: float = 1.0, target_entropy: float | None = None) -> None:
        super().__init__()
        if initial <= 0:
            raise ValueError(f"initial={initial}: expected a temperature above 0; module.temperature=null is for none.")
        self.log_alpha = nn.Parameter(torch.tensor(float(initial)).log())
        self.target_entropy = float(-action_dim if target_entropy is None else target_entropy)

    def forward(self) -> Tensor:
        """alpha, without gradient."""
        return self.log_alpha.detach().exp()

    def loss(self, log_prob: Tensor) -> Tensor:
        """-log alpha (log pi + target entropy), averaged; log-densities of any shape."""
        return -(self.log_alpha * (log_prob.detach() + self.target_entropy)).mean()
