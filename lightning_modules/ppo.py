"""Proximal policy optimisation (Schulman et al., arXiv 1707.06347). See docs/methods/ppo.md.

Dimensions: E environments of this process, T steps of a rollout, B batch, O observation, F features, A action.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from components.checks import Count, LearningRate, NonNegative, Positive, Range, Share, Size, checked
from components.control.actors import Actor, ActorPolicy
from components.control.normalisation import ObservationNormaliser, RewardNormaliser
from components.control.on_policy import clipped_policy_loss, clipped_value_loss, divergence, generalised_advantages
from components.distributed import average_, gather_rows
from components.networks.encoders import Encoder, FlatObservations, evaluating
from components.networks.optimizers import FusedAdam
from lightning_modules.base import LearningMethod

_FACTOR = 1.5
"""Of the learning rate, where the policy moves by more than twice or less than half as much as it should."""
_LEARNING_RATE_RANGE = (1e-2, 1e2)
"""Of what it is multiplied by in all."""


@checked
class ProximalPolicyOptimisation(LearningMethod):
    """A policy that climbs its advantage as long as it stays near the one that collected the rollout, and its value.

    Args:
        observation_shape, action_dim: sizes O and A.
        actor: makes the actor, called with the sizes F and A.
        value: makes the network of the state value, called with F and 1; [B, F] -> [1, B, 1].
        encoder: makes what turns observations into features, called with O, which both losses train.
        normaliser: makes running statistics that observations are scaled by before anything else, called with O; None
            for observations as they are.
        reward_normaliser: running statistics that rewards are scaled by; None for none.
        reward_scale: what rewards are multiplied by.
        discount, trace: gamma and lambda of generalised advantages.
        clip: how far the ratio of new and old densities counts, from 1.
        value_clip: how far values count from those before, in clipped value losses; None for plain ones.
        value_weight, entropy_weight: of the value's loss, which is half the squared error, and of the entropy.
        normalise_advantages: to mean 0 and standard deviation 1 over each batch of all processes.
        learning_rate, eps: Adam's.
        max_norm: the gradient of all parameters together is clipped to this norm; None leaves it.
        target_divergence: of the policy by the end of a rollout's updates: where it was more than twice as much, the
            learning rate is divided by 1.5 before the next, where less than half, multiplied. None keeps it.
    """

    progress_bar_metrics = ("episode_return", "episode_length", "divergence", "std", "gravity")

    def __init__(
        self,
        observation_shape: Sequence[Count],
        action_dim: Size,
        *,
        actor: Callable[..., Actor],
        value: Callable[[int, int], nn.Module],
        encoder: Callable[..., Encoder] = FlatObservations,
        normaliser: Callable[[Sequence[int]], ObservationNormaliser] | None = None,
        reward_normaliser: RewardNormaliser | None = None,
        reward_scale: Positive = 1.0,
        discount: Share = 0.99,
        trace: Share = 0.95,
        clip: Annotated[float, Range(above=0, below=1)] = 0.2,
        value_clip: Positive | None = None,
        value_weight: NonNegative = 0.5,
        entropy_weight: NonNegative = 0.0,
        normalise_advantages: bool = True,
        learning_rate: LearningRate = 3e-4,
        eps: Positive = 1e-5,
        max_norm: Positive | None = 0.5,
        target_divergence: Positive | None = None,
        **loop: Any,
    ) -> None:
        super().__init__(**loop)
        self.encoder = encoder(observation_shape)
        self.actor = actor(self.encoder.features, action_dim)
        self.value = value(self.encoder.features, 1)
        self.normaliser = None if normaliser is None else normaliser(observation_shape)
        self.reward_normaliser = reward_normaliser
        self.reward_scale = reward_scale
        self.discount, self.trace = discount, trace
        self.clip, self.value_clip = clip, value_clip
        self.value_weight, self.entropy_weight = value_weight, entropy_weight
        self.normalise_advantages = normalise_advantages
        self.max_norm = max_norm
        self.target_divergence = target_divergence
        self.register_buffer("divergence", torch.zeros(()))  # of the last batch
        self.register_buffer("learning_rate_factor", torch.ones(()))
        self.kept = ("divergence", "learning_rate_factor")
        groups = [
            {"params": [*self.actor.parameters(), *self.value.parameters()]},
            *self.encoder.parameter_groups(learning_rate),
        ]
        self.optimizer = self.register_optimizer(FusedAdam(groups, learning_rate, eps=eps))

    # -- learning -----------------------------------------------------------------------------------------------------

    def advance(self, env_steps: int) -> None:
        super().advance(env_steps)
        self.actor.at(env_steps)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.encoder.begin(self.trainer.datamodule)

    def learning_rate_factors(self) -> list[float]:
        adapted = 1.0 if self.target_divergence is None else self.learning_rate_factor.item()
        return [factor * adapted for factor in super().learning_rate_factors()]

    @torch.no_grad()
    def prepare(self, rollout: TensorDict, carried: Tensor | None) -> tuple[TensorDict, Tensor | None]:
        """What a rollout is learned from, and what is to be carried over to the next; once before its updates.

        Args:
            rollout: [E, T] with observation, action, and next observation, reward, terminated, done.
            carried: of the reward normaliser, [E]; None at first, and without one.

        Returns:
            TensorDict [E T] with observation (normalised), action, log_prob, value, advantage and return.
        """
        self._adapt()
        seen, following = rollout["observation"], rollout["next"]
        observation = self._normalised(seen)
        reward, done, terminated = (following[name].squeeze(-1) for name in ("reward", "done", "terminated"))
        reward = reward * self.reward_scale
        if self.reward_normaliser is not None:
            reward, carried = self.reward_normaliser(reward, done, carried)
        with evaluating(self):
            features = self.encoder(observation.flatten(0, 1))
            log_prob = self.actor(features).log_prob(rollout["action"].flatten(0, 1))
            value = self._values(features).view(reward.shape)
            # A step leads to where the next begins, but for the last of an episode and of the rollout.
            next_value = torch.cat([value[:, 1:], value[:, -1:]], 1)
            last = done.clone()
            last[:, -1] = True
            next_value[last] = self._values(self.encoder(self._normalised(following["observation"][last])))
        advantage = generalised_advantages(reward, value, next_value, terminated, done, self.discount, self.trace)
        if self.normaliser is not None:  # from the next rollout on
            self.normaliser.merge(seen.flatten(0, 1))
        prepared = {
            "observation": observation,
            "action": rollout["action"],
            "log_prob": log_prob.view(reward.shape),
            "value": value,
            "advantage": advantage,
            "return": advantage + value,
        }
        return TensorDict(prepared, batch_size=reward.shape).flatten(), carried

    def _normalised(self, observation: Tensor) -> Tensor:
        return observation if self.normaliser is None else self.normaliser(observation)

    def _values(self, features: Tensor) -> Tensor:
        return self.value(features).squeeze(0).squeeze(-1)

    def _adapt(self) -> None:
        """Change the learning rate after the rollout before."""
        if self.target_divergence is None or not self.updates:
            return
        relative = self.divergence / self.target_divergence
        change = torch.where(relative > 2, 1 / _FACTOR, torch.where(relative < 0.5, _FACTOR, 1.0))
        self.learning_rate_factor.mul_(change).clamp_(*_LEARNING_RATE_RANGE)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """The updates of a rollout."""
        super().training_step(batch, batch_idx)
        average_([self.divergence])  # of batches that were each process's own, for a checkpoint has one state for all

    def update(self, batch: TensorDict) -> TensorDict:
        """One step of actor, value and encoder together on transitions [B] of what `prepare` gives."""
        features = self.encoder(batch["observation"])
        policy = self.actor(features)
        log_ratio = policy.log_prob(batch["action"]) - batch["log_prob"]
        advantage = batch["advantage"]
        if self.normalise_advantages:
            std, mean = torch.std_mean(gather_rows(advantage))
            advantage = (advantage - mean) / (std + 1e-7)
        policy_loss = clipped_policy_loss(log_ratio, advantage, self.clip)
        value_loss = clipped_value_loss(self._values(features), batch["value"], batch["return"], self.value_clip)
        entropy = policy.entropy().mean()
        self.minimise(
            policy_loss + self.value_weight * value_loss - self.entropy_weight * entropy, self.optimizer, self.max_norm
        )
        with torch.no_grad():
            moved = divergence(log_ratio)
            self.divergence.copy_(moved)
            metrics = {
                "policy_loss": policy_loss.detach(),
                "value_loss": value_loss.detach(),
                "entropy": entropy.detach(),
                "divergence": moved,
                "clip_fraction": ((log_ratio.exp() - 1).abs() > self.clip).float().mean(),
                "value_mean": batch["value"].mean(),
                "return_mean": batch["return"].mean(),
                "learning_rate_factor": self.learning_rate_factor.clone(),
            }
            if isinstance(getattr(policy, "std", None), Tensor):
                metrics["std"] = policy.std.mean()
        return TensorDict(metrics)

    # -- acting -------------------------------------------------------------------------------------------------------

    def policy(self, exploring: bool = False) -> TensorDictModule:
        """A policy that reads ``observation`` and writes ``action``, for collection or for evaluation."""
        encoder = self.encoder if self.normaliser is None else nn.Sequential(self.normaliser, self.encoder)
        network = ActorPolicy(encoder, self.actor, "explore" if exploring else "act")
        return TensorDictModule(network, ["observation"], ["action"])

    def evaluate(self, task: Any) -> TensorDict:
        """Roll out the policy without its noise."""
        return task.run(self.policy(), device=self.device)
