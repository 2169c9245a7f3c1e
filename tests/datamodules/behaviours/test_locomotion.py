import numpy as np
import pytest
import torch

from datamodules.behaviours.balance import Body
from datamodules.behaviours.locomotion import HumanoidTargets, stance, start_anywhere, start_standing
from datamodules.environments.domains import HUMANOID
from datamodules.environments.simulation import BatchSimulation


def test_no_displacement_at_rest_asks_for_what_holds_the_stance():
    controller, pose = HumanoidTargets(), stance()
    physics = torch.from_numpy(np.concatenate([pose.qpos, np.zeros(27)])[None])
    assert torch.allclose(controller(physics, torch.zeros(1, 21)), torch.from_numpy(pose.control).float()[None])


def test_controls_are_those_of_springs_and_dampers_by_joint():
    controller, pose, body = HumanoidTargets(), stance(), Body()
    rng = np.random.default_rng(0)
    physics = np.concatenate([pose.qpos + 0.05 * rng.normal(size=28), 0.5 * rng.normal(size=27)])
    action = 0.3 * rng.normal(size=21).astype(np.float32)
    found = controller(torch.from_numpy(physics[None]), torch.from_numpy(action[None]))[0]
    gains = {"right_knee": (1, 0.05), "left_hip_y": (1, 0.06), "left_ankle_x": (1, 0.015), "right_elbow": (0.25, 0.01)}
    gains |= {"left_shoulder1": (0.5, 0.02), "abdomen_z": (1, 0.05), "right_hip_z": (1, 0.05)}
    for name, (stiffness, damping) in gains.items():
        number = next(i for i in range(21) if body.model.actuator(i).name == name)
        joint = body.model.joint(name)
        angle, rest = physics[joint.qposadr[0]], pose.qpos[joint.qposadr[0]]
        control = pose.control[number] + stiffness * (action[number] - (angle - rest))
        control -= damping * physics[28 + joint.dofadr[0]]
        assert np.isclose(found[number], np.clip(control, -1, 1), atol=1e-6), name


def test_episodes_begin_near_the_stance():
    simulation = BatchSimulation(HUMANOID, num_threads=1)
    states = start_standing(simulation, 500, torch.Generator().manual_seed(0), noise=0.05)
    assert states.shape == (500, 55)
    assert np.allclose(states[:, :7], stance().qpos[:7])
    assert np.isclose((states[:, 7:28] - stance().qpos[7:]).std(), 0.05, rtol=0.05)
    assert np.isclose(states[:, 28:].std(), 0.05, rtol=0.05)


def test_getting_up_begins_anywhere():
    simulation = BatchSimulation(HUMANOID, num_threads=1)

    def heads(shares):
        generator = torch.Generator().manual_seed(0)
        states = start_anywhere(simulation, 40, generator, shares)
        sensors = simulation.snapshot(states, np.zeros((40, 21))).sensors
        return sensors["head"][:, 2]

    assert (heads({"standing": 1.0}) > 1.3).all()
    crouching = heads({"crouching": 1.0})
    assert ((crouching > 0.8) & (crouching < 1.4)).all()
    assert (heads({"lying": 1.0}) < 0.7).float().mean() > 0.9
    assert (heads({"reset": 1.0}) > 1.2).all()  # in the air
    mixed = heads(None)
    assert mixed.min() < 0.3 < 1.3 < mixed.max()
    assert torch.equal(mixed, heads(None))
    with pytest.raises(ValueError, match=r"shares=.*: expected some of reset, lying, crouching, standing"):
        start_anywhere(simulation, 2, torch.Generator(), {"flying": 1.0})
