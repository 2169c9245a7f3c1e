"""Losses that improve a policy against critics, from a batch of data: exchangeable parts of any actor-critic.

Every objective is called as `objective(policy, action, critic)`:

* policy: distribution of actions at the batch's states, see `components.control.policies.Policy`;
* action: the data's own actions, [N, A];
* critic: what the critics say at the batch's states, see `Critic`;

and returns `(loss, metrics)`, the loss a scalar whose gradient is meant for the policy alone, the metrics scalars
without gradient. With several processes each has its own rows; weights and scales are those of the whole batch.

Dimensions: P ensemble members, N batch, A action.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from components.buildable import buildable
from components.checks import NonNegative, Number, Positive, Size, checked
from components.control.pessimism import mean_over, pessimistic_mean
from components.control.policies import Policy
from components.control.weighting import MODES, advantage_weights, effective_sample_size
from components.distributed import gather_rows, own_rows, world_size


@dataclass
class Critic:
    """What an objective may ask about actions at a batch's states.

    Attributes:
        values: of actions [..., N, A], what every member of the ensemble says, [P, ..., N].
        believed: of actions [..., N, A], what the agent makes of that, [..., N], as pessimistic as it is.
        advantage: of the data's actions over a state value, [N]; None where no state value is learned.
        entropy_weight: by how much -log pi counts as reward; None where it does not.
        judge: what the agent makes of what all members say, [P, ..., N] -> [..., N]; None where it asks some of them.
    """

    values: Callable[[Tensor], Tensor]
    believed: Callable[[Tensor], Tensor]
    advantage: Tensor | None = None
    entropy_weight: Tensor | None = None
    judge: Callable[[Tensor], Tensor] | None = None

    def value(self, action: Tensor, pessimism: float | None) -> Tensor:
        """[..., N, A] -> [..., N]: the mean less `pessimism` times the disagreement, or what the agent believes."""
        return self.believed(action) if pessimism is None else pessimistic_mean(self.values(action), pessimism)


Objective = Callable[[Policy, Tensor, Critic], tuple[Tensor, dict[str, Tensor]]]
REDUCTIONS = {"mean": lambda x, size: x / size, "sum": lambda x, size: x}
"""Over the coordinates of an action, of what is a sum over so many."""


ADVANTAGES = ("policy", "state")


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"Unknown {name}={value!r}: expected one of {', '.join(known)}.")


def advantages(
    policy: Policy,
    action: Tensor,
    critic: Critic,
    over: str,
    samples: int,
    pessimism: float | None,
    data_pessimism: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Those of the data's actions, [N], and metrics; see `AdvantageWeighted` for what they are over."""
    if over == "state":
        if critic.advantage is None:
            raise ValueError(
                "module.objective.advantage=state: expected an agent that learns a state value, as with "
                "module/value=expectile, found none."
            )
        return critic.advantage, {}
    sampled = policy.sample((samples,))
    if critic.judge is None and (pessimism is None or data_pessimism is None):
        value = mean_over(critic.value(sampled, pessimism), 0)
        return critic.value(action, data_pessimism) - value, {"actor_value": value.mean()}

    def judged(values: Tensor, by: float | None) -> Tensor:
        return critic.judge(values) if by is None else pessimistic_mean(values, by)

    values = critic.values(torch.cat([sampled, action.unsqueeze(0)]))  # [P, S + 1, N]
    value = mean_over(judged(values[:, :-1], pessimism), 0)
    return judged(values[:, -1], data_pessimism) - value, {"actor_value": value.mean()}


@buildable()
@checked
@dataclass
class ReparameterisedGradient:
    """Climb the value of sampled actions through the samples: SAC, TD3, TD3+BC (arXiv 1812.05905, 1802.09477,
    2106.06860).

    The loss is alpha log pi - Q, where there is an entropy bonus, and with `behaviour_cloning` beside it the squared
    distance D of the samples from the data's actions: w (alpha log pi - Q) / |Q| + c D, where |Q| is the mean size of
    the value, a constant; or with `scaled=distance` w (alpha log pi - Q) + c |Q| D, which has the same minimum.

    Args:
        pessimism: weight of the ensemble's pairwise disagreement, 0.5 with two members for their minimum; None for
            what the agent believes.
        noise_clip: bound of the noise in sampled actions, if they have some.
        value_weight: w.
        behaviour_cloning: c; None leaves D and |Q| out.
        scaled: ``value`` or ``distance``, see above.
        over_action: D is the ``mean`` or the ``sum`` over the action's coordinates.
    """

    pessimism: Number | None = None
    noise_clip: NonNegative | None = None
    value_weight: NonNegative = 1.0
    behaviour_cloning: NonNegative | None = None
    scaled: str = "value"
    over_action: str = "mean"

    def __post_init__(self) -> None:
        _check_choice("scaled", self.scaled, ("value", "distance"))
        _check_choice("over_action", self.over_action, tuple(REDUCTIONS))

    def __call__(self, policy: Policy, action: Tensor, critic: Critic) -> tuple[Tensor, dict[str, Tensor]]:
        if critic.entropy_weight is None:
            sampled = policy.sample(clip=self.noise_clip)
            value = critic.value(sampled, self.pessimism)
            cost, metrics = -value.mean(), {}
        else:
            if self.noise_clip is not None:
                raise ValueError(
                    f"module.objective.noise_clip={self.noise_clip}: expected null with an entropy bonus (or "
                    "module.temperature=null), found noise whose density nobody knows."
                )
            sampled, log_prob = policy.sample_with_log_prob()
            value = critic.value(sampled, self.pessimism)
            cost = (critic.entropy_weight * log_prob - value).mean()
            metrics = {"entropy": -log_prob.detach().mean()}
        metrics["actor_value"] = value.detach().mean()
        if self.value_weight != 1:
            cost = self.value_weight * cost
        if self.behaviour_cloning is None:
            return cost, metrics
        squares = (sampled - action).square().sum(-1).mean()
        metrics["behaviour_distance"] = squares.detach() / action.shape[-1]
        distance = self.behaviour_cloning * REDUCTIONS[self.over_action](squares, action.shape[-1])
        scale = gather_rows(value.detach()).abs().mean()
        return (cost / scale + distance if self.scaled == "value" else cost + scale * distance), metrics


@buildable()
@checked
@dataclass
class AdvantageWeighted:
    """Regression on the data's actions with weights that grow with their advantage (AWAC, arXiv 2006.09359; IQL, arXiv
    2110.06169; MOOD, arXiv 2403.13097; FB-AW, arXiv 2412.04368).

    The loss is - sum_i w_i log pi(a_i | s_i) / A. The advantage is the ensemble's mean at the data's action less the
    pessimistic value of the policy, averaged over samples. No action absent from the data is ever a target.

    Args:
        temperature: divides the advantage; large values clone the behaviour, small ones the batch's best action. The
            inverse of what IQL's papers and codes call beta.
        weighting: ``softmax``, ``iwis`` or ``exp``, see `components.control.weighting.advantage_weights`.
        renormalise, max_weight: see there.
        advantage: over the value of the ``policy``, or over the ``state`` value that the agent learns.
        value_samples: policy samples for the value of a state.
        pessimism: of the policy's value, 0.5 with two members for their minimum; None for what the agent believes.
        data_pessimism: that of the data's action.
        max_advantage: what the advantage is cut off at, if at all.
        over_batch: the losses' ``sum``, for weights that sum to one, or their ``mean``.
        over_action: log-densities are the ``mean`` or the ``sum`` of those of the action's coordinates.
    """

    temperature: Positive = 1.0
    weighting: str = "iwis"
    renormalise: bool = True
    max_weight: Positive = 100.0
    advantage: str = "policy"
    value_samples: Size = 4
    pessimism: Number | None = 0.5
    data_pessimism: Number | None = 0.0
    max_advantage: Number | None = None
    over_batch: str = "sum"
    over_action: str = "mean"

    def __post_init__(self) -> None:
        _check_choice("weighting", self.weighting, MODES)
        _check_choice("advantage", self.advantage, ADVANTAGES)
        _check_choice("over_batch", self.over_batch, tuple(REDUCTIONS))
        _check_choice("over_action", self.over_action, tuple(REDUCTIONS))

    def __call__(self, policy: Policy, action: Tensor, critic: Critic) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            advantage, metrics = advantages(
                policy, action, critic, self.advantage, self.value_samples, self.pessimism, self.data_pessimism
            )
            metrics["advantage_std"], metrics["advantage"] = torch.std_mean(advantage)
            if self.max_advantage is not None:
                advantage = advantage.clamp(max=self.max_advantage)
            weights = advantage_weights(
                gather_rows(advantage), self.temperature, self.weighting, self.renormalise, self.max_weight
            )
            metrics["effective_sample_size"] = effective_sample_size(weights)
            metrics["max_weight"] = weights.max()
            # Gradients are averaged over processes while the loss is a sum over the whole batch.
            own_weights = own_rows(weights) * world_size() if world_size() > 1 else weights
        log_prob = REDUCTIONS[self.over_action](policy.log_prob(action), action.shape[-1])
        metrics["behaviour_distance"] = mse_loss(policy.mean.detach(), action)
        return -REDUCTIONS[self.over_batch]((own_weights * log_prob).sum(), len(weights)), metrics


@buildable()
@checked
@dataclass
class BehaviourCloning:
    """Imitate the data, whatever the critics say: the loss is - log pi(a | s), averaged.

    Args:
        over_action: log-densities are the ``mean`` or the ``sum`` of those of the action's coordinates.
    """

    over_action: str = "mean"

    def __post_init__(self) -> None:
        _check_choice("over_action", self.over_action, tuple(REDUCTIONS))

    def __call__(self, policy: Policy, action: Tensor, critic: Critic) -> tuple[Tensor, dict[str, Tensor]]:
        log_prob = REDUCTIONS[self.over_action](policy.log_prob(action), action.shape[-1])
        return -log_prob.mean(), {"behaviour_distance": mse_loss(policy.mean.detach(), action)}


@buildable()
@checked
@dataclass
class AdvantageSampled:
    """Imitate actions of the data that are drawn the more often the greater their advantage (ASAC, arXiv 2403.13097).

    As advantage-weighted regression with softmax weights over all of the data, of which those over a batch are a biased
    estimate. The rows to imitate are drawn beside the critics' batch with probabilities exp(logit) over their sum; the
    logits are 0 at first, and of the rows of both batches anew in each update.

    Args:
        temperature: the logits are the advantage over it.
        advantage, value_samples, pessimism, data_pessimism, over_action: see `AdvantageWeighted`.
    """

    temperature: Positive = 1.0
    advantage: str = "policy"
    value_samples: Size = 1
    pessimism: Number | None = 0.5
    data_pessimism: Number | None = 0.0
    over_action: str = "mean"

    def __post_init__(self) -> None:
        _check_choice("advantage", self.advantage, ADVANTAGES)
        _check_choice("over_action", self.over_action, tuple(REDUCTIONS))

    def __call__(self, policy: Policy, action: Tensor, critic: Critic) -> tuple[Tensor, dict[str, Tensor]]:
        return BehaviourCloning(self.over_action)(policy, action, critic)

    @torch.no_grad()
    def logits(self, policy: Policy, action: Tensor, critic: Critic) -> tuple[Tensor, dict[str, Tensor]]:
        """How likely the data's actions are to be drawn, [N], and metrics."""
        advantage, metrics = advantages(
            policy, action, critic, self.advantage, self.value_samples, self.pessimism, self.data_pessimism
        )
        metrics["advantage_std"], metrics["advantage"] = torch.std_mean(advantage)
        return advantage / self.temperature, metrics
