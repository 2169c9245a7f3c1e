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
from torchrl.data import Unbounded

from components.checks import Count, Seed, Size, checked
from datamodules.environments.domains import DOMAINS, MAX_PICTURE, Snapshot, Start
from datamodules.environments.measured import MeasuredEnv
from datamodules.environments.simulation import BatchSimulation
from datamodules.environments.tasks import TASKS
from datamodules.pixels import RenderingUnavailable


@checked
class BatchedMujocoEnv(MeasuredEnv):
    """n environments of one domain, stepped together on all cores.

    Keys: `action` [n, A] float32 in [-1, 1]; `observation` [n, O] float32, the suite's observation, flat, in its order;
    `physics` [n, p] float64, positions, velocities and activations; `measurements` [n, M] float32, the quantities that
    rewards are written in; `reward`, `terminated`, `truncated`, `done` [n, 1]. Episodes end by time only, so they are
    truncated and never terminated. A row whose simulation breaks down is truncated, and arrives where it last was
    sound: in the state, with the observation, that the control which broke it began with.

    A step depends on `physics` and `action` alone, to the bit, whatever the row, the batch or the number of threads.

    Args:
        domain: a key of `domains.DOMAINS`.
        task: what `reward` is: a task of the domain (`tasks.TASKS`; its first if None) or any reward expression over
            its measurements.
        num_envs: n.
        start: where episodes begin: a function (simulation, rows, generator) -> physics states [rows, p]; None for the
            suite's own distribution.
        episode_length: control steps per episode; the suite's (1,000) if None.
        action_repeat: control steps that an action is held for. `reward` is their sum, and `passed`
            [n, action_repeat, M] has the measurements after each of them, if there are several.
        num_threads: simulation threads; all available cores if None.
        seed: of the generator that every episode start is drawn from.
    """

    def __init__(
        self,
        domain: str,
        task: str | None = None,
        num_envs: Size = 1,
        *,
        start: Start | None = None,
        episode_length: Count | None = None,
        action_repeat: Size = 1,
        num_threads: Size | None = None,
        seed: Seed = 0,
    ) -> None:
        if domain not in DOMAINS:
            raise ValueError(f"domain={domain}: expected one of {', '.join(DOMAINS)}.")
        super().__init__(num_envs, seed)
        self.domain = DOMAINS[domain]
        self.episode_length = episode_length or self.domain.episode_length
        self.simulation = BatchSimulation(self.domain, num_threads)
        self._start = start or self.domain.start
        self.action_repeat = action_repeat
        self.step_seconds = self.simulation.model.opt.timestep * self.domain.substeps * action_repeat
        self._renderer: mujoco.Renderer | None = None

        model = self.simulation.model
        example = self._snapshot(np.zeros((1, self.physics_size)), np.zeros((1, model.nu)), observed=True)
        widths = {name: value.shape[1] if value.ndim == 2 else 0 for name, value in self._measure(example).items()}
        self.declare_measurements(widths, TASKS[domain], domain)
        self.task = task or next(iter(TASKS[domain]))
        try:  # a typing error shows before anything is simulated
            self._expression(self.task)
        except ValueError as error:
            raise ValueError(f"task={self.task}: {error}") from error

        self.declare_specs(self._observe(example).shape[1:], self.physics_size, model.nu)
        if action_repeat > 1:
            self.observation_spec["passed"] = Unbounded((num_envs, action_repeat, self.measurement_size))
        self._physics = np.zeros((num_envs, self.physics_size))
        self._steps = torch.zeros(num_envs, 1, dtype=torch.int64)
        self._observation = torch.zeros(self.observation_spec["observation"].shape)
        self._measurements = torch.zeros(num_envs, self.measurement_size)

    @property
    def physics_size(self) -> int:
        """p, the numbers in a physics state."""
        return self.simulation.physics_size

    # --- TorchRL ---

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        control = self._control(tensordict["action"])
        passed = []
        for _ in range(self.action_repeat):
            self._physics, forces, diverged = self.simulation.advance(self._physics, control, self.domain.substeps)
            self._steps = self._steps + 1
            self._steps[torch.from_numpy(diverged)] = self.episode_length
            snapshot = self.simulation.snapshot(self._physics, control, forces)
            before = self._observation
            self._observation, measured = self._read(snapshot, slice(None))
            passed.append(measured)
            self._observation[diverged] = before[diverged]  # forces are not those of the state
        self._measurements = passed[-1]
        result = self.current()
        result["reward"] = sum(self.rewards(measurements, [self.task]) for measurements in passed)
        if self.action_repeat > 1:
            result["passed"] = torch.stack(passed, 1)
        return result

    def begin(self, rows: np.ndarray) -> None:
        self.set_physics(self._start(self.simulation, len(rows), self._generator), rows)

    def current(self) -> TensorDict:
        truncated = self._steps >= self.episode_length
        here = self._here(self._observation, torch.from_numpy(self._physics), self._measurements, truncated)
        if self.action_repeat > 1:
            here["passed"] = self._measurements[:, None].repeat(1, self.action_repeat, 1)
        return here

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
        self._observation[rows], self._measurements[rows] = self._read(snapshot, rows)

    def _state_tensors(self) -> dict[str, Tensor]:
        return {
            "physics": torch.from_numpy(self._physics.copy()),
            "steps": self._steps.clone(),
            "observation": self._observation.clone(),
            "measurements": self._measurements.clone(),
        }

    def _set_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        self._physics = state["physics"].numpy().copy()
        self._steps = state["steps"].clone()
        self._observation, self._measurements = state["observation"].clone(), state["measurements"].clone()

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

    def _read(self, snapshot: Snapshot, rows: slice | np.ndarray) -> tuple[Tensor, Tensor]:
        """What is observed and measured in these rows, which are now at a snapshot."""
        return self._observe(snapshot), self._flatten(self._measure(snapshot))

    def _observe(self, snapshot: Snapshot) -> Tensor:
        return _columns(read(snapshot) for read in self.domain.observation.values())

    def _measure(self, snapshot: Snapshot) -> dict[str, Tensor]:
        return {name: quantity.read(snapshot) for name, quantity in self.domain.measurements.items()}

    def _flatten(self, measurements: Mapping[str, Tensor]) -> Tensor:
        return _columns(measurements.values())

    def _control(self, action: Tensor) -> np.ndarray:
        values = self._finite(action)
        if values.ndim != 2 or values.shape[1] != self.simulation.model.nu:
            raise ValueError(
                f"{self.domain.name} takes actions [n, {self.simulation.model.nu}], got {list(values.shape)}"
            )
        return self.simulation.control(values)

    def _states(self, physics: Tensor | np.ndarray) -> np.ndarray:
        values = physics.numpy(force=True) if isinstance(physics, Tensor) else np.asarray(physics)
        if values.ndim != 2 or values.shape[1] != self.physics_size:
            raise ValueError(
                f"{self.domain.name} has physics states [n, {self.physics_size}], got {list(values.shape)}"
            )
        if not (np.abs(values) <= mujoco.mjMAXVAL).all():
            raise ValueError(
                f"a physics state of {self.domain.name} is not finite, or beyond MuJoCo's limit of {mujoco.mjMAXVAL:g}"
            )
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
