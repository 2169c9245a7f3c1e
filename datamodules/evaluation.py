"""Evaluation: one environment, one or many rewards, all episodes at once; or stored transitions.

Dimensions: T rewards, E episodes for each, L steps, n samples, B transitions, O observation, P physics state.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.utils import step_mdp

from components.buildable import buildable
from components.checks import Size, checked
from datamodules.environments.measured import MeasuredEnv
from datamodules.pixels import RenderingUnavailable

Policy = Callable[[TensorDictBase], TensorDictBase]


@buildable()
@checked
class EvaluationTask:
    """A protocol (a way to start episodes) under which an agent is scored on several rewards.

    A method reads `rewards` (names, in order) and `inference_samples`, builds one context for each reward (a task
    vector, say) and hands `run` a policy that acts on observation and context.

    Args:
        name: of the protocol, such as ``upright``.
        rewards: name -> a task of the environment or an expression over its measurements.
        make_env: called with a number of rows; every call must give the same starts, so that all evaluations of all
            methods meet the same episodes.
        episodes: E.
        samples: gives states [n, O] of the training data and rewards [n, T] received on arrival in them; None where
            agents learn with their task at hand.
    """

    def __init__(
        self,
        name: str,
        rewards: Mapping[str, str],
        make_env: Callable[[int], MeasuredEnv],
        episodes: Size,
        samples: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.name = name
        self.rewards = list(rewards)
        self.expressions = list(rewards.values())
        self.episodes = episodes
        self._make_env = make_env
        self._samples = samples

    def inference_samples(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """States [n, O] drawn from the data's next states and their rewards [n, T], on `device`."""
        if self._samples is None:
            raise ValueError("The method infers its task from stored transitions, and this datamodule has none.")
        observation, reward = self._samples()
        return observation.to(device), reward.to(device)

    @torch.no_grad()
    def run(
        self, policy: Policy, context: TensorDictBase | None = None, device: torch.device | str = "cpu"
    ) -> TensorDict:
        """Roll out E episodes of every reward, all of them at once.

        Args:
            policy: reads ``observation`` and the entries of `context`, writes ``action``; all on `device`.
            context: [T], what the policy is told of each reward; None for a policy that ignores the task.

        Returns:
            TensorDict [T] with ``return`` [T, E], ``reward`` [T, E, L], ``measurements`` [T, E, L, M] on arrival,
            ``start`` [T, E, P], and ``physics`` [T, L + 1, P], the states of the first episode of each reward.
        """
        tasks, episodes = len(self.rewards), self.episodes
        env = self._make_env(tasks * episodes)
        told = None if context is None else context.to(device).repeat_interleave(episodes, 0)
        state = env.reset()
        start = state["physics"].clone()
        measured: list[Tensor] = []
        alive: list[Tensor] = []
        physics = [state["physics"][::episodes].clone()]
        done = torch.zeros(tasks * episodes, dtype=torch.bool)
        while not done.all():
            seen = TensorDict({"observation": state["observation"].to(device)}, batch_size=state.batch_size)
            if told is not None:
                seen.update(told)
            state["action"] = policy(seen)["action"].to("cpu")
            state = step_mdp(stepped := env.step(state))
            # Where actions are held for several steps, every one of them is rewarded.
            arrival = stepped["next", "measurements"]
            measured.append(stepped["next"].get("passed", arrival[:, None]))
            alive.append(~done)  # rows that ended before the others keep stepping, but earn nothing
            physics.append(state["physics"][::episodes].clone())
            done = done | state["done"].squeeze(-1)
        # Rewards are functions of what was measured: one evaluation for all steps instead of one a step.
        measurements = torch.stack(measured, 1).unflatten(0, (tasks, episodes))
        reward = torch.stack(
            [
                env.rewards(rows.flatten(0, 2), [expression]).view(rows.shape[:3]).sum(-1)
                for rows, expression in zip(measurements, self.expressions)
            ]
        )
        reward = reward * torch.stack(alive, 1).unflatten(0, (tasks, episodes))
        return TensorDict(
            {
                "return": reward.sum(-1),
                "reward": reward,
                "measurements": measurements[..., -1, :],
                "start": start.unflatten(0, (tasks, episodes)),
                "physics": torch.stack(physics, 1),
            },
            batch_size=[tasks],
        )

    @property
    def metric_names(self) -> list[str]:
        """Of what `metrics` gives, in its order, before anything is run."""
        return [f"{self.name}/{name}/return" for name in self.rewards]

    def metrics(self, result: TensorDictBase) -> dict[str, list[float]]:
        """The episodes' returns, by ``PROTOCOL/REWARD/return``.

        Raises:
            ValueError: `result` is not what `run` gives.
        """
        if not isinstance(result, TensorDictBase) or "return" not in result.keys():  # noqa: SIM118
            raise ValueError(f"evaluate: expected what task.run(policy) gives, found {type(result).__name__}.")
        return dict(zip(self.metric_names, result["return"].tolist()))

    def camera(self, size: int) -> "Camera | None":
        """Takes pictures of physics states; None, with one line printed, where nothing can be rendered."""
        try:
            return Camera(self._make_env(1), size)
        except RenderingUnavailable as error:
            print(f"Films are skipped: {error}.", flush=True)
            return None


class TransitionsTask:
    """Stored transitions [B] that what a method has learned is compared with, where no policy is rolled out.

    Args:
        name: of the metrics, as in ``held_out/q_std``.
        transitions: what the method's `update` would be given.
    """

    rewards: tuple[str, ...] = ()  # nothing is rolled out, and there is nothing to film

    def __init__(self, name: str, transitions: TensorDict) -> None:
        self.name = name
        self.transitions = transitions

    def metrics(self, result: Mapping[str, Tensor] | TensorDictBase) -> dict[str, list[float]]:
        """One value of each of its scalars, by ``NAME/SCALAR``.

        Raises:
            ValueError: `result` is not scalars by their names.
        """
        if not isinstance(result, Mapping | TensorDictBase):
            raise ValueError(f"evaluate: expected scalars by their names, found {type(result).__name__}.")
        for key, value in result.items():
            if torch.as_tensor(value).numel() != 1:
                raise ValueError(f"evaluate: expected scalars by their names, found {key} {list(value.shape)}.")
        return {f"{self.name}/{key}": [float(value)] for key, value in result.items()}


class Camera:
    """Pictures [size, size, 3] of physics states [P], and the control steps of a simulated second."""

    def __init__(self, env: MeasuredEnv, size: int) -> None:
        self._env, self._size = env, size
        self.steps_per_second = 1.0 / env.step_seconds
        env.reset()
        env.render(0, size, size)  # fails now if it ever will

    def __call__(self, physics: Tensor) -> np.ndarray:
        self._env.set_physics(physics[None])
        return self._env.render(0, self._size, self._size)
