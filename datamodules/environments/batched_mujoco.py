"""Many environments of one MuJoCo domain as a single batched TorchRL environment.

Dimensions: n environments, O observation, A action, M measurement and p = nq + nv + na physics numbers.
"""

import atexit
import weakref
from collections.abc import Iterable, Mapping, Sequence

import mujoco
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from datamodules.environments.domains import DOMAINS, MAX_PICTURE, Snapshot, Start
from datamodules.environments.measured import MeasuredEnv, RenderingUnavailable
from datamodules.environments.simulation import BatchSimulation
from datamodules.environments.tasks import TASKS


class BatchedMujocoEnv(MeasuredEnv):
    """n environments of one domain, stepped together on all cores.

    Keys: `action` [n, A] float32 in [-1, 1]; `observation` [n, O] float32, the suite's observation, flat, in its order;
    `physics` [n, p] float64, positions, velocities and activations; `measurements` [n, M] float32, the quantities that
    rewards are written in; `reward`, `terminated`, `truncated`, `done` [n, 1]. Episodes end by time only, so they are
    truncated and never terminated. A row whose simulation breaks down keeps its last sound state and is truncated.

    A step depends on `physics` and `action` alone, to the bit, whatever the row, the batch or the number of threads.

    Args:
        domain: a key of `domains.DOMAINS`.
        task: what `reward` is: a task of the domain (`tasks.TASKS`; its first if None) or any reward expression over
            its measurements.
        num_envs: n.
        start: where episodes begin: a function (simulation, rows, generator) -> physics states [rows, p]; None for the
            suite's own distribution.
        episode_length: control steps per episode; the suite's (1,000) if None.
        num_threads: simulation threads; all available cores if None.
        seed: of the generator that every episode start is drawn from.
    """

    def __init__(
        self,
        domain: str,
        task: str | None = None,
        num_envs: int = 1,
        *,
        start: Start | None = None,
        episode_length: int | None = None,
        num_threads: int | None = None,
        seed: int = 0,
    ) -> None:
        if domain not in DOMAINS:
            raise ValueError(f"Unknown domain {domain!r}: expected one of {', '.join(DOMAINS)}.")
        super().__init__(device="cpu", batch_size=[num_envs])
        self.domain = DOMAINS[domain]
        self.episode_length = episode_length or self.domain.episode_length
        self.simulation = BatchSimulation(self.domain, num_threads)
        self._generator = torch.Generator()
        self._start = start or self.domain.start
        self.step_seconds = self.simulation.model.opt.timestep * self.domain.substeps
        self._renderer: mujoco.Renderer | None = None

        model = self.simulation.model
        example = self._snapshot(np.zeros((1, self.physics_size)), np.zeros((1, model.nu)), observed=True)
        widths = {name: value.shape[1] if value.ndim == 2 else 0 for name, value in self._measure(example).items()}
        self.declare_measurements(widths, TASKS[domain], domain)
        self.task = task or next(iter(TASKS[domain]))
        self._expression(self.task)  # a typing error shows before anything is simulated

        n = num_envs
        self.observation_spec = Composite(
            observation=Unbounded((n, self._observe(example).shape[1]), dtype=torch.float32),
            physics=Unbounded((n, self.physics_size), dtype=torch.float64),
            measurements=Unbounded((n, self.measurement_size), dtype=torch.float32),
            shape=(n,),
        )
        self.action_spec = Bounded(-1.0, 1.0, (n, model.nu), dtype=torch.float32)
        self.reward_spec = Unbounded((n, 1), dtype=torch.float32)
        flag = Categorical(2, shape=(n, 1), dtype=torch.bool)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(n,))

        self._generator.manual_seed(seed)
        self._physics = np.zeros((n, self.physics_size))
        self._steps = torch.zeros(n, 1, dtype=torch.int64)
        self._observation = torch.zeros(self.observation_spec["observation"].shape)
        self._measurements = torch.zeros(n, self.measurement_size)

    @property
    def physics_size(self) -> int:
        """p, the numbers in a physics state."""
        return self.simulation.physics_size

    # --- TorchRL ---

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        control = self._control(tensordict["action"])
        self._physics, forces, diverged = self.simulation.advance(self._physics, control, self.domain.substeps)
        self._steps = self._steps + 1
        self._steps[torch.from_numpy(diverged)] = self.episode_length
        snapshot = self.simulation.snapshot(self._physics, control, forces)
        self._observation, self._measurements = self._observe(snapshot), self._flatten(self._measure(snapshot))
        result = self.current()
        result["reward"] = self.rewards(self._measurements, [self.task])
        return result

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        rows = np.arange(self.batch_size[0]) if mask is None else mask.reshape(-1).nonzero()[:, 0].numpy()
        if len(rows):
            self.set_physics(self._start(self.simulation, len(rows), self._generator), rows)
        return self.current()

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)

    def current(self) -> TensorDict:
        """Where every environment is now: what a policy needs to act next, as `reset` or the last step gave it."""
        truncated = self._steps >= self.episode_length
        return TensorDict(
            {
                "observation": self._observation,
                "physics": torch.from_numpy(self._physics),
                "measurements": self._measurements,
                "done": truncated.clone(),
                "terminated": torch.zeros_like(truncated),
                "truncated": truncated,
            },
            batch_size=self.batch_size,
        )

    # --- states ---

    def set_physics(self, physics: Tensor | np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Begins an episode from given physics states.

        Args:
            physics: states [len(rows), p].
            rows: environments to set; all if None.
        """
        rows = np.arange(self.batch_size[0]) if rows is None else np.asarray(rows)
        states = self._states(physics)
        if len(states) != len(rows):
            raise ValueError(f"{len(rows)} environments need as many physics states, got {len(states)}")
        snapshot = self._snapshot(states, np.zeros((len(rows), self.simulation.model.nu)), observed=True)
        # Fresh tensors: the old ones may already lie in somebody's batch.
        self._physics, self._steps = self._physics.copy(), self._steps.clone()
        self._observation, self._measurements = self._observation.clone(), self._measurements.clone()
        self._physics[rows], self._steps[rows] = states, 0
        self._observation[rows] = self._observe(snapshot)
        self._measurements[rows] = self._flatten(self._measure(snapshot))

    def get_extra_state(self) -> dict[str, Tensor]:
        """Everything `state_dict()` needs for an exact continuation; loads with `weights_only=True`."""
        return {
            "physics": torch.from_numpy(self._physics.copy()),
            "steps": self._steps.clone(),
            "observation": self._observation.clone(),
            "measurements": self._measurements.clone(),
            "generator": self._generator.get_state(),
        }

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `get_extra_state` gave."""
        for name, own in self.get_extra_state().items():
            if name not in state:
                raise ValueError(f"the environment state has no {name!r}, so it is of another environment")
            if state[name].shape != own.shape:
                found, expected = tuple(state[name].shape), tuple(own.shape)
                raise ValueError(
                    f"the environment state {name!r} has shape {found}, but {expected} was expected for"
                    f" {self.batch_size[0]} environments of {self.domain.name}"
                )
        self._physics = state["physics"].numpy(force=True).copy()
        self._steps = state["steps"].cpu().clone()
        self._observation, self._measurements = state["observation"].cpu().clone(), state["measurements"].cpu().clone()
        self._generator.set_state(state["generator"].cpu())

    # --- measurements and rewards ---

    def relabel(self, physics: Tensor, action: Tensor) -> Tensor:
        """Measurements [m, M] of stored transitions, the same numbers that the environment gave on arrival.

        Args:
            physics: arrival states [m, p].
            action: that led to them [m, A]; without the right action every reward with a control cost is wrong.
        """
        states, control = self._states(physics), self._control(action)
        if len(states) != len(control):
            raise ValueError(f"{len(states)} physics states need as many actions, got {len(control)}")
        return self._flatten(self._measure(self._snapshot(states, control, observed=False)))

    def observe(self, physics: Tensor) -> Tensor:
        """Observations [m, O] of physics states [m, p], as an episode that begins there would show them.

        Exact for states in the middle of an episode too, except for quadruped's contact-force sensors.
        """
        states = self._states(physics)
        idle = np.zeros((len(states), self.simulation.model.nu))
        return self._observe(self._snapshot(states, idle, observed=True))

    def _snapshot(self, physics: np.ndarray, control: np.ndarray, observed: bool) -> Snapshot:
        return self.simulation.snapshot(physics, control, self.simulation.idle_forces(physics) if observed else None)

    def _observe(self, snapshot: Snapshot) -> Tensor:
        return _columns(read(snapshot) for read in self.domain.observation.values())

    def _measure(self, snapshot: Snapshot) -> dict[str, Tensor]:
        return {name: quantity.read(snapshot) for name, quantity in self.domain.measurements.items()}

    def _flatten(self, measurements: Mapping[str, Tensor]) -> Tensor:
        return _columns(measurements.values())

    def _control(self, action: Tensor) -> np.ndarray:
        values = action.detach().numpy(force=True)
        if values.ndim != 2 or values.shape[1] != self.simulation.model.nu:
            raise ValueError(
                f"{self.domain.name} takes actions [n, {self.simulation.model.nu}], got {list(values.shape)}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"an action for {self.domain.name} is not finite")
        return self.simulation.control(values)

    def _states(self, physics: Tensor | np.ndarray) -> np.ndarray:
        values = physics.numpy(force=True) if isinstance(physics, Tensor) else np.asarray(physics)
        if values.ndim != 2 or values.shape[1] != self.physics_size:
            raise ValueError(
                f"{self.domain.name} has physics states [n, {self.physics_size}], got {list(values.shape)}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"a physics state of {self.domain.name} is not finite")
        return np.ascontiguousarray(values, dtype=np.float64)

    # --- pictures ---

    def render(self, row: int = 0, width: int = 320, height: int = 240, camera: str | None = None) -> np.ndarray:
        """A picture [height, width, 3], uint8, of one environment.

        Raises:
            RenderingUnavailable: no graphics library works on this machine.
        """
        model = self.simulation.model
        if width > MAX_PICTURE[0] or height > MAX_PICTURE[1]:
            raise ValueError(f"pictures are at most {MAX_PICTURE[0]} x {MAX_PICTURE[1]}, asked for {width} x {height}")
        if self._renderer is None or (self._renderer.width, self._renderer.height) != (width, height):
            if self._renderer is not None:
                self._renderer.close()
            try:
                self._renderer = mujoco.Renderer(model, height=height, width=width)
            except Exception as error:  # every graphics library fails with an exception of its own
                raise RenderingUnavailable(
                    "MuJoCo cannot render here: install EGL (libegl1 on Debian and Ubuntu) and set MUJOCO_GL=egl,"
                    f" or OSMesa and MUJOCO_GL=osmesa ({error})"
                ) from error
            # EGL complains about contexts that are still open when it is shut down at exit.
            atexit.register(_close_renderer, weakref.ref(self))
        data = mujoco.MjData(model)
        data.qpos[:] = self._physics[row, : model.nq]
        mujoco.mj_forward(model, data)
        self._renderer.update_scene(data, camera=camera or self.domain.camera)
        return self._renderer.render()


def _close_renderer(reference: "weakref.ref[BatchedMujocoEnv]") -> None:
    environment = reference()
    if environment is not None and environment._renderer is not None:
        environment._renderer.close()


def _columns(values: Iterable[Tensor]) -> Tensor:
    """Float32 columns of [n] and [n, k] tensors side by side."""
    return torch.cat([value if value.ndim == 2 else value[:, None] for value in values], dim=1).float()
