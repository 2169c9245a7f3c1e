"""Losses of critics.

Dimensions: P ensemble members, B batch, M quantiles of the critics, K of the target.
"""

import torch
from torch import Tensor


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
