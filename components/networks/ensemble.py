"""Ensembles of networks evaluated as batched matrix products.

`Members` says which of an ensemble are asked: indices [K], a slice, or None for all.

Dimensions: P ensemble members, N batch, `in`/`out` features. Every layer maps [P, N, in] -> [P, N, out]; an input
without the leading ensemble dimension, [N, in], is shared by all members.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from components.checks import Count, NonNegative, Positive, Size, SizeOrZero, checked

RELU_GAIN = math.sqrt(2.0)

Members = Tensor | slice | None


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

    def uniform_(self) -> "EnsembleLinear":
        """Draw weights and biases anew as `torch.nn.Linear` does, from -1/sqrt(in) to 1/sqrt(in)."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        with torch.no_grad():
            for parameter in (self.weight, self.bias):
                parameter.uniform_(-bound, bound)
        return self

    def forward(self, x: Tensor, members: Members = None) -> Tensor:
        weight, bias = self.weight, self.bias
        if members is not None:
            weight, bias = weight[members], bias[members]
        if x.dim() == 2:
            x = x.expand(weight.shape[0], *x.shape)
        if weight.shape[-1] == 1 and weight.device.type == "cpu":
            # A batched product with one column takes three times as long on an AMD EPYC, and two thirds of the time on
            # an Intel Xeon, where this is the faster once it is compiled.
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)

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

    def forward(self, x: Tensor, members: Members = None) -> Tensor:
        weight, bias = self.weight, self.bias
        if members is not None:
            weight, bias = weight[members], bias[members]
        normalised = nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(bias, normalised, weight)


class EnsembleNormalisedLinear(EnsembleLinear):
    """Linear layers that are divided by their spectral norm: [P, N, in] -> [P, N, out].

    A reparametrisation, with a gradient through the norm, as `torch.nn.utils.parametrizations.spectral_norm` has it
    for one matrix (arXiv 1802.05957): each pass in training mode makes a step of power iteration for every member.
    """

    def __init__(self, members: int, in_features: int, out_features: int, gain: float = 1.0) -> None:
        super().__init__(members, in_features, out_features, gain)
        self.register_buffer("left", nn.functional.normalize(torch.randn(members, 1, in_features), dim=-1))
        self.register_buffer("right", nn.functional.normalize(torch.randn(members, 1, out_features), dim=-1))
        for _ in range(15):  # or a first evaluation would divide by anything
            self._iterate()

    def uniform_(self) -> "EnsembleNormalisedLinear":
        super().uniform_()
        for _ in range(15):
            self._iterate()
        return self

    @torch.no_grad()
    def _iterate(self) -> None:
        self.right.copy_(nn.functional.normalize(self.left @ self.weight, dim=-1))
        self.left.copy_(nn.functional.normalize(self.right @ self.weight.mT, dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._iterate()
        left, right = self.left.clone(), self.right.clone()  # passes to come change them before this one's gradient
        sigma = ((left @ self.weight) * right).sum(-1, keepdim=True)
        if x.dim() == 2:
            x = x.expand(self.weight.shape[0], *x.shape)
        return torch.baddbmm(self.bias, x, self.weight / sigma)


class EnsembleSpectralLinear(EnsembleLinear):
    """Linear layers whose matrices are kept at spectral norm 1: [P, N, in] -> [P, N, out].

    A projection, not a reparametrisation: each forward pass in training mode makes one step of power iteration for
    every member and divides the stored matrix by the norm found, so that gradients are taken at the projected weights
    and do not pass through the norm (the layer of "modern" critics, after Bjorck et al., arXiv 2106.01151). In
    evaluation mode nothing changes.
    """

    def __init__(self, members: int, in_features: int, out_features: int, gain: float = 1.0) -> None:
        super().__init__(members, in_features, out_features, gain)
        start = torch.randn(members, out_features)
        self.register_buffer("right", start / start.norm(dim=-1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.project()
        return super().forward(x)

    @torch.no_grad()
    def project(self) -> None:
        """One step of power iteration on the right singular vectors [P, out], then W <- W / sigma."""
        # As products of rows [P, 1, features] with matrices: of columns, they take a CPU twice to four times as long.
        left = self.right.unsqueeze(1) @ self.weight.mT
        left /= left.norm(dim=-1, keepdim=True)
        right = left @ self.weight
        sigma = right.norm(dim=-1, keepdim=True)
        self.right.copy_((right / sigma).squeeze(1))
        self.weight.div_(sigma)


def _check_initialisation(initialisation: str) -> None:
    if initialisation not in ("orthogonal", "uniform"):
        raise ValueError(f"Unknown initialisation={initialisation!r}: expected one of orthogonal, uniform.")


def _uniform_(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, EnsembleLinear):
            layer.uniform_()


ACTIVATIONS = {"relu": partial(nn.ReLU, inplace=True), "tanh": nn.Tanh, "silu": nn.SiLU, "elu": nn.ELU}


def activation_of(network: nn.Sequential) -> str:
    """The name of the activation between the layers of an `EnsembleMLP`; ``relu`` where there is none."""
    kinds = {name: type(make()) for name, make in ACTIVATIONS.items()}
    return next((name for layer in network for name, kind in kinds.items() if type(layer) is kind), "relu")


@checked
class EnsembleMLP(nn.Sequential):
    """P networks of linear layers with activations between them: [N, in] or [P, N, in] -> [P, N, out].

    Args:
        hidden_dim: width.
        layers: hidden layers.
        activation: ``relu``, ``tanh``, ``silu`` or ``elu``.
        gain, last_gain: of the orthogonal initialisation of the hidden layers, and of the last.
        initialisation: ``orthogonal`` with zero biases, or ``uniform``, PyTorch's own.
        layer_norm: normalise after each activation (as ReBRAC's critics do, arXiv 2305.09836).
    """

    def __init__(
        self,
        in_features: Count,
        out_features: Size,
        members: Size = 1,
        hidden_dim: Size = 256,
        layers: SizeOrZero = 2,
        activation: str = "relu",
        gain: NonNegative = RELU_GAIN,
        last_gain: NonNegative = 0.01 * RELU_GAIN,
        initialisation: str = "orthogonal",
        layer_norm: bool = False,
    ) -> None:
        _check_initialisation(initialisation)
        if activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}.")
        parts: list[nn.Module] = []
        for _ in range(layers):
            parts += [EnsembleLinear(members, in_features, hidden_dim, gain), ACTIVATIONS[activation]()]
            if layer_norm:
                parts.append(EnsembleLayerNorm(members, hidden_dim))
            in_features = hidden_dim
        super().__init__(*parts, EnsembleLinear(members, in_features, out_features, last_gain))
        if initialisation == "uniform":
            _uniform_(self)

    def forward(self, x: Tensor, members: Members = None) -> Tensor:
        for layer in self:
            if isinstance(layer, nn.ReLU):
                x = x.relu_()  # without a call of a module
            else:
                x = layer(x, members) if isinstance(layer, EnsembleLinear | EnsembleLayerNorm) else layer(x)
        return x


SPECTRAL = {"projected": EnsembleSpectralLinear, "normalised": EnsembleNormalisedLinear}
"""Layers whose matrices have a spectral norm of 1."""


class ResidualBlock(nn.Module):
    """x + W_2 relu(W_1 LayerNorm(x)), both matrices at spectral norm 1: [P, N, dim] -> [P, N, dim]."""

    def __init__(self, members: int, dim: int, gain: float, spectral: str, eps: float) -> None:
        super().__init__()
        linear = SPECTRAL[spectral]
        self.branch = nn.Sequential(
            EnsembleLayerNorm(members, dim, eps),
            linear(members, dim, dim, gain),
            nn.ReLU(inplace=True),
            linear(members, dim, dim, gain),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@checked
class EnsembleResidualMLP(nn.Sequential):
    """The "modern" P networks: linear, ReLU, residual blocks, linear: [N, in] or [P, N, in] -> [P, N, out].

    Args:
        hidden_dim: width.
        blocks: residual blocks.
        gain, last_gain: of the orthogonal initialisation of all layers but the last, and of the last.
        spectral: matrices in blocks are ``projected`` to spectral norm 1 after each step (arXiv 2110.03375), or
            ``normalised`` by it, with its gradient (arXiv 2106.01151, 2403.13097).
        eps: of the layer normalisation.
        initialisation: ``orthogonal`` with zero biases, or ``uniform``, PyTorch's own.
    """

    def __init__(
        self,
        in_features: Count,
        out_features: Size,
        members: Size = 1,
        hidden_dim: Size = 256,
        blocks: Size = 1,
        gain: NonNegative = RELU_GAIN,
        last_gain: NonNegative = 0.01 * RELU_GAIN,
        spectral: str = "projected",
        eps: Positive = 1e-3,
        initialisation: str = "orthogonal",
    ) -> None:
        if spectral not in SPECTRAL:
            raise ValueError(f"Unknown spectral={spectral!r}: expected one of {', '.join(SPECTRAL)}.")
        _check_initialisation(initialisation)
        super().__init__(
            EnsembleLinear(members, in_features, hidden_dim, gain),
            nn.ReLU(inplace=True),
            *(ResidualBlock(members, hidden_dim, gain, spectral, eps) for _ in range(blocks)),
            EnsembleLinear(members, hidden_dim, out_features, last_gain),
        )
        if initialisation == "uniform":
            _uniform_(self)
