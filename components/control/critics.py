"""Critics and their losses.

Dimensions: P ensemble members, B batch, F features, A action, M quantiles of the critics, K of the target.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from components.checks import Count, Size, checked
from components.control.actors import Actor
from components.control.pessimism import Pessimism, checked_value
from components.control.policies import best_of
from components.networks.encoders import Encoder, evaluating
from components.networks.ensemble import EnsembleMLP, Members


@checked
class Critics(nn.Module):
    """An ensemble of critics of features and actions, [B, F] and [B, A] -> [P, B, M].

    Args:
        features, action_dim, quantiles, members: sizes F, A, M and P.
        network: makes the ensemble, called with in_features, out_features and members.
        trunk: makes what all critics share before the action comes in, called with F, with `out_features`; None for
            nothing.
    """

    def __init__(
        self,
        features: Count,
        action_dim: Size,
        quantiles: Size,
        members: Size,
        network: Callable[..., nn.Module],
        trunk: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.trunk = None if trunk is None else trunk(features)
        width = features if self.trunk is None else self.trunk.out_features
        self.network = network(width + action_dim, quantiles, members)

    def forward(self, features: Tensor, action: Tensor, members: Members = None) -> Tensor:
        """What critics say, all of them or `members` alone; of several actions [..., B, A] for each, [P, ..., B, M]."""
        if self.trunk is not None:
            features = self.trunk(features)
        if action.dim() > 2:
            several = features.expand(*action.shape[:-1], features.shape[-1]).flatten(0, -2)
            return self._said(torch.cat([several, action.flatten(0, -2)], -1), members).unflatten(1, action.shape[:-1])
        return self._said(torch.cat([features, action], -1), members)

    def _said(self, x: Tensor, members: Members) -> Tensor:
        if members is None:
            return self.network(x)
        # Other networks may keep their members in other ways, or change as they are evaluated.
        return self.network(x, members) if isinstance(self.network, EnsembleMLP) else self.network(x)[members]


def believed(critics: Critics, pessimism: Pessimism, members: int, features: Tensor, action: Tensor) -> Tensor:
    """What an agent makes of actions [..., B, A] at features [B, F], by the pessimism of its actor: [..., B]."""
    q = critics(features, action, pessimism.actor_members(members, features.device))
    rows = q.shape[1:-1]
    value = pessimism.actor(q.flatten(1, -2))  # which knows of no other dimensions
    return checked_value(pessimism, "actor", value, [rows.numel()]).unflatten(0, rows)


class BestOfPolicy(nn.Module):
    """Acts by the best of several actions that an actor draws, as the agent's critics have it (arXiv 2403.13097).

    Networks act in evaluation mode, whatever mode they are in otherwise.

    Args:
        encoder, actor, critics, pessimism: shared, not copied.
        members: of the critics.
        samples: actions drawn in each state.
    """

    def __init__(
        self, encoder: Encoder, actor: Actor, critics: Critics, pessimism: Pessimism, members: int, samples: int
    ) -> None:
        super().__init__()
        self.encoder, self.actor, self.critics, self.pessimism = encoder, actor, critics, pessimism
        self.members, self.samples = members, samples

    @torch.no_grad()
    def forward(self, observation: Tensor) -> Tensor:
        with evaluating(self):
            features = self.encoder(observation)

            def value(action: Tensor) -> Tensor:
                return believed(self.critics, self.pessimism, self.members, features, action)

            return best_of(self.actor(features), value, self.samples)


def critic_loss(q: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Regression of every member of an ensemble on the same target.

    With one quantile: half the squared error, summed over members. With more: the quantile Huber loss (Dabney et al.,
    arXiv 1710.10044, with threshold 1 and midpoint fractions) of all pairs of quantiles, summed over members and pairs.
    Both are averaged over the batch, so that each member has the gradient it would have alone.

    Args:
        q: [P, B, M].
        target: [B, K], a constant.

    Returns:
        The loss, and the errors q - target without gradient, [P, B] (of the means over quantiles).
    """
    target = target.detach()
    if q.shape[-1] == target.shape[-1] == 1:
        loss = nn.functional.mse_loss(q, target.expand_as(q), reduction="sum") / (2 * len(target))
        return loss, (q.detach() - target).squeeze(-1)
    errors = q.detach().mean(-1) - target.mean(-1)
    fractions = (torch.arange(q.shape[-1], device=q.device, dtype=q.dtype) + 0.5) / q.shape[-1]
    ahead = target[:, None, :] - q[..., None]  # [P, B, M, K]
    huber = torch.nn.functional.huber_loss(ahead, torch.zeros_like(ahead), reduction="none")
    weight = (fractions[:, None] - (ahead.detach() < 0).to(q.dtype)).abs()
    return (weight * huber).sum((0, 2, 3)).mean(), errors
