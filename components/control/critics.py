"""Critics and their losses.

Dimensions: P ensemble members, B batch, F features, A action, M quantiles of the critics, K of the target.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from components.checks import Count, Size, checked
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
        """What critics say, all of them or `members` alone."""
        if self.trunk is not None:
            features = self.trunk(features)
        x = torch.cat([features, action], -1)
        if members is None:
            return self.network(x)
        # Other networks may keep their members in other ways, or change as they are evaluated.
        return self.network(x, members) if isinstance(self.network, EnsembleMLP) else self.network(x)[members]


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
        errors = q - target
        return 0.5 * errors.square().sum((0, 2)).mean(), errors.detach().squeeze(-1)
    errors = q.detach().mean(-1) - target.mean(-1)
    fractions = (torch.arange(q.shape[-1], device=q.device, dtype=q.dtype) + 0.5) / q.shape[-1]
    ahead = target[:, None, :] - q[..., None]  # [P, B, M, K]
    huber = torch.nn.functional.huber_loss(ahead, torch.zeros_like(ahead), reduction="none")
    weight = (fractions[:, None] - (ahead.detach() < 0).to(q.dtype)).abs()
    return (weight * huber).sum((0, 2, 3)).mean(), errors
