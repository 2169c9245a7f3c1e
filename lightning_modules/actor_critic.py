"""Off-policy actor-critic learning from vectors or pictures, with a choice of pessimism.

Haarnoja et al. (SAC), arXiv 1812.05905; Fujimoto et al. (TD3), arXiv 1802.09477; Chen et al. (REDQ), arXiv 2101.05982;
Cetin and Celiktutan (GPL), arXiv 2110.03375; Yarats et al. (DrQ-v2), arXiv 2107.09645; Cetin et al. (A-LIX), arXiv
2207.00986. See docs/methods/actor_critic.md and docs/methods/pixels.md.

Dimensions: B batch, O observation (one or three dimensions), F features, A action, P ensemble members, M quantiles.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from components.checks import Count, CountOrZero, LearningRate, Momentum, NonNegative, Positive, Share, Size, checked
from components.control.actor_objectives import AdvantageSampled, Critic, Objective, ReparameterisedGradient
from components.control.actors import Actor, ActorPolicy, EntropyTemperature
from components.control.critics import BestOfPolicy, Critics, believed, critic_loss
from components.control.novelty import RandomNetworkDistillation
from components.control.pessimism import Pessimism, checked_value, mean_over
from components.control.state_value import StateValue
from components.networks.diagnostics import correlation, effective_rank, jacobian_norm
from components.networks.ema import polyak_update
from components.networks.encoders import Encoder, FlatObservations, evaluating
from components.networks.optimizers import FusedAdam
from lightning_modules.base import LearningMethod


@checked
class ActorCritic(LearningMethod):
    """An ensemble of critics, an actor that climbs them, and a rule for how much the critics are believed.

    Args:
        observation_shape, action_dim: sizes O and A.
        critic: makes the ensemble, called with in_features, out_features and members; [B, in] -> [P, B, M].
        actor: makes the actor, called with the sizes F and A.
        encoder: makes what turns observations into features, called with O; it is trained by the critics' loss, and by
            one of its own if it has one, and the targets' features come from it too. Without one, observations are the
            features.
        trunk: makes what critics (together) and actor (for itself) begin with, called with F; None for nothing.
        pessimism: how the ensemble becomes one value; if it has parameters, they are learned along with it.
        objective: the actor's loss, see `components.control.actor_objectives`.
        value: makes a state value that critics bootstrap from instead of the actor's actions, called with F; None for
            none.
        intrinsic_reward: makes rewards that are learned from in place of the environment's, called with O; None for
            none.
        temperature: makes the temperature of the entropy bonus, called with `action_dim`; None for no bonus.
        members: P.
        quantiles: M, of the return's distribution; 1 for its mean.
        discount: for one environment step.
        critic_learning_rate, encoder_learning_rate, actor_learning_rate, temperature_learning_rate,
            pessimism_learning_rate, value_learning_rate, intrinsic_learning_rate: Adam's.
        critic_loss_weight: of the critics' loss, which has half of the squared errors: 1 for SAC, 2 for DrQ-v2.
        temperature_momentum: Adam's first decay rate for the temperature; that of a learned pessimism is 0.5.
        target_rate: Polyak rate of the target networks.
        actor_every: updates of the critics for one of actor and temperature.
        pessimism_every: updates of the critics for one of a learned pessimism.
        targets_every: updates of the critics for one of the target networks.
        policy_evaluation_updates: where critics learn the value of given actions (SARSA), so many updates are of all
            but the actor (policy evaluation), and those after them of the actor alone, with critics and encoder frozen
            and in evaluation mode (policy improvement). 0 for both at once.
        target_actor: bootstrap from a Polyak average of the actor (TD3).
        evaluation_samples: actions drawn in each state of an evaluation, of which the one that the agent believes best
            is taken (arXiv 2403.13097); 1 is the actor's deterministic action. Several numbers are several evaluations.
        actor_schedule: ``constant``, or ``cosine`` for an actor's learning rate that falls along one to zero.
        critic_cloning: by how much targets are lowered for each unit of squared distance of the next action from the
            data's (arXiv 2305.09836), summed over the action; None for nothing.
        actor_max_norm: the actor's gradient is clipped to this global norm; None leaves it.
        value_limit: stop the run when the mean Q of training batches exceeds this in size: the critics diverge.
    """

    progress_bar_metrics = ("episode_return", "q_mean", "critic_loss", "nd_score", "mixing_strength")

    def __init__(
        self,
        observation_shape: Sequence[Count],
        action_dim: Size,
        *,
        critic: Callable[..., nn.Module],
        actor: Callable[..., Actor],
        pessimism: Pessimism,
        objective: Objective = ReparameterisedGradient(),  # noqa: B008 - it is never changed
        value: Callable[[int], StateValue] | None = None,
        intrinsic_reward: Callable[[Sequence[int]], RandomNetworkDistillation] | None = None,
        encoder: Callable[..., Encoder] = FlatObservations,
        trunk: Callable[[int], nn.Module] | None = None,
        temperature: Callable[..., EntropyTemperature] | None = None,
        members: Size = 2,
        quantiles: Size = 1,
        discount: Share = 0.99,
        critic_learning_rate: LearningRate = 3e-4,
        encoder_learning_rate: LearningRate = 3e-4,
        actor_learning_rate: LearningRate = 3e-4,
        temperature_learning_rate: LearningRate = 3e-4,
        temperature_momentum: Momentum = 0.9,
        pessimism_learning_rate: LearningRate = 1e-4,
        value_learning_rate: LearningRate = 3e-4,
        intrinsic_learning_rate: LearningRate = 3e-4,
        critic_loss_weight: NonNegative = 1.0,
        target_rate: Share = 0.005,
        actor_every: Count = 1,
        pessimism_every: Count = 1,
        targets_every: Count = 1,
        policy_evaluation_updates: CountOrZero = 0,
        target_actor: bool = False,
        evaluation_samples: Sequence[Size] = (1,),
        actor_schedule: str = "constant",
        critic_cloning: NonNegative | None = None,
        actor_max_norm: Positive | None = None,
        value_limit: Positive = 1e6,
        **loop: Any,
    ) -> None:
        super().__init__(**loop)
        if actor_schedule not in ("constant", "cosine"):
            raise ValueError(f"Unknown actor_schedule={actor_schedule!r}: expected one of constant, cosine.")
        if not evaluation_samples or len(set(evaluation_samples)) < len(evaluation_samples):
            raise ValueError(
                f"module.evaluation_samples={list(evaluation_samples)}: expected numbers of actions, each once, as in "
                "[1,50]."
            )
        if critic_cloning is not None and value is not None:
            raise ValueError(
                f"module.critic_cloning={critic_cloning}: expected null where critics bootstrap from module.value, "
                "which asks for no action."
            )
        self.encoder = encoder(observation_shape)
        self.critic = Critics(self.encoder.features, action_dim, quantiles, members, critic, trunk)
        self.actor = actor(self.encoder.features, action_dim, **({} if trunk is None else {"trunk": trunk}))
        self.pessimism = pessimism
        self.objective = objective
        self.prioritised = "beside" if isinstance(objective, AdvantageSampled) else None
        self.value = None if value is None else value(self.encoder.features)
        self.intrinsic_reward = None if intrinsic_reward is None else intrinsic_reward(observation_shape)
        self.temperature = None if temperature is None else temperature(action_dim)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False) if target_actor else None

        # Or it draws some of the critics, or compares what they say of the return's distribution.
        self._judges_all = quantiles == 1 and pessimism.actor_members(members, torch.device("cpu")) is None
        self.members = members
        self.discount = discount
        self.critic_loss_weight = critic_loss_weight
        self.target_rate = target_rate
        self.actor_every = actor_every
        self.pessimism_every = pessimism_every
        self.targets_every = targets_every
        self.policy_evaluation_updates = policy_evaluation_updates
        self.evaluation_samples = tuple(evaluation_samples)
        self.actor_schedule = actor_schedule
        self.critic_cloning = critic_cloning
        self.next_data_actions = critic_cloning is not None
        self.actor_max_norm = actor_max_norm
        self.value_limit = value_limit

        def adam(parameters: Any, learning_rate: float, momentum: float = 0.9, eps: float = 1e-8):
            return self.register_optimizer(FusedAdam(parameters, learning_rate, betas=(momentum, 0.999), eps=eps))

        # One optimiser for all that one loss trains: Adam treats each parameter by itself.
        groups = [{"params": list(self.critic.parameters())}, *self.encoder.parameter_groups(encoder_learning_rate)]
        self.critic_optimizer = adam(groups, critic_learning_rate)
        self.actor_optimizer = adam(self.actor.parameters(), actor_learning_rate)
        if self.temperature is not None:
            self.temperature_optimizer = adam(
                self.temperature.parameters(), temperature_learning_rate, temperature_momentum
            )
        self.value_optimizer = None if self.value is None else adam(self.value.parameters(), value_learning_rate)
        if self.intrinsic_reward is not None:
            predictor = self.intrinsic_reward.predictor.parameters()
            self.intrinsic_optimizer = adam(predictor, intrinsic_learning_rate)
        learned = [parameter for parameter in pessimism.parameters() if parameter.requires_grad]
        if learned and members == 1:
            raise ValueError("members=1: expected at least 2, or there is no disagreement to learn a penalty of.")
        self.pessimism_optimizer = adam(learned, pessimism_learning_rate, 0.5, eps=1e-7) if learned else None
        # The noise follows a schedule, and a pessimism that is not learned is a setting.
        settings = [f"pessimism.{name}" for name in (pessimism.kept if learned else ("",))]
        settings += [f"encoder.{name}" for name in self.encoder.kept]
        self.kept = ("actor.std", "target_actor.std", *settings)

    # -- learning -----------------------------------------------------------------------------------------------------

    def advance(self, env_steps: int) -> None:
        super().advance(env_steps)
        for actor in (self.actor, self.target_actor):
            if actor is not None:
                actor.at(env_steps)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.encoder.begin(self.trainer.datamodule)

    def learning_rate_factors(self) -> list[float]:
        factors = super().learning_rate_factors()
        if self.actor_schedule == "cosine":
            place = next(i for i, optimizer in enumerate(self._optimizers) if optimizer is self.actor_optimizer)
            factors[place] *= 0.5 * (1 + math.cos(math.pi * self.updates / self.total_updates))
        return factors

    def schedule(self) -> dict[str, bool]:
        """Actor, pessimism and targets are due with the last of every so many updates of the critics."""
        every = {
            "critic": 1,
            "actor": self.actor_every,
            "pessimism": self.pessimism_every,
            "targets": self.targets_every,
        }
        due = {name: (self.updates + 1) % updates == 0 for name, updates in every.items()}
        if 0 < self.policy_evaluation_updates <= self.updates:
            return {name: name == "actor" for name in due}
        return due if not self.policy_evaluation_updates else {**due, "actor": False}

    def update(
        self, batch: TensorDict, critic: bool = True, actor: bool = True, pessimism: bool = True, targets: bool = True
    ) -> TensorDict:
        """State value, critics, then pessimism, then actor and temperature, then targets, as published code has it.

        Args:
            batch: [B] with observation [B, O], action [B, A], and next observation, reward [B, 1], terminated [B, 1];
                for n-step returns `reward` is their sum and `steps_to_next_obs` [B, 1] says n. With a next action
                [B, A] the critics learn its value (SARSA) instead of the actor's; `data_action` [B, A] beside it is
                what `critic_cloning` asks for, NaN where the data have none. With `prioritised` [B] the actor
                learns from those.
            critic, actor, pessimism, targets: which parts are due, see `schedule`; pessimism only with the critics.
        """
        metrics: dict[str, Tensor] = {}
        advantage = None
        if critic:
            if self.intrinsic_reward is not None:
                batch, metrics = self._rewarded(batch)
            features = self.encoder(batch["observation"])
            if self.value is None:
                target = self.target(batch)
            else:
                target, advantage, value_metrics = self._learn_value(batch, features.detach())
                metrics |= value_metrics
            loss, errors, critic_metrics = self.critic_loss(features, batch["action"], target)
            metrics |= critic_metrics
            auxiliary = self.encoder.loss(batch["observation"], features)
            if auxiliary is not None:
                loss = loss + checked_value(self.encoder, "loss", auxiliary, loss.shape)
                metrics["encoder_loss"] = auxiliary.detach()
            self.minimise(loss, self.critic_optimizer)
            self.encoder.stepped()
            metrics |= self.encoder.scores()
            if pessimism and self.pessimism_optimizer is not None:
                self.minimise(self.pessimism.loss(errors), self.pessimism_optimizer)
                self.pessimism.stepped()
                metrics |= self.pessimism.scores()
        else:
            with torch.no_grad(), evaluating(self.encoder):
                features = self.encoder(batch["observation"])
        drawn = batch.get("prioritised", None)
        if actor:
            if drawn is None:
                loss, actor_metrics = self.actor_loss(features.detach(), batch["action"], advantage)
            else:
                with torch.no_grad():
                    features = self.encoder(drawn["observation"])
                loss, actor_metrics = self.actor_loss(features, drawn["action"])
            self.minimise(loss, self.actor_optimizer, self.actor_max_norm)
            metrics |= {"actor_loss": loss.detach(), **actor_metrics}
            if self.temperature is not None:
                self.minimise(self.temperature.loss(-actor_metrics["entropy"]), self.temperature_optimizer)
                metrics["temperature"] = self.temperature()
        if targets:
            self.update_targets()
        if drawn is not None:
            asked = ("index", "observation", "action")
            rows = torch.cat([drawn.select(*asked), batch.select(*asked)])
            metrics["priorities"], priority_metrics = self._prioritise(rows)
            metrics |= priority_metrics
        return TensorDict(metrics)

    @torch.no_grad()
    def target(self, batch: TensorDict) -> Tensor:
        """What the critics regress on, [B, M]: r + discount^n (1 - terminated) (value - alpha log pi)."""
        features = self.encoder(batch["next", "observation"])
        if self.value is not None:
            return self._bootstrapped(batch, self.value(features)[:, None])
        if ("next", "action") in batch.keys(True):
            if self.critic_cloning is not None:
                raise ValueError(
                    f"module.critic_cloning={self.critic_cloning}: expected null where data say the next action "
                    "(SARSA)."
                )
            next_action, bonus = batch["next", "action"], None
        else:
            next_action, log_prob = (self.target_actor or self.actor).bootstrap(features)
            bonus = None if self.temperature is None else -(self.temperature() * log_prob)[:, None]
            if self.critic_cloning is not None:
                penalty = -self.critic_cloning * self._distance(batch, next_action)
                bonus = penalty if bonus is None else bonus + penalty
        q = self.target_critic(features, next_action, self.pessimism.target_members(self.members, features.device))
        value = checked_value(self.pessimism, "target", self.pessimism.target(q), q.shape[1:])
        return self._bootstrapped(batch, value if bonus is None else value + bonus)

    def _distance(self, batch: TensorDict, next_action: Tensor) -> Tensor:
        """Squared, of next actions from the data's, [B, 1]; 0 where an episode ends and the data have none."""
        squares = (next_action - batch["next", "data_action"]).square().sum(-1, keepdim=True)
        return squares.nan_to_num(0.0)

    def _bootstrapped(self, batch: TensorDict, value: Tensor) -> Tensor:
        assert batch["next", "reward"].shape == (len(value), 1)  # or they would broadcast
        steps = batch.get("steps_to_next_obs", None)
        discount = self.discount if steps is None else self.discount**steps
        return batch["next", "reward"] + discount * (1.0 - batch["next", "terminated"].float()) * value

    def _rewarded(self, batch: TensorDict) -> tuple[TensorDict, dict[str, Tensor]]:
        """The transitions with rewards of the agent's own, which learns from them what is no longer new."""
        if "steps_to_next_obs" in batch.keys():  # noqa: SIM118 - a TensorDict
            raise ValueError("module.intrinsic_reward: expected datamodule.n_step=1, found rewards of several steps.")
        errors = self.intrinsic_reward.errors(batch["next", "observation"])
        reward = self.intrinsic_reward.rewards(errors)
        self.minimise(errors.mean(), self.intrinsic_optimizer)
        return batch.clone(False).set(("next", "reward"), reward), {"intrinsic_reward": reward.mean()}

    def _learn_value(self, batch: TensorDict, features: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A step of the state value; the critics' target, and the advantages [B] of the data's actions before it."""
        before = None if self.value.steps_first else self.target(batch)
        advantage = self.advantages(features, batch["action"])
        loss = self.value.loss(advantage)
        self.minimise(loss, self.value_optimizer)
        metrics = {"value_loss": loss.detach()}
        return self.target(batch) if before is None else before, advantage.detach(), metrics

    def advantages(self, features: Tensor, action: Tensor) -> Tensor:
        """How much better than the state value the target critics believe actions to be, [B], with V's gradient."""
        with torch.no_grad():
            q = self.target_critic(features, action, self.pessimism.target_members(self.members, features.device))
            q = mean_over(checked_value(self.pessimism, "target", self.pessimism.target(q), q.shape[1:]), -1)
        return q - self.value(features)

    def critic_loss(self, features: Tensor, action: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The critics' loss, their errors [P, B] and metrics."""
        q = self.critic(features, action)
        loss, errors = critic_loss(q, target)
        if self.critic_loss_weight != 1:
            loss = self.critic_loss_weight * loss
        return loss, errors, {"critic_loss": loss.detach(), "td_error": errors.mean(), "q_mean": q.detach().mean()}

    def actor_loss(
        self, features: Tensor, action: Tensor, advantage: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective's loss and metrics, beside the data's actions [B, A] and their advantages over a state value.

        Where the agent has a temperature, the metrics have the policy's entropy.
        """
        policy, weight = self.actor(features), None if self.temperature is None else self.temperature()
        loss, metrics = self.objective(policy, action, self._critic_at(features, advantage, weight))
        if weight is not None and "entropy" not in metrics:
            with torch.no_grad():
                metrics["entropy"] = -policy.sample_with_log_prob()[1].mean()
        return loss, metrics

    def _critic_at(self, features: Tensor, advantage: Tensor | None, entropy_weight: Tensor | None = None) -> Critic:
        """What objectives may ask about actions at these states [B, F]."""
        return Critic(
            lambda each: mean_over(self.critic(features, each), -1),
            lambda each: believed(self.critic, self.pessimism, self.members, features, each),
            advantage,
            entropy_weight,
            self._judge if self._judges_all else None,
        )

    def _judge(self, values: Tensor) -> Tensor:
        """What the agent believes where all critics say [P, ..., B]."""
        rows = values.shape[1:]
        value = self.pessimism.actor(values.flatten(1).unsqueeze(-1))
        return checked_value(self.pessimism, "actor", value, [rows.numel()]).unflatten(0, rows)

    @torch.no_grad()
    def _prioritise(self, batch: TensorDict) -> tuple[TensorDict, dict[str, Tensor]]:
        """How likely rows [B] are to be drawn from now on."""
        features, action = self.encoder(batch["observation"]), batch["action"]
        advantage = None if self.value is None else self.advantages(features, action)
        logit, metrics = self.objective.logits(self.actor(features), action, self._critic_at(features, advantage))
        return TensorDict({"index": batch["index"], "logit": logit}, batch_size=batch.batch_size), metrics

    def update_targets(self) -> None:
        polyak_update(self.target_critic.parameters(), self.critic.parameters(), self.target_rate)
        if self.target_actor is not None:
            polyak_update(self.target_actor.parameters(), self.actor.parameters(), self.target_rate)

    def alpha(self) -> Tensor | float:
        """By how much -log pi counts as reward."""
        return 0.0 if self.temperature is None else self.temperature()

    def training_metrics(self) -> dict[str, float]:
        metrics = super().training_metrics()
        if abs(metrics.get("q_mean", 0.0)) > self.value_limit:
            raise ValueError(
                f"train/q_mean became {metrics['q_mean']:.3g} by update {self.updates}: the critics diverge, expected "
                f"at most module.value_limit={self.value_limit:g}; no checkpoint was taken of it."
            )
        return metrics

    # -- acting -------------------------------------------------------------------------------------------------------

    def policy(self, exploring: bool = False, samples: int | None = None) -> TensorDictModule:
        """A policy that reads ``observation`` and writes ``action``.

        Args:
            exploring: for collection, or for evaluation.
            samples: actions that evaluation takes the best of; the first of `evaluation_samples` if None.
        """
        samples = self.evaluation_samples[0] if samples is None else samples
        if exploring or samples == 1:
            network = ActorPolicy(self.encoder, self.actor, "explore" if exploring else "act")
        else:
            network = BestOfPolicy(self.encoder, self.actor, self.critic, self.pessimism, self.members, samples)
        return TensorDictModule(network, ["observation"], ["action"])

    def valued_policy(self) -> TensorDictModule:
        """The policy whose value the critics learn: it writes ``action`` and ``action_log_prob``."""
        bootstrap = ActorPolicy(self.encoder, self.target_actor or self.actor, "bootstrap")
        return TensorDictModule(bootstrap, ["observation"], ["action", "action_log_prob"])

    @torch.no_grad()
    def values(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """What the critics say on average, and what the targets would make of it: both [B]."""
        with evaluating(self.encoder), evaluating(self.critic):
            q = self.critic(self.encoder(observation), action)
        chosen = self.pessimism.target_members(self.members, q.device)
        return q.mean((0, 2)), self.pessimism.target(q if chosen is None else q[chosen]).mean(-1)

    @torch.no_grad()
    def fit(self, batch: TensorDict) -> TensorDict:
        """How the critics' mean fits its own targets, and returns if there are any, in transitions [B]; scalars.

        Also how many dimensions the encoder's features have, and how steeply they change with observations.
        """
        features = self.encoder(batch["observation"])
        target = self.target(batch)
        loss, _ = critic_loss(q := self.critic(features, batch["action"]), target)
        value = q.mean((0, 2))
        scores = {
            "td_loss": 2 * loss / len(q),
            "q_std": value.std(),
            "target_correlation": correlation(value, target.mean(-1)),
            "feature_rank": effective_rank(features),
            "jacobian": jacobian_norm(self.encoder, batch["observation"]),
        }
        returns = batch.get("return", None)
        if returns is not None:
            scores["return_correlation"] = correlation(value, returns[:, 0])
        return TensorDict(scores)

    def feature_gradient(self, batch: TensorDict) -> Tensor:
        """The gradient of the critics' loss at the encoder's feature maps [C, H, W], its mean over transitions [B]."""
        with torch.enable_grad():
            features = self.encoder(batch["observation"])
            loss, _, _ = self.critic_loss(features, batch["action"], self.target(batch))
            (gradient,) = torch.autograd.grad(loss, features)
        return gradient.mean(0).view(self.encoder.feature_shape)

    def evaluate(self, task: Any) -> TensorDict:
        """Roll out the deterministic policy, or look at the critics' fit where the task is stored transitions."""
        learned = self.pessimism.scores() | self.encoder.scores()
        self.add_scores({name: [value.item()] for name, value in learned.items()})
        if hasattr(task, "transitions"):
            return self.fit(task.transitions.to(self.device))
        first, *others = self.evaluation_samples
        result = task.run(self.policy(samples=first), device=self.device)
        for samples in others:
            scores = task.metrics(task.run(self.policy(samples=samples), device=self.device))
            self.add_scores({f"{name}_of_{samples}": values for name, values in scores.items()})
        return result
