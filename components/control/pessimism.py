"""How an ensemble of critics becomes one value: minima, penalised means, and a penalty that is learned.

Cetin and Celiktutan, "Learning Pessimism for Reinforcement Learning", arXiv 2110.03375; Fujimoto et al. (TD3),
arXiv 1802.09477; Chen et al. (REDQ), arXiv 2101.05982.

Dimensions: P ensemble members, B batch, M quantiles of the return (1: its expectation).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from components.checks import Count, Number, Range, Size, checked
from components.networks.ensemble import Members


def mean_over(x: Tensor, dim: int) -> Tensor:
    """`x.mean(dim)`, bit for bit, without the cost of a reduction where there are one or two to average."""
    if x.shape[dim] == 1:
        return x.squeeze(dim)
    if x.shape[dim] == 2:
        first, second = x.unbind(dim)
        return (first + second) / 2
    return x.mean(dim)


def pairwise_disagreement(x: Tensor) -> Tensor:
    """Mean absolute difference of two distinct ensemble members, elementwise: [P, ...] -> [...].

    1 / (P (P - 1)) sum_{p != q} |x_p - x_q|: the Gini mean difference, which is the expected Wasserstein-1 distance of
    two members (arXiv 2110.03375); zero for a single member.
    """
    members = x.shape[0]
    if members == 1:
        return torch.zeros_like(x[0])
    if members == 2:
        return (x[0] - x[1]).abs()
    # Sorted members turn the O(P^2) sum of pairwise differences into one weighted sum: x_(k) is counted positively
    # k times and negatively P - 1 - k times.
    weights = 2.0 * torch.arange(members, device=x.device, dtype=x.dtype) - (members - 1)
    return torch.tensordot(weights, x.sort(0).values, dims=1) * (2.0 / (members * (members - 1)))


def mean_and_disagreement(x: Tensor) -> tuple[Tensor, Tensor]:
    """`mean_over` the ensemble and `pairwise_disagreement`, bit for bit, of two members with fewer operations."""
    if x.shape[0] != 2:
        return mean_over(x, 0), pairwise_disagreement(x)
    first, second = x.unbind(0)
    return (first + second) / 2, (first - second).abs()


def standard_deviation(x: Tensor) -> Tensor:
    """Population standard deviation over the ensemble, elementwise: [P, ...] -> [...]."""
    return x.std(0, correction=0)


UNCERTAINTIES = {"pairwise": pairwise_disagreement, "std": standard_deviation}


def pessimistic_mean(x: Tensor, pessimism: float) -> Tensor:
    """Mean over the ensemble less `pessimism` times the pairwise disagreement, elementwise: [P, ...] -> [...].

    For P = 2 a pessimism of 0.5 is the minimum; for any P it is the average of min(x_p, x_q) over pairs, and -0.5 that
    of the maximum.
    """
    if pessimism == 0:
        return mean_over(x, 0)
    mean, disagreement = mean_and_disagreement(x)
    return mean - pessimism * disagreement


class Pessimism(nn.Module, ABC):
    """How much an agent believes its critics, once for what it learns from and once for what it acts on.

    One with parameters that require gradients is learned: agents step an optimiser of their own on `loss`, then call
    `stepped`.

    Attributes:
        kept: names of the state of a learned one that a run which begins from another leaves: settings and schedules.
    """

    kept: tuple[str, ...] = ()

    @abstractmethod
    def target(self, q: Tensor) -> Tensor:
        """The value that critics regress on, [B, M], from the target critics' q [P, B, M]."""

    @abstractmethod
    def actor(self, q: Tensor) -> Tensor:
        """The value that the actor climbs, [B], from the critics' q [P, B, M]."""

    def target_members(self, members: int, device: torch.device) -> Members:
        """Which of so many target critics `target` is given, asked anew for each target; None for all."""
        return None

    def actor_members(self, members: int, device: torch.device) -> Members:
        """Which of so many critics `actor` is given."""
        return None

    def loss(self, td_error: Tensor) -> Tensor:
        """What its parameters minimise, from the critics' errors Q - y, [P, B] and without gradient."""
        raise NotImplementedError(f"{type(self).__name__} has parameters to learn, but no loss.")

    @torch.no_grad()
    def stepped(self) -> None:
        """Called after each step on the loss."""

    def scores(self) -> dict[str, Tensor]:
        """Numbers to record, by name."""
        return {}


class MinimumPessimism(Pessimism):
    """Clipped double Q-learning: the minimum over all critics (TD3, SAC).

    Args:
        actor: what the actor climbs, ``min`` (SAC) or ``first``, the first critic alone (TD3).
    """

    def __init__(self, actor: str = "min") -> None:
        super().__init__()
        if actor not in ("min", "first"):
            raise ValueError(f"Unknown actor={actor!r}: expected min or first.")
        self.actor_uses = actor

    def target(self, q: Tensor) -> Tensor:
        return _ordered(q).amin(0)

    def actor(self, q: Tensor) -> Tensor:
        return mean_over(_ordered(q).amin(0), -1)

    def actor_members(self, members: int, device: torch.device) -> Members:
        return slice(1) if self.actor_uses == "first" else None


@checked
class SubsetMinimumPessimism(Pessimism):
    """The minimum over a random subset of the critics, drawn anew for each target; the actor climbs the mean (REDQ).

    Args:
        subset: critics in the minimum.
    """

    def __init__(self, subset: Size = 2) -> None:
        super().__init__()
        self.subset = subset

    def target_members(self, members: int, device: torch.device) -> Members:
        if self.subset > members:
            raise ValueError(f"subset={self.subset}: expected at most the number of critics, {members}.")
        return torch.randperm(members, device=device)[: self.subset]

    def target(self, q: Tensor) -> Tensor:
        return _ordered(q).amin(0)

    def actor(self, q: Tensor) -> Tensor:
        return q.mean((0, 2))


@checked
class FixedPessimism(Pessimism):
    """Mean over the critics less beta times their disagreement: Q_mean - beta U (arXiv 2110.03375).

    0 is the plain mean, 0.5 the minimum of two critics or the average of pairwise minima of more, below 0 optimism.
    With quantiles the critics' distributions are compared: sorted quantiles are averaged over the critics, and U, their
    mean pairwise Wasserstein-1 distance, is taken from every quantile.

    Args:
        beta: pessimism of the targets.
        actor_beta: that of the actor; the same if None.
        uncertainty: U, ``pairwise`` disagreement or ``std``.
    """

    def __init__(self, beta: Number = 0.5, actor_beta: Number | None = None, uncertainty: str = "pairwise") -> None:
        super().__init__()
        if uncertainty not in UNCERTAINTIES:
            raise ValueError(f"Unknown uncertainty={uncertainty!r}: expected one of {', '.join(UNCERTAINTIES)}.")
        self.uncertainty = UNCERTAINTIES[uncertainty]
        self.beta = nn.Parameter(torch.tensor(float(beta)), requires_grad=False)
        self.register_buffer("actor_beta", torch.tensor(float(beta if actor_beta is None else actor_beta)))

    def penalised(self, q: Tensor, beta: Tensor | float) -> Tensor:
        """[P, B, M] -> [B, M]."""
        q = _ordered(q)
        if self.uncertainty is pairwise_disagreement:
            mean, uncertainty = mean_and_disagreement(q)
        else:
            mean, uncertainty = mean_over(q, 0), self.uncertainty(q)
        return mean - beta * (uncertainty if q.shape[-1] == 1 else uncertainty.mean(-1, keepdim=True))

    def target(self, q: Tensor) -> Tensor:
        return self.penalised(q, self.beta)

    def actor(self, q: Tensor) -> Tensor:
        return mean_over(self.penalised(q, self.actor_beta), -1)


@checked
class DualPessimism(FixedPessimism):
    """Learns beta as the dual variable of "targets are unbiased on average": dual TD-learning (arXiv 2110.03375).

    Replay actions were not chosen to exploit the critics of today, so that the mean TD error tells how far the targets,
    whose actions were, lie above (negative: beta rises) or below them (beta falls). The error measures the *drift* of
    the values: at a fixed point of the critics it vanishes for every beta.

    Args:
        beta: where it starts; it is free to become negative.
        actor_beta: a constant for the actor; None ties it to beta.
        uncertainty: see `FixedPessimism`.
        shift: added to the tied pessimism of the actor, below zero for annealed optimism; it rises linearly to zero.
        shift_steps: steps of beta until it is zero.
        sign: -1 learns against the dual: a control for experiments, which has to fail.
    """

    kept = ("shift", "actor_beta")

    def __init__(
        self,
        beta: Number = 0.5,
        actor_beta: Number | None = None,
        uncertainty: str = "pairwise",
        shift: Annotated[float, Range(most=0)] = 0.0,
        shift_steps: Count = 1,
        sign: Annotated[int, Range(-1, 1)] = 1,
    ) -> None:
        super().__init__(beta, actor_beta, uncertainty)
        if shift and actor_beta is not None:
            raise ValueError(f"shift={shift}: expected 0 beside a fixed actor_beta.")
        self.beta.requires_grad_()
        if sign == 0:
            raise ValueError("sign=0: expected 1 or -1.")
        self.sign = sign
        self.tied = actor_beta is None
        self.shift_rise = -shift / shift_steps
        self.register_buffer("shift", torch.tensor(float(shift)))
        self._tie()
        self.register_load_state_dict_post_hook(DualPessimism._tie)  # to a beta of another run

    def loss(self, td_error: Tensor) -> Tensor:
        """beta times the mean TD error Q - y of any shape, whose gradient by beta is that mean and by all else zero."""
        return self.sign * self.beta * td_error.detach().mean()

    @torch.no_grad()
    def stepped(self) -> None:
        """The optimism decays, then the actor's pessimism follows."""
        if self.tied:
            self.shift.add_(self.shift_rise).clamp_(max=0.0)
            self._tie()

    @torch.no_grad()
    def _tie(self, *_: object) -> None:
        if self.tied:
            self.actor_beta.copy_(self.beta + self.shift)

    def scores(self) -> dict[str, Tensor]:
        return {"pessimism": self.beta.detach().clone()}


def _ordered(q: Tensor) -> Tensor:
    """Quantiles in ascending order."""
    return q if q.shape[-1] == 1 else q.sort(-1).values


def checked_value(part: nn.Module, use: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    """What a part of an agent gave, as it is, if nothing would broadcast.

    Raises:
        ValueError: it has another shape.
    """
    if list(value.shape) != list(shape):
        name = f"{type(part).__name__}.{use}"
        raise ValueError(f"{name}: expected a value of shape {list(shape)}, found {list(value.shape)}.")
    return value
