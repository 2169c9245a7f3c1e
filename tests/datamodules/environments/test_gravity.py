"""Gravity that grows as rewards do."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from datamodules.environments.commanded import CommandedEnv
from datamodules.environments.gravity import GrowingGravity

STEP = 0.025  # seconds


def humanoid(rows=4, gravity=None, **settings):
    return CommandedEnv(
        "humanoid", "head_height", rows, observes=["head_height"], num_threads=1, gravity=gravity, **settings
    )


def step(env, action=None):
    action = torch.zeros(len(env._steps), 21) if action is None else action
    return env.step(TensorDict({"action": action}, [len(env._steps)]))["next"]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_bodies_in_the_air_fall_with_a_share_of_gravity(share):
    env = humanoid(gravity=GrowingGravity(share, goal=100.0))
    env.reset()
    physics = env._physics.copy()
    physics[:, 2], physics[:, 28:] = 20.0, 0.0
    env.set_physics(physics, np.arange(4))
    before = env.named(env._measurements)["com_velocity_z"].clone()
    fallen = env.named(step(env)["measurements"])["com_velocity_z"] - before
    torch.testing.assert_close(fallen, torch.full_like(fallen, -9.81 * share * STEP), atol=1e-2, rtol=1e-2)


def test_gravity_grows_after_windows_above_the_goal_and_up_to_its_own():
    rewarded = GrowingGravity(0.25, goal=0.5, growth=0.5, window=10)
    shares = [torch.tensor(0.25)]
    for reward in (0.4, 0.6, 0.6):
        shares.append(rewarded.grown(shares[-1], torch.tensor(reward)))
    assert [float(share) for share in shares] == [0.25, 0.25, 0.75, 1.0]
    for goal, expected in ((-1.0, 0.25 + 2 * 0.125), (100.0, 0.25)):
        env = humanoid(gravity=GrowingGravity(0.25, goal=goal, growth=0.125, window=10))
        env.reset()
        for _ in range(25):
            step(env)
        assert env.gauges() == {"gravity": pytest.approx(expected)}
        assert env.simulation.model.opt.gravity[2] == pytest.approx(-9.81 * expected)


def test_the_share_is_part_of_the_state_and_an_episode_goes_on_as_it_would_have():
    action = 0.1 * torch.randn(60, 4, 21, generator=torch.Generator().manual_seed(0))

    def make():
        return humanoid(gravity=GrowingGravity(0.3, goal=0.3, growth=0.1, window=8), episode_length=20, seed=3)

    def run(env, steps):
        state = env.current()
        for number in steps:
            state = step(env, action[number])
            if state["done"].any():
                state = env.reset(TensorDict({"_reset": state["done"]}, [4]))
        return state["physics"].clone()

    whole, before, after = make(), make(), make()
    whole.reset(), before.reset()
    expected = run(whole, range(60))
    run(before, range(27))
    assert before._gravity_share > 0.3
    after.load_state_dict(before.state_dict())
    after.reset()
    assert torch.equal(run(after, range(27, 60)), expected)


def test_without_a_curriculum_gravity_is_whole():
    env = humanoid()
    assert env.gauges() == {}
    assert env.simulation.model.opt.gravity[2] == pytest.approx(-9.81)
