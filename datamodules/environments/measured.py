"""Environments whose rewards are expressions over named physical quantities.

Dimensions: n environments, m states, M flat measurements, p physics numbers, A action, T tasks.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from components.checks import Seed, Size, checked
from components.control.rewards import RewardExpression
from components.wording import counted


@checked
class MeasuredEnv(EnvBase):
    """A batch of environments that report their physics state and named measurements of it at every step.

    Besides `observation`, every state has `physics` [n, p] float64, from which it can be restored, and `measurements`
    [n, M] float32, the quantities that rewards are written in. Any reward can thus be computed after the fact, for
    stored states too.

    Subclasses call `declare_measurements` and `declare_specs` once, set `step_seconds`, the simulated time of a step,
    and draw all that is random in the starts of episodes from `_generator`.

    An environment gives its state away (`get_extra_state`) and takes it back (`set_extra_state`), in the middle of
    episodes too. The first `reset` of all rows after that changes nothing and returns where the environment is, so that
    a collector built over a restored environment, which begins with a reset, goes on with its episodes. Where a state
    can't be had, a new episode begins: `began_anew` [n] says in which rows.
    """

    step_seconds: float
    action_repeat = 1  # control steps in a step
    frame_stack: int | None = None  # pictures of an observation, oldest first; an episode begins with copies of one

    def __init__(self, num_envs: Size, seed: Seed) -> None:
        super().__init__(device="cpu", batch_size=[num_envs])
        self._generator = torch.Generator().manual_seed(seed)
        self._restored = False
        self.began_anew = torch.zeros(num_envs, dtype=torch.bool)

    def declare_specs(
        self,
        observation_shape: Sequence[int],
        physics_size: int,
        action_size: int,
        observation_type: torch.dtype = torch.float32,
    ) -> None:
        """Say what is observed and done; after `declare_measurements`.

        Raises:
            ValueError: there is nothing to observe, or nothing to do.
        """
        for name, shape in (("observations", observation_shape), ("actions", [action_size])):
            if 0 in shape:
                raise ValueError(f"datamodule.environment: expected {name} with numbers in them, found {list(shape)}.")
        n = self.batch_size[0]
        self.observation_spec = Composite(
            observation=Unbounded((n, *observation_shape), dtype=observation_type),
            physics=Unbounded((n, physics_size), dtype=torch.float64),
            measurements=Unbounded((n, self.measurement_size), dtype=torch.float32),
            shape=(n,),
        )
        self.action_spec = Bounded(-1.0, 1.0, (n, action_size), dtype=torch.float32)
        self.reward_spec = Unbounded((n, 1), dtype=torch.float32)
        flag = Categorical(2, shape=(n, 1), dtype=torch.bool)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(n,))

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)

    def _finite(self, action: Tensor) -> np.ndarray:
        """Actions [n, A] as they are; MuJoCo would make nothing of those that are no numbers, and go on.

        Raises:
            ValueError: one is not finite.
        """
        values = action.numpy(force=True)
        if not np.isfinite(values).all():
            raise ValueError(f"an action for {self.domain_name} is not finite")
        return values

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None and self._restored:
            self._restored = False
            return self.current()
        rows = np.arange(self.batch_size[0]) if mask is None else mask.reshape(-1).nonzero()[:, 0].numpy()
        if len(rows):
            self.begin(rows)
        return self.current()

    @abstractmethod
    def begin(self, rows: np.ndarray) -> None:
        """Start a new episode in each of the rows."""

    @abstractmethod
    def current(self) -> TensorDict:
        """Where every environment is now: what a policy needs to act next, as `reset` or the last step gave it."""

    def _here(
        self,
        observation: Tensor,
        physics: Tensor,
        measurements: Tensor,
        truncated: Tensor,
        terminated: Tensor | None = None,
    ) -> TensorDict:
        """What `current` gives, of what has the batch as its first dimension; without `terminated` nothing is."""
        terminated = torch.zeros_like(truncated) if terminated is None else terminated
        return TensorDict(
            {
                "observation": observation,
                "physics": physics,
                "measurements": measurements,
                "done": terminated | truncated,
                "terminated": terminated,
                "truncated": truncated,
            },
            batch_size=self.batch_size,
        )

    @abstractmethod
    def _state_tensors(self) -> dict[str, Tensor]:
        """Copies of all that a step or a reset depends on, besides the generator."""

    @abstractmethod
    def _set_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take back copies of what `_state_tensors` gave, which it has been checked to be; mark where that failed."""

    def get_extra_state(self) -> dict[str, Tensor]:
        """Everything `state_dict()` needs for an exact continuation; loads with `weights_only=True`."""
        return {**self._state_tensors(), "generator": self._generator.get_state()}

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `get_extra_state` gave.

        Raises:
            ValueError: it is of another environment or of another number of them.
        """
        for name, own in self.get_extra_state().items():
            if name not in state:
                raise ValueError(f"the environment state has no {name!r}, so it is of another environment")
            if state[name].shape != own.shape:
                found, expected = tuple(state[name].shape), tuple(own.shape)
                raise ValueError(
                    f"the environment state {name!r} has shape {found}, but {expected} was expected for"
                    f" {self.batch_size[0]} environments of {self.domain_name}"
                )
            if state[name].dtype != own.dtype:
                found = state[name].dtype
                raise ValueError(f"the environment state {name!r} is of {found}, but {own.dtype} was expected")
        self.began_anew = torch.zeros_like(self.began_anew)
        try:
            torch.Generator().set_state(state["generator"].cpu())
        except RuntimeError as error:
            raise ValueError("the environment state 'generator' is none of a generator") from error
        self._set_state_tensors({name: value.cpu() for name, value in state.items()})
        self._generator.set_state(state["generator"].cpu())
        if self.began_anew.any():
            episodes = (
                f"{int(self.began_anew.sum())} of {counted(len(self.began_anew), 'episode')} of {self.domain_name}"
            )
            print(
                f"{episodes} can't go on where they were and begin anew: from here on, this run is not the one that it "
                "would have been.",
                flush=True,
            )
            self.begin(self.began_anew.numpy().nonzero()[0])
        self._restored = True

    def declare_measurements(self, widths: Mapping[str, int], tasks: Mapping[str, str], domain: str) -> None:
        """Name the measurements, in their flat order.

        Args:
            widths: name -> number of components, 0 for a scalar.
            tasks: name -> reward expression, the tasks that have names.
            domain: for error messages.
        """
        self.measurement_widths = dict(widths)
        self.measurement_size = sum(max(1, width) for width in widths.values())
        self._tasks, self.domain_name = dict(tasks), domain
        self._expressions: dict[str, RewardExpression] = {}

    @property
    def columns(self) -> dict[str, slice]:
        """Where each measurement lies in the flat ones."""
        widths = [max(1, width) for width in self.measurement_widths.values()]
        ends = list(accumulate(widths))
        return {name: slice(end - width, end) for name, width, end in zip(self.measurement_widths, widths, ends)}

    def named(self, measurements: Tensor) -> dict[str, Tensor]:
        """Views of flat measurements [m, M] by name: [m] for scalars, [m, k] for vectors."""
        parts = measurements.split([max(1, width) for width in self.measurement_widths.values()], dim=-1)
        return {
            name: part if width else part.squeeze(-1)
            for (name, width), part in zip(self.measurement_widths.items(), parts)
        }

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Raise the ValueError that `rewards` would raise for these tasks, whatever the measurements."""
        for task in tasks:
            self._expression(task)

    def gauges(self) -> dict[str, float]:
        """What there is to watch of it in training, by name: where a curriculum is."""
        return {}

    def rewards(self, measurements: Tensor, tasks: Sequence[str]) -> Tensor:
        """Rewards [m, T] of T tasks (names or expressions) for flat measurements [m, M].

        Raises:
            ValueError: a task is unknown, or an expression does not make sense.
        """
        named = self.named(measurements)
        return torch.stack([self._expression(task)(named) for task in tasks], dim=1)

    def _expression(self, task: str) -> RewardExpression:
        if task not in self._expressions:
            if task not in self._tasks and task.isidentifier() and task not in self.measurement_widths:
                raise ValueError(
                    f"Unknown task {task!r} of {self.domain_name}: expected one of {', '.join(self._tasks)}, or an "
                    f"expression over {', '.join(self.measurement_widths)}."
                )
            self._expressions[task] = RewardExpression(self._tasks.get(task, task), self.measurement_widths)
        return self._expressions[task]

    @abstractmethod
    def relabel(self, physics: Tensor, action: Tensor) -> Tensor:
        """Measurements [m, M] of arriving in states [m, p] by actions [m, A], as the environment itself gave them."""

    def measure(self, transitions: TensorDictBase) -> Tensor:
        """Measurements [m, M] of stored transitions [m].

        Raises:
            ValueError: the transitions have no physics to measure.
        """
        if ("next", "physics") not in transitions.keys(True):
            raise ValueError(
                f"The data set of {self.domain_name} has no physics: expected the simulator's states, from which "
                "rewards are computed."
            )
        return self.relabel(transitions["next", "physics"], transitions["action"])

    @abstractmethod
    def set_physics(self, physics: Tensor | np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Begin an episode in each of `rows` (all if None) from states [len(rows), p]."""

    @abstractmethod
    def render(self, row: int, width: int, height: int) -> np.ndarray:
        """A picture [height, width, 3], uint8, of one environment.

        Raises:
            RenderingUnavailable: no graphics library works on this machine.
        """
