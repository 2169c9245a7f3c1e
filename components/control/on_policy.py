"""Estimates and losses of policies that learn from what they did themselves.

Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", arXiv 1506.02438, and
"Proximal Policy Optimization Algorithms", arXiv 1707.06347.

Dimensions: N environments, T steps, B batch.
"""

import torch
from torch import Tensor


@torch.no_grad()
def generalised_advantages(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    discount: float,
    trace: float,
) -> Tensor:
    """Generalised advantage estimates [N, T]: sums of temporal-difference errors, discounted by discount x trace.

    Args:
        reward, value: of each step and of the state before it, [N, T].
        next_value: of the state that it led to, be it the last of an episode, [N, T].
        terminated: whether that state has no future, bool [N, T].
        done: whether an episode ends there, for this reason or another, bool [N, T]: errors after it are not its.
        discount, trace: gamma and lambda.
    """
    error = reward + discount * next_value * (~terminated) - value
    kept = discount * trace * (~done)
    advantage, running = torch.empty_like(error), torch.zeros_like(error[:, 0])
    for step in reversed(range(error.shape[1])):
        running = error[:, step] + kept[:, step] * running
        advantage[:, step] = running
    return advantage


def clipped_policy_loss(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """- mean min(r A, clip(r, 1 - clip, 1 + clip) A) of r = exp(log_ratio) [B]."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def clipped_value_loss(value: Tensor, before: Tensor, target: Tensor, clip: float | None) -> Tensor:
    """Half the mean squared error of values [B]; with `clip` of the worse of them and of what is that near `before`."""
    squares = (value - target).square()
    if clip is not None:
        near = before + (value - before).clamp(-clip, clip)
        squares = torch.maximum(squares, (near - target).square())
    return 0.5 * squares.mean()


@torch.no_grad()
def divergence(log_ratio: Tensor) -> Tensor:
    """KL(old, new) [], estimated from actions of the old policy: mean (r - 1) - log r, which is never negative."""
    return (log_ratio.expm1() - log_ratio).mean()
