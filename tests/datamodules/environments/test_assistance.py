"""Forces that help a body up, and how they fade."""

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from datamodules.environments.assistance import FadingAssistance
from datamodules.environments.commanded import CommandedEnv

NQ, NV = 28, 27


def lying(height: float, turned: float) -> np.ndarray:
    """A body turned about its own x axis, at rest."""
    physics = np.zeros((1, NQ + NV))
    physics[0, 2], physics[0, 3], physics[0, 4] = height, math.cos(turned / 2), math.sin(turned / 2)
    return physics


def humanoid(rows=4, **settings):
    return CommandedEnv("humanoid", "head_height", rows, observes=["head_height"], num_threads=1, **settings)


def test_forces_are_springs_and_dampers_at_the_root():
    help_up = FadingAssistance(height=1.2, stiffness=500, lift=350, upright=100, damping=50, turn_damping=4)
    physics = lying(0.9, 0.5)
    physics[0, NQ : NQ + 6] = [0.2, -0.4, 3.0, 0.1, 0.2, 0.3]
    forces = help_up.forces(physics, np.array([[1.0]]), NQ)[0]
    assert np.allclose(forces[:3], [-10.0, 20.0, 150.0])
    assert np.allclose(forces[3:6], [-50.0 - 0.4, -0.8, -1.2])  # against a turn about x, less the damping
    assert not forces[6:].any()
    assert np.allclose(help_up.forces(physics, np.array([[0.5]]), NQ)[0], forces / 2)
    assert np.isclose(help_up.forces(lying(0.1, 0.0), np.ones((1, 1)), NQ)[0, 2], 350)
    assert not help_up.forces(lying(1.3, 0.0), np.ones((1, 1)), NQ).any()


def test_episodes_draw_their_help():
    help_up = FadingAssistance(height=1.2, unaided=0.25)
    drawn = help_up.draw(4000, torch.tensor(0.5), torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 1)
    assert 0.22 < (drawn == 0).float().mean() < 0.28
    assert set(drawn.flatten().tolist()) == {0.0, 0.5}


def test_help_lifts_and_fades_where_rewards_are_above_the_goal():
    generator = np.random.default_rng(0)
    heads = []
    for goal, force in ((10.0, 400.0), (0.0, 400.0), (10.0, 0.0)):
        help_up = FadingAssistance(1.25, lift=force, upright=force, unaided=0.0, goal=goal, window=10, fade=0.5)
        env = humanoid(assistance=help_up, seed=1)
        env.reset()
        env.set_physics(lying(0.3, 1.5).repeat(4, 0))
        env._help.fill_(1.0)
        for _ in range(40):
            action = torch.from_numpy(0.1 * generator.normal(size=(4, 21))).float()
            measured = env.step(TensorDict({"action": action}, [4]))["next", "measurements"]
        heads.append(env.named(measured)["head_height"].mean())
        assert env._help_scale == (1.0 if goal else 0.5**4)
    assert heads[0] > 0.8
    assert heads[2] < 0.4


def test_what_help_there_is_is_part_of_the_state():
    action = 0.1 * torch.randn(60, 4, 21, generator=torch.Generator().manual_seed(0))

    def make():
        return humanoid(assistance=FadingAssistance(1.25, goal=0.3, window=8), episode_length=20, seed=3)

    def run(env, steps):
        state = env.current()
        for number in steps:
            state = env.step(TensorDict({"action": action[number]}, [4]))["next"]
            if state["done"].any():
                state = env.reset(TensorDict({"_reset": state["done"]}, [4]))
        return state["physics"].clone()

    whole, before, after = make(), make(), make()
    whole.reset(), before.reset()
    expected = run(whole, range(60))
    run(before, range(27))
    after.load_state_dict(before.state_dict())
    after.reset()
    assert torch.equal(run(after, range(27, 60)), expected)


def test_bodies_without_a_free_root_are_refused():
    with pytest.raises(ValueError, match="assistance: expected null, for the root of walker is not free to move"):
        CommandedEnv("walker", "torso_height", observes=["torso_height"], assistance=FadingAssistance(1.0))
