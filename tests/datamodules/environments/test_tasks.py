import numpy as np
import pytest
import torch

from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.domains import DOMAINS
from datamodules.environments.tasks import TASKS


@pytest.fixture(scope="module")
def standing() -> BatchedMujocoEnv:
    environment = BatchedMujocoEnv("humanoid", "stand", 1)
    environment.reset()
    environment.set_physics(np.concatenate([environment.simulation.model.qpos0, np.zeros(27)])[None])
    return environment


def humanoid_rewards(environment: BatchedMujocoEnv, **changes: float) -> dict[str, float]:
    """Rewards of all humanoid tasks for the default posture with some measurements replaced."""
    state = environment.current()["physics"]
    measurements = environment.relabel(state, torch.zeros(1, 21))
    for name, value in changes.items():
        environment.named(measurements)[name][:] = value
    tasks = list(TASKS["humanoid"])
    return dict(zip(tasks, environment.rewards(measurements, tasks)[0].tolist()))


def test_default_posture(standing: BatchedMujocoEnv) -> None:
    rewards = humanoid_rewards(standing)
    assert rewards["stand"] == pytest.approx(1, abs=1e-6)
    assert rewards["walk"] == pytest.approx(1 / 6, abs=1e-6)
    assert rewards["run"] == pytest.approx(1 / 6, abs=1e-6)
    assert rewards["still"] == rewards["head_up"] == 1
    assert rewards["scoot"] == rewards["spin"] == 0
    assert max(rewards[task] for task in ("crouch", "bow", "raise_left_hand", "raise_right_hand")) < 0.05


def test_postures_earn_their_own_task_only(standing: BatchedMujocoEnv) -> None:
    assert humanoid_rewards(standing, head_height=1.1)["crouch"] == pytest.approx(1, abs=1e-6)
    assert humanoid_rewards(standing, head_height=1.1)["stand"] < 0.3
    left = humanoid_rewards(standing, left_hand_height=1.8)
    assert left["raise_left_hand"] == pytest.approx(1, abs=1e-6)
    assert left["raise_right_hand"] < 0.05
    assert humanoid_rewards(standing, forward_lean=0.6)["bow"] == pytest.approx(1, abs=1e-6)
    assert humanoid_rewards(standing, forward_lean=0.6, pelvis_height=0.1)["bow"] < 1e-6


@pytest.mark.parametrize("domain", TASKS)
def test_every_task_gives_rewards_between_0_and_1(domain: str) -> None:
    environment = BatchedMujocoEnv(domain, next(iter(TASKS[domain])), 16)
    measurements = environment.rollout(10)["next", "measurements"].flatten(0, 1)
    rewards = environment.rewards(measurements, list(TASKS[domain]))
    assert rewards.shape == (160, len(TASKS[domain]))
    assert (rewards >= 0).all()
    assert (rewards <= 1).all()


def test_every_domain_has_tasks() -> None:
    assert TASKS.keys() == DOMAINS.keys()
