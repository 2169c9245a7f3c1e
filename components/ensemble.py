"""Ensembles of networks evaluated as batched matrix products.

Dimensions: P ensemble members, N batch, `in`/`out` features. Every layer maps [P, N, in] -> [P, N, out]; an input
without the leading ensemble dimension, [N, in], is shared by all members.
"""

import math

import torch
from torch import Tensor, nn


def orthogonal_(weight: Tensor, gain: float = 1.0) -> Tensor:
    """Fill `weight` [..., rows, columns] in place with (semi-)orthogonal matrices of the given gain."""
    with torch.no_grad():
        for matrix in weight.reshape(-1, *weight.shape[-2:]):
            nn.init.orthogonal_(matrix, gain)
    return weight


class EnsembleLinear(nn.Module):
    """P independent linear layers as one batched matmul: [N, in] or [P, N, in] -> [P, N, out].

    Weights are [P, in, out], each member orthogonal with `gain`; biases [P, 1, out] start at zero.
    """

    def __init__(self, members: int, in_features: int, out_features: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(orthogonal_(torch.empty(members, in_features, out_features), gain))
        self.bias = nn.Parameter(torch.zeros(members, 1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x.expand(self.weight.shape[0], *x.shape)
        return torch.baddbmm(self.bias, x, self.weight)

    def extra_repr(self) -> str:
        members, in_features, out_features = self.weight.shape
        return f"members={members}, in_features={in_features}, out_features={out_features}"


class EnsembleLayerNorm(nn.Module):
    """Layer normalisation over the last dimension with an affine map of its own for each member: [P, N, dim]."""

    def __init__(self, members: int, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, dim))
        self.bias = nn.Parameter(torch.zeros(members, 1, dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normalised = nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias, normalised, self.weight)


def pessimistic_mean(x: Tensor, pessimism: float) -> Tensor:
    """Mean over the ensemble less `pessimism` times the mean absolute difference of two distinct members.

    mean_p x_p - pessimism * mean_{p != q} |x_p - x_q|, elementwise: [P, ...] -> [...]. For P = 2 a pessimism of 0.5 is
    the minimum; for any P it is the average of min(x_p, x_q) over pairs (Cetin and Celiktutan, arXiv 2110.03375,
    section 3; Touati et al., arXiv 2209.14935, use P = 2).
    """
    members = x.shape[0]
    mean = x.mean(0)
    if pessimism == 0 or members == 1:
        return mean
    if members == 2:
        return mean - pessimism * (x[0] - x[1]).abs()
    # Sorted members turn the O(P^2) sum of pairwise differences into one weighted sum: x_(k) is counted positively
    # k times and negatively P - 1 - k times.
    weights = 2.0 * torch.arange(members, device=x.device, dtype=x.dtype) - (members - 1)
    spread = torch.tensordot(weights, x.sort(0).values, dims=1) * (2.0 / (members * (members - 1)))
    return mean - pessimism * spread


RELU_GAIN = math.sqrt(2.0)
