"""Turning advantages into weights for regression on data actions."""

import math

import torch
from torch import Tensor

from components.buildable import buildable
from components.checks import Positive, Size, checked

MODES = ("softmax", "iwis", "exp")
MAX_PROBABILITY = 1.0 - 1e-3  # keeps the odds p / (1 - p) finite when one sample has all the weight


@buildable()
@checked
def sqrt_scaled(beta: Positive, features: Size) -> float:
    """The temperature beta * sqrt(features): rewards that task vectors stand for have standard deviation sqrt(d)."""
    return beta * math.sqrt(features)


def advantage_weights(
    advantage: Tensor,
    temperature: float,
    mode: str = "softmax",
    renormalise: bool = True,
    max_weight: float = math.inf,
) -> Tensor:
    """Batch weights that favour actions of high advantage: [N] -> [N], no gradient.

    With p = softmax(advantage / temperature) over the batch:

    * ``softmax``: w = p, self-normalised importance weights (the form of arXiv 2403.13097).
    * ``iwis``: w_i = p_i / (1 - p_i) = e^{u_i} / sum_{j != i} e^{u_j}. The leave-one-out sum does not contain sample i,
      which removes the bias of self-normalisation up to one positive constant (Skare, Bolviken and Holden, 2003).
    * ``exp``: w = e^{advantage / temperature}, at most `max_weight` (the form of arXiv 2006.09359 and 2110.06169).

    Args:
        renormalise: divide the iwis weights by their sum, for a loss of constant scale; without it the direction of
            the gradient is exactly unbiased.

    Raises:
        ValueError: if `mode` is not one of ``softmax``, ``iwis``, ``exp``.
    """
    if mode == "exp":
        return (advantage.detach() / temperature).exp().clamp(max=max_weight)
    log_p = torch.log_softmax(advantage.detach() / temperature, dim=0)
    if mode == "softmax":
        return log_p.exp()
    if mode == "iwis":
        log_p = log_p.clamp(max=math.log(MAX_PROBABILITY))
        log_odds = log_p - torch.log1p(-log_p.exp())
        return torch.softmax(log_odds, dim=0) if renormalise else log_odds.exp()
    raise ValueError(f"Unknown advantage weighting {mode!r}: expected one of {', '.join(MODES)}.")


def effective_sample_size(weights: Tensor) -> Tensor:
    """Number of equally weighted samples with the same variance, (sum w)^2 / sum w^2: [N] -> scalar."""
    return weights.sum().square() / weights.dot(weights)
