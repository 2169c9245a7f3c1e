"""Steps many states of one MuJoCo model at once, on all cores, with no Python per state.

Dimensions: n states, p = nq + nv + na numbers of a physics state, u controls.
"""

import os

import mujoco
import numpy as np
import torch
from mujoco.rollout import Rollout

from datamodules.environments.domains import Domain, Snapshot

_CHUNK = 8192
"""States per call when reading sensors of a large stored set: bounds the memory for sensor readings."""

_START_TIME = 1.0
"""Of every control step. MuJoCo's reset of a state that breaks down takes the clock to 0, which then is behind."""


class BatchSimulation:
    """The physics of one domain for batches of states.

    A control step is a pure function of (physics, control): the contact solver is never warm-started from an earlier
    step, so a step gives the same bits after a resume, in another row or with another number of threads.

    Two compiled models share the work. One steps the dynamics and carries only the sensors that need contact forces.
    The other has no contacts, constraints or forces and reads every sensor that depends on positions and velocities:
    that costs a twentieth of a control step, where one more simulation step with sensors would cost a fifth, and the
    same pass measures states that come from storage.

    Args:
        domain: which body.
        num_threads: simulation threads; all available cores if None.
    """

    def __init__(self, domain: Domain, num_threads: int | None = None) -> None:
        self.domain = domain
        self.model = domain.build(sensors=domain.force_sensors)
        self._sensing = domain.build(sensors=domain.sensors)
        flags = mujoco.mjtDisableBit
        for flag in (
            flags.mjDSBL_CONSTRAINT,
            flags.mjDSBL_CONTACT,
            flags.mjDSBL_SPRING,
            flags.mjDSBL_DAMPER,
            flags.mjDSBL_GRAVITY,
            flags.mjDSBL_ACTUATION,
        ):
            self._sensing.opt.disableflags |= int(flag)
        # The suite reads the first observation of an episode from a pass without actuation.
        self._idle = domain.build(sensors=domain.force_sensors)
        self._idle.opt.disableflags |= int(flags.mjDSBL_ACTUATION)
        for model in (self._sensing, self._idle):  # states are read as they are, never from the model's first pose
            model.opt.disableflags |= int(flags.mjDSBL_AUTORESET)

        self.num_threads = num_threads or len(os.sched_getaffinity(0))
        self._pool = Rollout(nthread=self.num_threads if self.num_threads > 1 else 0)
        self._data = {
            id(model): [mujoco.MjData(model) for _ in range(self.num_threads)]
            for model in (self.model, self._sensing, self._idle)
        }
        self._state_size = 1 + self.physics_size  # time comes first
        if mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_FULLPHYSICS) != self._state_size:
            raise ValueError(f"the {domain.name} model has state besides positions, velocities and activations")
        self._gravity = self.model.opt.gravity.copy()
        low, high = self.model.actuator_ctrlrange.T
        self._control_centre, self._control_scale = (high + low) / 2, (high - low) / 2

    @property
    def physics_size(self) -> int:
        """Numbers in a physics state: positions, velocities, activations."""
        return self.model.nq + self.model.nv + self.model.na

    def weigh(self, share: float) -> None:
        """Have bodies move from now on in this share of their gravity."""
        for model in (self.model, self._idle):
            model.opt.gravity[:] = share * self._gravity

    def control(self, action: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1] to actuator units, float64; values outside are clipped."""
        return self._control_centre + self._control_scale * np.clip(action.astype(np.float64), -1, 1)

    def advance(
        self, physics: np.ndarray, control: np.ndarray, substeps: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Holds a control for some simulation steps.

        Args:
            physics: states [n, p].
            control: in actuator units [n, u].
            substeps: simulation steps.

        Returns:
            physics: arrival states [n, p]; the state before the control where the simulation broke down.
            forces: contact-force sensors during the last simulation step [n, readings].
            diverged: rows whose simulation broke down [n], bool.
        """
        controls = np.repeat(control[:, None], substeps, axis=1)
        states, readings = self._roll(self.model, physics, controls, substeps)
        arrival = states[:, -1]
        # MuJoCo counts positions, velocities and accelerations that are not finite or huge, one counter for each
        # thread, and goes on from the model's first pose: what remains of it in a row is the clock. The last arrival
        # has not been looked at yet.
        diverged = arrival[:, 0] < _START_TIME + (substeps - 0.5) * self.model.opt.timestep
        diverged |= ~(np.abs(arrival) <= mujoco.mjMAXVAL).all(axis=1)
        return np.where(diverged[:, None], physics, arrival[:, 1:]), readings[:, -1], diverged

    def idle_forces(self, physics: np.ndarray) -> np.ndarray:
        """Contact-force sensors [n, readings] of states that are not actuated."""
        if not self.domain.force_sensors:
            return np.zeros((len(physics), 0))
        return self._roll(self._idle, physics, None, 1)[1][:, 0]

    def snapshot(self, physics: np.ndarray, control: np.ndarray, forces: np.ndarray | None = None) -> Snapshot:
        """Reads all position and velocity sensors of states.

        Args:
            physics: states [n, p].
            control: that led to them, in actuator units [n, u].
            forces: readings from `advance` or `idle_forces`, if the observation is wanted.
        """
        sensors: dict[str, torch.Tensor] = {}
        if self.domain.sensors:
            parts = np.split(physics, range(_CHUNK, len(physics), _CHUNK))
            readings = np.concatenate([self._roll(self._sensing, part, None, 1)[1][:, 0] for part in parts])
            sensors |= _by_name(self._sensing, readings)
        if forces is not None:
            sensors |= _by_name(self.model, forces)
        qpos, qvel, act = np.split(physics, [self.model.nq, self.model.nq + self.model.nv], axis=1)
        return Snapshot(
            *(torch.from_numpy(np.ascontiguousarray(part)) for part in (qpos, qvel, act, control)), sensors=sensors
        )

    def touches(self, qpos: np.ndarray) -> np.ndarray:
        """Which positions [n, nq] have any contact: bool [n]. One at a time, for episode starts only."""
        data = self._data[id(self.model)][0]
        touching = np.empty(len(qpos), dtype=bool)
        for row, position in enumerate(qpos):
            data.qpos[:] = position
            mujoco.mj_kinematics(self.model, data)
            mujoco.mj_comPos(self.model, data)
            mujoco.mj_collision(self.model, data)
            touching[row] = data.ncon > 0
        return touching

    def _roll(
        self, model: mujoco.MjModel, physics: np.ndarray, controls: np.ndarray | None, steps: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """States [n, steps, 1 + p] after each step and sensors [n, steps, readings] at the start of each step."""
        rows = len(physics)
        initial = np.empty((rows, self._state_size))
        initial[:, 0], initial[:, 1:] = _START_TIME, physics  # nothing may depend on when a step is taken
        states = np.empty((rows, steps, self._state_size))
        readings = np.empty((rows, steps, model.nsensordata))
        # Handing out single rows costs time, and so does waiting at the end for a thread that got a large piece.
        chunk = min(8, -(-rows // self.num_threads))
        self._pool.rollout(
            [model] * rows,
            self._data[id(model)],
            initial,
            controls,
            nstep=steps,
            state=states,
            sensordata=readings,
            skip_checks=True,
            chunk_size=chunk,
        )
        return states, readings


def _by_name(model: mujoco.MjModel, readings: np.ndarray) -> dict[str, torch.Tensor]:
    values = torch.from_numpy(readings)
    return {
        model.sensor(i).name: values[:, model.sensor_adr[i] : model.sensor_adr[i] + model.sensor_dim[i]]
        for i in range(model.nsensor)
    }
