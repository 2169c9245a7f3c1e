"""How well values are fitted, and what features are like: numbers to look at, not to learn from.

Dimensions: N samples, F features.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's, of two sets of numbers [N]; 0 where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = x.norm() * y.norm()
    return torch.where(scale > 0, x @ y / scale.clamp(min=1e-30), torch.zeros_like(scale))


def effective_rank(features: Tensor, share: float = 0.99) -> Tensor:
    """The number of singular values of features [N, F] that make up more than `share` of their sum.

    srank of Kumar et al., arXiv 2010.14498; A-LIX's code counts one less.
    """
    values = torch.linalg.svdvals(features.float())
    return ((values.cumsum(0) / values.sum()) <= share).sum() + 1


def jacobian_norm(function: Callable[[Tensor], Tensor], inputs: Tensor, probes: int = 2) -> Tensor:
    """Root mean square over samples of the Frobenius norm of d function / d input, [N, ...] -> [N, F].

    An unbiased estimate of the squares: the mean of |J^T v|^2 for normal v, drawn `probes` times for each sample.
    """
    inputs = inputs.detach().float().clone().requires_grad_()
    with torch.enable_grad():
        outputs = function(inputs)
        squares = [
            torch.autograd.grad(outputs, inputs, torch.randn_like(outputs), retain_graph=True)[0].square().sum()
            for _ in range(probes)
        ]
    return (sum(squares) / (probes * len(inputs))).sqrt()
