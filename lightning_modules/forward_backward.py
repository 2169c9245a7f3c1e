"""Forward-backward behaviour foundation models: FB, FB-AW, FB-AR and FB-AWARE.

Touati and Ollivier, arXiv 2103.07945; Touati, Rapin and Ollivier, arXiv 2209.14935; Cetin, Touati and Ollivier,
arXiv 2412.04368. See docs/methods/forward_backward.md.

Dimensions: N batch, P ensemble members, d features, G distinct task vectors in a batch, T tasks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from components.checks import (
    Count,
    CountOrZero,
    LearningRate,
    Momentum,
    NonNegative,
    Number,
    Positive,
    Share,
    Size,
    checked,
    vector_size,
)
from components.control.actor_objectives import AdvantageSampled, Critic, Objective
from components.control.forward_backward import (
    BackwardMap,
    ForwardMap,
    MixedLatentSampler,
    ZConditionedActor,
    ZConditionedPolicy,
    fb_loss,
    implicit_reward,
    orthonormality_loss,
    standardise,
)
from components.control.pessimism import pessimistic_mean
from components.control.policies import ClippedGaussianPolicy
from components.distributed import gather_rows, rank
from components.networks.ema import polyak_update
from components.networks.optimizers import FusedAdam
from lightning_modules.base import LearningMethod

ORTHONORMALITY_SCALE = {"half": 1.0, "full": 2.0}


@checked
class ForwardBackward(LearningMethod):
    """One agent for every reward of an environment, from reward-free transitions.

    FB, FB-AW, FB-AR and FB-AWARE are its four corners: `objective` is the deterministic policy gradient or
    advantage-weighted regression, and `backward_map` has one block or several.

    Args:
        observation_shape, action_dim: sizes [O] and A.
        features: d, the size of z.
        forward_map, backward_map, actor: network factories, called with the sizes.
        objective: the loss of the policy, see `components.control.actor_objectives`.
        discount: of the successor measure.
        learning_rate, backward_learning_rate, actor_learning_rate: Adam's.
        target_rate: Polyak rate of the targets of F and B.
        orthonormality: weight of the orthonormality loss.
        orthonormality_convention: ``half`` (1/2 of the squared off-diagonal) or ``full``, which is twice that.
        measure_pessimism: pairwise-disagreement penalty of the target measure.
        goal_probability: share of training task vectors that encode goals of the batch.
        hindsight_probability: share of those that encode what followed a row in the data; the rest are uniform.
        hindsight_states: states that are drawn from what followed, which the task vector is the mean of.
        hindsight_discount: of how much later they are: k steps with probability (1 - discount) discount^k,
        hindsight_delay: from a moment on that is up to so many steps later, see `LearningMethod.futures`.
        goal_key: ``next_observation`` or ``observation``, where goals are taken from.
        groups: distinct task vectors in a batch for several blocks; one block always has one for each row.
        within_groups: compare rows with the next states of their own group only.
        fresh_actor_z: give every row a task vector of its own in the actor's loss.
        value_weight: weight of the auxiliary loss on F^T z; 0 leaves it out.
        policy_std, policy_noise_clip: noise of the policy, and its bound in targets.
        policy_tail: of its density, in standard deviations, see `ClippedGaussianPolicy`; None for the normal one.
        normalise_observations: standardise observations by running statistics of the data.
        normalise_z: ``global`` or ``block``, see `BackwardMap.infer`.
        inference_sharpness: beta, by which task vectors are inferred from the states with the best rewards above all,
            see `infer`.
        evaluation_samples: actions drawn in evaluation, of which the best is taken; 1 is the mean action.
        evaluation_pessimism: of the value by which they are compared.
    """

    progress_bar_metrics = ("fb_loss", "measure_mean", "actor_value")

    def __init__(
        self,
        observation_shape: Sequence[Count],
        action_dim: Size,
        *,
        forward_map: Callable[..., ForwardMap],
        backward_map: Callable[..., BackwardMap],
        actor: Callable[..., ZConditionedActor],
        objective: Objective,
        features: Size = 64,
        discount: Share = 0.98,
        learning_rate: LearningRate = 1e-4,
        backward_learning_rate: LearningRate = 1e-4,
        actor_learning_rate: LearningRate = 1e-4,
        target_rate: Share = 0.01,
        orthonormality: NonNegative = 1.0,
        orthonormality_convention: str = "half",
        measure_pessimism: Number = 0.0,
        goal_probability: Share = 0.5,
        hindsight_probability: Share = 0.0,
        hindsight_states: Size = 8,
        hindsight_discount: Momentum = 0.98,
        hindsight_delay: CountOrZero = 0,
        goal_key: str = "next_observation",
        groups: Size = 32,
        within_groups: bool = False,
        fresh_actor_z: bool = False,
        value_weight: NonNegative = 0.0,
        policy_std: Positive = 0.2,
        policy_noise_clip: NonNegative = 0.3,
        policy_tail: Positive | None = None,
        normalise_observations: bool = False,
        normalise_z: str = "global",
        inference_sharpness: NonNegative = 0.0,
        evaluation_samples: Size = 1,
        evaluation_pessimism: Number = 0.5,
        **loop: Any,
    ) -> None:
        super().__init__(**loop)
        observation_dim = vector_size(observation_shape)
        for name, value, known in (
            ("orthonormality_convention", orthonormality_convention, tuple(ORTHONORMALITY_SCALE)),
            ("goal_key", goal_key, ("next_observation", "observation")),
            ("normalise_z", normalise_z, ("global", "block")),
        ):
            if value not in known:
                raise ValueError(f"Unknown {name}={value!r}: expected one of {', '.join(known)}.")

        def networks() -> tuple[ForwardMap, BackwardMap]:
            return (
                forward_map(observation_dim=observation_dim, action_dim=action_dim, features=features),
                backward_map(observation_dim=observation_dim, features=features),
            )

        self.forward_map, self.backward_map = networks()
        self.target_forward_map, self.target_backward_map = networks()
        self.target_forward_map.load_state_dict(self.forward_map.state_dict())
        self.target_backward_map.load_state_dict(self.backward_map.state_dict())
        for target in (self.target_forward_map, self.target_backward_map):
            target.requires_grad_(False)
        self.actor = actor(observation_dim=observation_dim, action_dim=action_dim, features=features)
        if isinstance(objective, AdvantageSampled):
            raise ValueError(
                "module.objective: expected one that needs no priorities, for each of many tasks would have others, "
                "found AdvantageSampled."
            )
        self.objective = objective
        self.latent_sampler = MixedLatentSampler(goal_probability, hindsight_probability)
        if hindsight_probability:
            self.futures = (hindsight_states, hindsight_discount, hindsight_delay)
        self.normaliser = (
            nn.BatchNorm1d(observation_dim, affine=False, momentum=0.01) if normalise_observations else None
        )

        self.discount = discount
        self.target_rate = target_rate
        self.orthonormality = orthonormality * ORTHONORMALITY_SCALE[orthonormality_convention]
        self.measure_pessimism = measure_pessimism
        self.goal_key = goal_key
        self.groups = groups if len(self.backward_map.blocks) > 1 else None
        self.within_groups = within_groups
        self.fresh_actor_z = fresh_actor_z
        self.value_weight = value_weight
        self.policy_std = policy_std
        self.policy_noise_clip = policy_noise_clip
        self.policy_tail = policy_tail
        self.normalise_z = normalise_z
        self.inference_sharpness = inference_sharpness
        self.evaluation_samples = evaluation_samples
        self.evaluation_pessimism = evaluation_pessimism

        self.representation_optimizer = self.register_optimizer(
            FusedAdam(
                [
                    {"params": list(self.forward_map.parameters()), "lr": learning_rate},
                    {"params": list(self.backward_map.parameters()), "lr": backward_learning_rate},
                ]
            )
        )
        self.actor_optimizer = self.register_optimizer(FusedAdam(self.actor.parameters(), lr=actor_learning_rate))

    # -- learning -----------------------------------------------------------------------------------------------------

    def update(self, batch: TensorDict) -> TensorDict:
        """One step on F and B, one on the actor with the new F, one of the targets (arXiv 2412.04368; spec order).

        Args:
            batch: [N] with observation [N, O], action [N, A], next observation and next terminated; and where
                something is learned in hindsight the `future` of next observations, [N, K, O].
        """
        if self.normaliser is not None:
            self._update_normaliser(batch["observation"], batch["next", "observation"])
        observation, action, _, _, future = rows = self._rows(batch)
        loss, metrics, z, goals = self._fitted(*rows)
        self.minimise(loss, self.representation_optimizer)

        if self.fresh_actor_z:
            z = self.latent_sampler(self.backward_map, goals, goals.shape[0], future)
        loss, actor_metrics = self.actor_loss(observation, action, z)
        self.minimise(loss, self.actor_optimizer)

        self.update_targets()
        return TensorDict({**metrics, **actor_metrics, "actor_loss": loss.detach()})

    def _rows(self, batch: TensorDict) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Observation, action, next observation and terminated [N, ...] of a batch, and the future, all normalised."""
        future = batch.get(("next", "future"), None)
        return (
            self.normalise(batch["observation"]),
            batch["action"],
            self.normalise(batch["next", "observation"]),
            batch["next", "terminated"],
            None if future is None else self.normalise(future.flatten(0, 1)).view_as(future),
        )

    def _fitted(
        self,
        observation: Tensor,
        action: Tensor,
        next_observation: Tensor,
        terminated: Tensor,
        future: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """The loss of F and B on normalised rows [N, ...], its metrics, and the task vectors [N, d] and goals drawn."""
        discount = self.discount * (1.0 - terminated.float())
        goals = next_observation if self.goal_key == "next_observation" else observation
        z = self.sample_z(goals, future)
        with torch.no_grad():
            next_action = self.policy_at(next_observation, z).sample(clip=self.policy_noise_clip)
        return *self.representation_loss(observation, action, next_observation, discount, z, next_action), z, goals

    def sample_z(self, goals: Tensor, future: Tensor | None = None) -> Tensor:
        """A task vector for each row, [N, d]: all distinct for one block, else `groups` of them, each for N/G rows."""
        rows = goals.shape[0]
        if self.groups is None:
            return self.latent_sampler(self.backward_map, goals, rows, future)
        if rows % self.groups:
            raise ValueError(
                f"module.groups={self.groups}: expected a divisor of the {rows} transitions that a process has of "
                "datamodule.batch_size."
            )
        future = None if future is None else future[:: rows // self.groups]  # what followed the first of each group
        z = self.latent_sampler(self.backward_map, goals, self.groups, future)
        return z.repeat_interleave(rows // self.groups, 0)

    def representation_loss(
        self,
        observation: Tensor,
        action: Tensor,
        next_observation: Tensor,
        discount: Tensor,
        z: Tensor,
        next_action: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of F and B for rows [N, ...] with task vectors z [N, d] (grouped as `sample_z` gives them)."""
        rows = observation.shape[0]
        group_z = z if self.groups is None else z[:: rows // self.groups]
        if self.within_groups and self.groups is not None:
            columns, offset = next_observation.unflatten(0, (self.groups, -1)), 0
        else:
            # The loss compares every row with every next state, those of the other processes included.
            columns, offset = gather_rows(next_observation), rank() * rows
        within = columns.dim() == 3

        with torch.no_grad():
            target_forward = self.target_forward_map(next_observation, z, next_action)
            target_backward = self.target_backward_map(columns, group_z)
        forward = self.forward_map(observation, z, action)
        backward = self.backward_map(columns, group_z)
        parts = fb_loss(
            forward, backward, target_forward, target_backward, discount, self.measure_pessimism, offset, within
        )
        orthonormality = orthonormality_loss(backward)
        loss = parts.off_diagonal + parts.diagonal + self.orthonormality * orthonormality
        metrics = {
            "fb_loss": (parts.off_diagonal + parts.diagonal).detach(),
            "fb_off_diagonal": parts.off_diagonal.detach(),
            "fb_diagonal": parts.diagonal.detach(),
            "orthonormality_loss": orthonormality.detach(),
            "measure_mean": parts.measure_mean,
        }
        if self.value_weight:
            value_loss = self._value_loss(forward, backward.detach(), target_forward, discount, z, offset, within)
            loss = loss + self.value_weight * value_loss
            metrics["value_loss"] = value_loss.detach()
        return loss, metrics

    def _value_loss(
        self,
        forward: Tensor,
        backward: Tensor,
        target_forward: Tensor,
        discount: Tensor,
        z: Tensor,
        offset: int,
        within: bool,
    ) -> Tensor:
        """P/2 mean (F_p^T z - y)^2, y the Bellman target of the reward that z stands for."""
        rows = z.shape[0]
        index = torch.arange(rows, device=z.device)
        group = index // (rows // backward.shape[0])
        own = backward[group, index % backward.shape[1] if within else index + offset]
        with torch.no_grad():
            next_value = pessimistic_mean((target_forward * z).sum(-1), self.measure_pessimism)
            target = implicit_reward(backward, own, z) + discount.squeeze(-1) * next_value
        return 0.5 * ((forward * z).sum(-1) - target).square().mean(-1).sum()

    def actor_loss(self, observation: Tensor, action: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The actor's loss at rows [N, ...] with task vectors z [N, d]."""

        return self.objective(self.policy_at(observation, z), action, self.critic_at(observation, z))

    def update_targets(self) -> None:
        polyak_update(self.target_forward_map.parameters(), self.forward_map.parameters(), self.target_rate)
        polyak_update(self.target_backward_map.parameters(), self.backward_map.parameters(), self.target_rate)

    def policy_at(self, observation: Tensor, z: Tensor) -> ClippedGaussianPolicy:
        """The policy pi(. | s, z) at normalised observations [N, O]."""
        return ClippedGaussianPolicy(self.actor(observation, z).float(), self.policy_std, tail=self.policy_tail)

    def critic_at(self, observation: Tensor, z: Tensor) -> Critic:
        """What F says of actions at normalised observations [N, O]; believed as the measure is in its targets."""

        def values(action: Tensor) -> Tensor:
            return (self.forward_map(observation, z, action) * z).sum(-1)

        return Critic(values, lambda action: pessimistic_mean(values(action), self.measure_pessimism))

    def normalise(self, observation: Tensor) -> Tensor:
        """Standardise observations if asked for."""
        return standardise(observation, self.normaliser)

    @torch.no_grad()
    def _update_normaliser(self, *observations: Tensor) -> None:
        norm = self.normaliser
        assert norm is not None
        for observation in observations:
            nn.functional.batch_norm(
                gather_rows(observation), norm.running_mean, norm.running_var, training=True, momentum=norm.momentum
            )

    # -- acting -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def infer(self, next_observation: Tensor, reward: Tensor) -> Tensor:
        """The task vectors [T, d] of rewards [n, T] received on arrival in states [n, O] of the training data.

        With a sharpness beta above 0, rewards r count as u exp(beta (u - 1)), u = (r - min r) / (max r - min r) over
        the states: a reward that is not 0 in states of other behaviours, as most are, has a task vector that is a
        mixture of theirs (the weights of arXiv 2504.11054, whose rewards are in [0, 1] and whose beta is 10).
        """
        if self.inference_sharpness:
            low, high = reward.aminmax(dim=0)
            share = (reward - low) / (high - low).clamp(min=torch.finfo(reward.dtype).tiny)
            reward = share * (self.inference_sharpness * (share - 1)).exp()
        return self.backward_map.infer(self.normalise(next_observation), reward, self.normalise_z)

    @torch.no_grad()
    def goal_z(self, goal: Tensor) -> Tensor:
        """The task vectors [N, d] of reaching the goals [N, O]."""
        return self.backward_map.encode(self.normalise(goal))

    def policy(self, exploring: bool = False) -> TensorDictModule:
        """A policy that reads ``observation`` and ``z`` and writes ``action``."""
        network = ZConditionedPolicy(
            self.actor,
            self.normaliser,
            self.forward_map,
            self.policy_std,
            self.evaluation_samples,
            self.evaluation_pessimism,
            exploring,
        )
        return TensorDictModule(network, ["observation", "z"], ["action"])

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, batch: TensorDict) -> TensorDict:
        """The losses of F and B on transitions [N]; scalars."""
        return TensorDict(self._fitted(*self._rows(batch))[1])

    def evaluate(self, task: Any) -> TensorDict:
        """Infer z for each reward of an evaluation task from its samples, and roll the policies out.

        Where the task is stored transitions, look at how F and B fit them.
        """
        if hasattr(task, "transitions"):
            return self.fit(task.transitions.to(self.device))
        next_observation, reward = task.inference_samples(self.device)
        z = self.infer(next_observation, reward)
        return task.run(self.policy(), TensorDict({"z": z}, batch_size=[z.shape[0]]), self.device)
