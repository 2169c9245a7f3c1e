"""Local signal mixing: feature maps are shifted at random, as strongly as their gradients are rough.

Cetin et al., "Stabilizing Off-Policy Deep Reinforcement Learning from Pixels", arXiv 2207.00986, with the rules of the
code published with it where paper and code differ. Nothing here knows of agents.

Dimensions: B batch, C channels, H height and width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from components.checks import LearningRate, Momentum, NonNegative, Share, Size, checked
from components.distributed import average_

Score = Callable[[Tensor], Tensor]


def translate(z: Tensor, delta: Tensor) -> Tensor:
    """Maps moved by fractions of a pixel: out[i, j] = z[i + y, j + x], bilinear, the border going on for ever.

    Two products with matrices of interpolation weights, so that the gradient is their transpose: as deterministic as a
    matrix product is, which `grid_sample` on a GPU is not, and with channels last it needs no copy.

    Args:
        z: [B, C, H, W].
        delta: (x, y) in pixels, [B, 2], or [1, 2] for all alike.

    Returns:
        [B, C, H, W], channels last.
    """
    batch, channels, height, width = z.shape
    shifts = zip((width, height), delta.float().unbind(1))
    columns, rows = (_interpolation(size, shift).to(z.dtype) for size, shift in shifts)
    x = z.permute(0, 2, 3, 1)
    x = torch.matmul(rows, x.reshape(batch, height, width * channels))
    if len(columns) == 1:
        x = torch.matmul(columns[0], x.view(batch * height, width, channels))
    else:
        x = torch.matmul(columns[:, None], x.view(batch, height, width, channels))
    return x.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _interpolation(size: int, shift: Tensor) -> Tensor:
    """Weights [K, size, size] of what lies at 0 .. size - 1 in what is wanted at positions moved by `shift` [K]."""
    positions = torch.arange(size, device=shift.device, dtype=torch.float32)
    wanted = (positions + shift[:, None]).clamp(0, size - 1)
    return (1 - (wanted[..., None] - positions).abs()).clamp(min=0)


@checked
class LocalSignalMixing(nn.Module):
    """LIX: one random translation of all feature maps of a call, at most (pad + 1/2) strength pixels along each axis.

    In evaluation mode the identity, to the bit.

    Args:
        pad: scale of the translation.
        shared_across_batch: the same translation for all samples of a call; otherwise each has its own. Processes that
            share a batch draw one each.
    """

    def __init__(self, pad: NonNegative = 2.0, shared_across_batch: bool = True) -> None:
        super().__init__()
        self.pad = pad
        self.shared_across_batch = shared_across_batch

    def forward(self, z: Tensor, strength: Tensor | float, delta: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W].

        Args:
            strength: in [0, 1]; no gradient flows to it.
            delta: the translation (x, y) to make instead of a random one, [B, 2] or [1, 2].
        """
        if not self.training:
            return z
        if delta is None:
            u = torch.rand(1 if self.shared_across_batch else len(z), 2, device=z.device)
            delta = (self.pad + 0.5) * strength * (2 * u - 1)
        return translate(z, delta.detach())


def discontinuity_score(gradient: Tensor, robust: bool = True, window: int = 3, eps: float = 1e-20) -> Tensor:
    """Normalised discontinuity (ND) of a feature gradient [B, C, H, W]: how rough its mean over the batch is in space.

    With g the mean gradient, its border repeated outwards, and all means taken over the neighbours k of a position p in
    its window:

        robust:  mean over p of log(1 + mean_k (g_k - g_p)^2 / (mean_k g_k^2 + eps)), the published code's;
        else:    mean over p of mean_k (g_k - g_p)^2 / (g_p^2 + eps), the paper's definition, which outliers govern.

    White noise has 1.05, a constant 0. Computed in float32; `eps` makes itself felt where gradients are below 1e-9.
    """
    g = gradient.float().mean(0)
    margin = window // 2
    padded = nn.functional.pad(g, (margin,) * 4, mode="replicate")
    around = padded.unfold(1, window, 1).unfold(2, window, 1)  # [C, H, W, window, window]
    neighbours = window**2 - 1
    noise = (around - g[..., None, None]).square().sum((-2, -1)) / neighbours
    if not robust:
        return (noise / (g.square() + eps)).mean()
    others = torch.ones(window, window, device=g.device)
    others[margin, margin] = 0
    signal = (around.square() * others).sum((-2, -1)) / neighbours
    return torch.log1p(noise / (signal + eps)).mean()


class _Dual(torch.autograd.Function):
    """Identity for features; the strength's gradient is target - score(features' gradient), whatever the loss."""

    @staticmethod
    def forward(features: Tensor, strength: Tensor, target: float, score: Score) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, _, ctx.target, ctx.score = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        mean = gradient.float().mean(0, keepdim=True)
        average_([mean])
        return gradient, ctx.target - ctx.score(mean), None, None


@checked
class DualStrength(nn.Module):
    """A strength in [0, 1] that rises while the gradient at this place scores above a target, and falls below it.

    The place is where `forward` is put: an identity whose backward pass leaves the features' gradient alone, and gives
    the strength target - score as its own, once for each backward pass through it. The gradient is averaged over the
    batch, and over processes, before it is scored. Call `stepped` after each step of the optimiser.

    Args:
        initial: the strength at the start.
        target: of the score.
        learning_rate, momentum: Adam's step and first decay rate; it takes nearly equal steps while the score stays on
            one side. A learning rate of 0 keeps the strength, and the score is still measured.
        score: of a gradient [1, C, H, W].
    """

    memory = 0.01

    def __init__(
        self,
        initial: Share = 0.5,
        target: NonNegative = 0.535,
        learning_rate: LearningRate = 2e-3,
        momentum: Momentum = 0.5,
        score: Score = discontinuity_score,
    ) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(float(initial)))
        self.target = target
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.score = score
        self.register_buffer("mean_score", torch.zeros(()))  # over about a hundred updates
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        return _Dual.apply(features, self.strength, self.target, self.score)

    def value(self) -> Tensor:
        """The strength, without gradient."""
        return self.strength.detach()

    def parameter_group(self) -> dict[str, Any]:
        """For the optimiser of the network around it."""
        return {"params": [self.strength], "lr": self.learning_rate, "betas": (self.momentum, 0.999)}

    @torch.no_grad()
    def stepped(self) -> None:
        """Keep the strength in its range, and the score that its gradient tells in mind."""
        self.strength.clamp_(0, 1)
        self.updates += 1
        score = self.target - self.strength.grad
        self.mean_score += (score - self.mean_score) / self.updates.clamp(max=1 / self.memory)


PLACES = ("none", "all", "last", "input")


@checked
class SignalMixing(nn.Module):
    """Where an encoder of several blocks is mixed, and what tunes it: A-LIX and what it is compared with.

    Called with what leaves each block, block 0 being the image itself.

    Args:
        blocks: number of the encoder's blocks.
        place: ``all`` blocks, the ``last`` one, the ``input`` image, or ``none`` (the score is still measured).
        adaptive: tune strengths; otherwise they stay as they are at first.
        tied: one strength, tuned by the score behind the last block; otherwise each mixed block has its own.
        pad, shared_across_batch: see `LocalSignalMixing`.
        initial, target, learning_rate, momentum: see `DualStrength`.
    """

    def __init__(
        self,
        blocks: Size,
        place: str = "all",
        adaptive: bool = True,
        tied: bool = True,
        pad: NonNegative = 2.0,
        shared_across_batch: bool = True,
        initial: Share = 0.5,
        target: NonNegative = 0.535,
        learning_rate: LearningRate = 2e-3,
        momentum: Momentum = 0.5,
    ) -> None:
        super().__init__()
        if place not in PLACES:
            raise ValueError(f"Unknown place={place!r} of mixing: expected one of {', '.join(PLACES)}.")
        self.blocks = {"none": [], "all": list(range(1, blocks + 1)), "last": [blocks], "input": [0]}[place]
        self.measured = [blocks] if tied or not self.blocks else self.blocks
        self.layer = LocalSignalMixing(pad, shared_across_batch)
        self.adaptive = adaptive
        rate = learning_rate if adaptive else 0.0
        self.duals = nn.ModuleList(DualStrength(initial, target, rate, momentum) for _ in self.measured)

    def forward(self, z: Tensor, block: int) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W], what leaves block number `block`."""
        if block in self.blocks:
            tuned_by = self.duals[self.measured.index(block) if len(self.duals) > 1 else 0]
            z = self.layer(z, tuned_by.value())
        if block in self.measured:
            z = self.duals[self.measured.index(block)](z)
        return z

    def parameter_groups(self) -> Iterator[dict[str, Any]]:
        return (dual.parameter_group() for dual in self.duals)

    def stepped(self) -> None:
        for dual in self.duals:
            dual.stepped()

    def scores(self) -> dict[str, Tensor]:
        """The ND score behind the last block (its mean over about a hundred updates), and the strengths in use.

        Where each block has its own strength, its score stands beside it.
        """
        scores = {"nd_score": self.duals[-1].mean_score.clone()}
        if len(self.duals) > 1:
            for block, dual in zip(self.measured, self.duals):
                scores |= {
                    f"nd_score_{block}": dual.mean_score.clone(),
                    f"mixing_strength_{block}": dual.value().clone(),
                }
        elif self.blocks:
            scores["mixing_strength"] = self.duals[0].value().clone()
        return scores
