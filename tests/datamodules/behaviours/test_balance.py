"""Balanced postures stand, moves between them arrive, and the controller is reproducible."""

import numpy as np
import pytest
import torch

from datamodules.behaviours.balance import (
    NQ,
    NV,
    BalanceController,
    BalancedPose,
    Body,
    Posture,
    UnbalancedPostureError,
    balance,
    check_balance,
    holding_controls,
    tangent_difference,
)
from datamodules.behaviours.humanoid import POSTURES, STAND
from datamodules.environments.domains import HUMANOID
from datamodules.environments.simulation import BatchSimulation

import mujoco  # isort: skip  # the project chooses the graphics library first

ARRIVALS = "crouch", "raise_left_hand", "bow"
WAY = (0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def body() -> Body:
    return Body()


@pytest.fixture(scope="module")
def simulation() -> BatchSimulation:
    return BatchSimulation(HUMANOID, num_threads=2)


@pytest.fixture(scope="module")
def poses(body: Body) -> list[BalancedPose]:
    """Standing, then four poses on the way to each of ARRIVALS."""
    return balance([STAND, *(STAND.towards(POSTURES[name], x) for name in ARRIVALS for x in WAY)], body)


def controller(poses, knots, times, noise=0.0, seed=0) -> BalanceController:
    rows = len(knots)
    return BalanceController(
        poses,
        torch.tensor(knots),
        torch.tensor(times, dtype=torch.float64),
        torch.full((rows,), noise),
        torch.zeros(rows),
        seed,
    )


def at_rest(poses: list[BalancedPose], knots: list[int]) -> np.ndarray:
    return np.stack([np.concatenate([poses[k].qpos, np.zeros(NV)]) for k in knots])


def run(simulation: BatchSimulation, policy: BalanceController, physics: np.ndarray, steps: int):
    """Measured heights of head and left hand and uprightness after each step [steps, N]."""
    names = "head_height", "left_hand_height", "torso_upright"
    records = {name: [] for name in names}
    for _ in range(steps):
        control = simulation.control(policy(torch.from_numpy(physics)).numpy())
        physics, _, _ = simulation.advance(physics, control, HUMANOID.substeps)
        snapshot = simulation.snapshot(physics, control)
        for name in names:
            records[name].append(HUMANOID.measurements[name].read(snapshot))
    return {name: torch.stack(values) for name, values in records.items()}


@pytest.mark.parametrize("name", POSTURES)
def test_named_postures_rest_where_they_should(body: Body, name: str):
    qpos, controls = check_balance(body, POSTURES[name])
    again, wrench, contacts = holding_controls(body, qpos)
    assert contacts == 8
    assert np.abs(wrench).max() < 1.0  # the body weighs 400 N
    assert np.abs(controls).max() < 0.8
    np.testing.assert_array_equal(controls, again)
    data = body.place(qpos)
    assert data.xpos[body.head, 2] == pytest.approx(POSTURES[name].head_height, abs=1e-4)
    assert (data.xpos[body.left_hand, 2] > data.xpos[body.head, 2] + 0.25) == (
        "left_hand" in name or "both" in name
    ) or (name == "lower_both_hands")


@pytest.mark.parametrize(
    ("posture", "reason"),
    [
        (Posture(head_height=1.7), "reach"),
        (Posture(head_height=0.8), "reach"),
        (Posture(left_arm=(-1.0, -1.0, 0.8), right_arm=(-1.0, -1.0, 0.8)), "contacts"),
    ],
)
def test_impossible_postures_are_refused(body: Body, posture: Posture, reason: str):
    with pytest.raises(UnbalancedPostureError, match=reason):
        balance([posture], body)


def test_posture_vector_round_trip():
    posture = POSTURES["raise_left_hand"]
    assert Posture.from_vector(posture.vector()) == posture
    assert STAND.towards(posture, 1.0) == posture


def test_tangent_difference_is_mujocos(body: Body):
    rng = np.random.default_rng(0)
    first, last = rng.normal(size=(2, 50, NQ))
    for q in (first, last):
        q[:, 3:7] /= np.linalg.norm(q[:, 3:7], axis=1, keepdims=True)
    last[0] = first[0]
    last[1, 3:7] = -first[1, 3:7]  # the same orientation, written the other way
    expected = np.empty((50, NV))
    for row in range(50):
        mujoco.mj_differentiatePos(body.model, expected[row], 1.0, first[row], last[row])
    actual = tangent_difference(torch.from_numpy(last), torch.from_numpy(first))
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-9)


def test_poses_are_held_in_spite_of_noise(simulation: BatchSimulation, poses: list[BalancedPose]):
    held = [0, 4, 8, 12]  # standing and ARRIVALS
    policy = controller(poses, [[k, k] for k in held], [[0.0, 1.0]] * len(held), noise=0.05)
    record = run(simulation, policy, at_rest(poses, held), 1000)
    wanted = torch.tensor([poses[k].posture.head_height for k in held])
    assert (record["head_height"] - wanted).abs().max() < 0.05
    above = record["left_hand_height"][:, 2] - record["head_height"][:, 2]
    assert above.min() > 0.2


def test_moves_go_and_return(simulation: BatchSimulation, poses: list[BalancedPose]):
    knots, times = [], []
    for row in range(len(ARRIVALS)):
        there = list(range(1 + 4 * row, 5 + 4 * row))
        knots.append([0, 0, *there, there[-1], *there[-2::-1], 0])
        times.append([0, 10, *(20, 30, 40, 50), 110, *(120, 130, 140, 150)])
    policy = controller(poses, knots, times, noise=0.03)
    record = run(simulation, policy, at_rest(poses, [0] * len(knots)), 220)
    crouched = slice(70, 110)
    assert (record["head_height"][crouched, 0] < 1.25).all()
    assert (record["head_height"][crouched, 0] > 1.0).all()
    assert (record["torso_upright"][crouched, 0] > 0.9).all()
    assert (record["left_hand_height"][crouched, 1] > record["head_height"][crouched, 1] + 0.2).all()
    assert (record["torso_upright"][crouched, 2] < 0.85).all()
    assert (record["head_height"][-20:] > 1.4).all()


def test_reference_passes_the_knots(poses: list[BalancedPose]):
    policy = controller(poses, [[0, 1, 2]], [[0.0, 10.0, 30.0]])
    for step, pose in ((0, 0), (10, 1), (30, 2), (99, 2)):
        qpos, velocity, control, gain = policy.reference(torch.tensor(step))
        np.testing.assert_allclose(qpos[0], poses[pose].qpos, atol=1e-12)
        np.testing.assert_allclose(control[0], poses[pose].control, atol=1e-12)
        np.testing.assert_allclose(gain[0], poses[pose].gain, atol=1e-9)
    assert velocity.abs().max() == 0  # arrived
    before, velocity, *_ = policy.reference(torch.tensor(4))
    after = policy.reference(torch.tensor(5))[0]
    np.testing.assert_allclose(tangent_difference(after, before) / 0.025, velocity, atol=1e-3)


def test_a_row_does_not_depend_on_the_batch(poses: list[BalancedPose]):
    knots, times = [[0, 1], [2, 3], [0, 0]], [[0.0, 9.0], [0.0, 4.0], [0.0, 1.0]]
    physics = torch.from_numpy(at_rest(poses, [0, 2, 0])) + 0.01 * torch.randn(3, 55, dtype=torch.float64)
    together = controller(poses, knots, times)
    alone = [controller(poses, [k], [t]) for k, t in zip(knots, times)]
    for _ in range(5):
        single = torch.cat([policy(physics[i : i + 1]) for i, policy in enumerate(alone)])
        torch.testing.assert_close(together(physics), single, rtol=0, atol=1e-6)


def test_state_dict_continues_the_same_actions(poses: list[BalancedPose]):
    physics = torch.from_numpy(at_rest(poses, [0, 0]))
    make = lambda seed: controller(poses, [[0, 1]] * 2, [[0.0, 9.0]] * 2, noise=0.1, seed=seed)  # noqa: E731
    policy, same, resumed = make(1), make(1), make(2)
    for _ in range(3):
        torch.testing.assert_close(policy(physics), same(physics), rtol=0, atol=0)
    resumed.load_state_dict(policy.state_dict())
    for _ in range(3):
        torch.testing.assert_close(policy(physics), resumed(physics), rtol=0, atol=0)
    assert not torch.equal(policy(physics), make(3)(physics))
