"""Losses that improve a policy against a critic, from a batch of data; exchangeable parts of any offline actor-critic.

Every objective is called as `objective(policy, action, critic)`:

* policy: distribution of actions at the batch's states, means [N, A];
* action: the data's own actions, [N, A];
* critic: function from actions [N, A] or [S, N, A] to the ensemble's values [P, N] or [P, S, N] at the batch's states;

and returns `(loss, metrics)`, the loss a scalar whose gradient is meant for the policy alone, the metrics scalars
without gradient. With several processes each has its own rows; weights and scales are those of the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from components.buildable import buildable
from components.checks import NonNegative, Number, Positive, Size, checked
from components.control.pessimism import pessimistic_mean
from components.control.policies import ClippedGaussianPolicy
from components.control.weighting import MODES, advantage_weights, effective_sample_size
from components.distributed import gather_rows, own_rows, world_size

Critic = Callable[[Tensor], Tensor]
Objective = Callable[[ClippedGaussianPolicy, Tensor, Critic], tuple[Tensor, dict[str, Tensor]]]


@buildable()
@checked
@dataclass
class DeterministicPolicyGradient:
    """TD3's actor: maximise the (pessimistic) value of sampled actions (arXiv 1802.09477; FB: arXiv 2209.14935).

    Args:
        pessimism: weight of the ensemble's pairwise disagreement; 0.5 with two members is their minimum.
        noise_clip: bound of the exploration noise in the sampled action.
        behaviour_cloning: weight of mean (a~ - a)^2 beside the value scaled by its mean magnitude, as in TD3+BC
            (arXiv 2106.06860); None leaves both out.
    """

    pessimism: Number = 0.5
    noise_clip: NonNegative = 0.3
    behaviour_cloning: NonNegative | None = None

    def __call__(
        self, policy: ClippedGaussianPolicy, action: Tensor, critic: Critic
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sampled = policy.sample(clip=self.noise_clip)
        value = pessimistic_mean(critic(sampled), self.pessimism)
        metrics = {"actor_value": value.detach().mean()}
        if self.behaviour_cloning is None:
            return -value.mean(), metrics
        distance = (sampled - action).square().mean()
        metrics["behaviour_distance"] = distance.detach()
        scale = gather_rows(value.detach()).abs().mean()
        return -value.mean() / scale + self.behaviour_cloning * distance, metrics


@buildable()
@checked
@dataclass
class AdvantageWeighted:
    """Regression on the data's actions with weights that grow with their advantage (AWAC, arXiv 2006.09359; MOOD,
    arXiv 2403.13097; FB-AW, arXiv 2412.04368).

    The loss is - sum_i w_i mean_j log pi(a_ij | s_i). The advantage is the plain ensemble mean at the data's action
    less the pessimistic value of the policy, averaged over samples. No action absent from the data is ever a target.

    Args:
        temperature: divides the advantage; large values clone the behaviour, small ones the batch's best action.
        weighting: ``softmax`` or ``iwis``, see `components.control.weighting.advantage_weights`.
        renormalise: see there.
        value_samples: policy samples for the value of a state.
        pessimism: of the value; 0.5 with two members is their minimum.
    """

    temperature: Positive = 1.0
    weighting: str = "iwis"
    renormalise: bool = True
    value_samples: Size = 4
    pessimism: Number = 0.5

    def __post_init__(self) -> None:
        if self.weighting not in MODES:
            raise ValueError(f"Unknown weighting={self.weighting!r}: expected one of {', '.join(MODES)}.")

    def __call__(
        self, policy: ClippedGaussianPolicy, action: Tensor, critic: Critic
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            samples = policy.sample(sample_shape=(self.value_samples,))
            values = critic(torch.cat([samples, action.unsqueeze(0)]))  # [P, S + 1, N]
            value = pessimistic_mean(values[:, :-1], self.pessimism).mean(0)
            advantage = values[:, -1].mean(0) - value
            weights = advantage_weights(gather_rows(advantage), self.temperature, self.weighting, self.renormalise)
            metrics = {
                "actor_value": value.mean(),
                "advantage": advantage.mean(),
                "advantage_std": advantage.std(),
                "effective_sample_size": effective_sample_size(weights),
                "max_weight": weights.max(),
            }
            # Gradients are averaged over processes while the loss is a sum over the whole batch.
            own_weights = own_rows(weights) * world_size()
        log_prob = policy.log_prob(action).mean(-1)
        metrics["behaviour_distance"] = (policy.mean.detach() - action).square().mean()
        return -(own_weights * log_prob).sum(), metrics
