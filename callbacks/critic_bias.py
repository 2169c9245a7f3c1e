"""How far critics are from the truth.

Dimensions: R rows (episodes), S scored steps, L all steps.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import lightning as L
import torch
from tensordict import TensorDict
from torchrl.envs.utils import step_mdp

from components.checks import Count, Size, checked


@checked
class CriticBias(L.Callback):
    """Compares an actor-critic's Q(s, a) with returns that its policy really gets, at every evaluation.

    Rolls out the policy whose value the critics learn, and scores the first steps of every episode by their discounted
    returns G_k = r_k + discount (G_{k+1} - alpha log pi_{k+1}); the rollout goes on until what is cut off weighs less
    than a thousandth. Adds `critic_bias/mean` (of Q_mean - G), its spread `critic_bias/std`, `critic_bias/penalised`
    (the same for the value that targets are made of) and, unless all returns are zero, `critic_bias/normalised`, the
    mean over that of |G|.

    Any module will do that has `valued_policy()`, `values(observation, action)`, `alpha()` and `discount`.

    Args:
        environment: makes the environment, called with `num_envs`, `seed` and `episode_length`.
        rows: R.
        scored_steps: S.
    """

    metric_names = ("critic_bias/*",)
    seed = 54321
    negligible = 1e-3

    def __init__(self, environment: Callable[..., Any], rows: Size = 32, scored_steps: Count = 300) -> None:
        self._make_env = environment
        self.rows = rows
        self.scored_steps = scored_steps

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for name in ("valued_policy", "values", "alpha", "discount"):
            if not hasattr(module, name):
                raise ValueError(
                    f"callbacks.critic_bias: expected an actor-critic, found {type(module).__name__} without {name}."
                )
        if not 0 < module.discount < 1:
            raise ValueError(f"module.discount={module.discount}: expected a number between 0 and 1 for critic_bias.")

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._probe(module)

    def on_test_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._probe(module)

    @cached_property
    def _action_repeat(self) -> int:
        """Control steps of a decision: episode lengths are counted in the former."""
        return self._make_env(num_envs=1, seed=self.seed, episode_length=1).action_repeat

    @torch.no_grad()
    def _probe(self, module: Any) -> None:
        steps = self.scored_steps + math.ceil(math.log(self.negligible) / math.log(module.discount))
        # One step longer than is looked at: the end of the rollout is no end of an episode.
        length = (steps + 1) * self._action_repeat
        env = self._make_env(num_envs=self.rows, seed=self.seed, episode_length=length)
        policy, device = module.valued_policy(), module.device
        state = env.reset()
        alive = torch.ones(self.rows, 1, dtype=torch.bool)
        seen: list[TensorDict] = []
        values: list[torch.Tensor] = []  # of the scored steps: what critics say, and what targets would make of it
        with module.evaluation():
            for step in range(steps):
                acted = policy(TensorDict({"observation": state["observation"].to(device)}, [self.rows]))
                if step < self.scored_steps:
                    values.append(torch.stack(module.values(acted["observation"], acted["action"])).cpu())
                state["action"] = acted["action"].to("cpu")
                stepped = env.step(state)
                following = stepped["next"]
                seen.append(
                    acted.select("action_log_prob")
                    .to("cpu")
                    .update({"reward": following["reward"], "terminated": following["terminated"], "alive": alive})
                )
                alive = alive & ~following["terminated"]
                state = step_mdp(stepped)
        rollout = torch.stack(seen, 1)
        mean, penalised = torch.stack(values, -1)  # [R, S] each
        returns = soft_returns(
            rollout["reward"][..., 0],
            rollout["terminated"][..., 0],
            rollout["action_log_prob"],
            module.discount,
            float(module.alpha()),
        )[:, : self.scored_steps]
        mask = rollout["alive"][:, : self.scored_steps, 0]
        bias = (mean - returns)[mask]
        size = returns[mask].abs().mean().item()
        per_row = ((mean - returns) * mask).sum(1) * (self.rows / mask.sum())  # their mean is that over all states
        scores = {
            "critic_bias/mean": per_row.tolist(),
            "critic_bias/std": [bias.std().item()],
            "critic_bias/penalised": [(penalised - returns)[mask].mean().item()],
        }
        if size:
            scores["critic_bias/normalised"] = [bias.mean().item() / size]
        module.add_scores(scores)


def soft_returns(
    reward: torch.Tensor, terminated: torch.Tensor, log_prob: torch.Tensor, discount: float, alpha: float
) -> torch.Tensor:
    """G_k = r_k + discount (G_{k+1} - alpha log pi_{k+1}) up to a termination, zero beyond the last; all [R, L]."""
    returns = torch.zeros_like(reward)
    following = torch.zeros_like(reward[:, 0])
    for step in range(reward.shape[1] - 1, -1, -1):
        returns[:, step] = reward[:, step] + discount * following * ~terminated[:, step]
        following = returns[:, step] - alpha * log_prob[:, step]
    return returns
